"""Studies as declared in YAML."""

from pathlib import Path

import pytest
import yaml

from zo_lightning.study.declared import read_study
from zo_lightning.study.grid import Study, Trials, first_difference, slug
from zo_lightning.user_errors import UserError

DECLARED = """
base: base.yaml
common: {trainer: {max_epochs: 3}}
methods:
  FO: {model: {estimator: Backprop}}
  ZO:
    base: [zo.yaml]
    model: {optimizer: {class_path: AdaMM, init_args: {lr: 1e-3}}}
    by_task: {ScalableCNN 0.5: {model: {optimizer: {class_path: AdaMM, init_args: {lr: 4e-3}}}}}
nets: {ScalableCNN: [0.5, 2], SmallCNN: null}
seeds: [1, 2]
"""


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("data: {class_path: Digits}\n")
    (tmp_path / "zo.yaml").write_text("model: {estimator: ZerothOrder}\n")
    (tmp_path / "small.yaml").write_text(DECLARED)
    return tmp_path / "small.yaml"


def test_cells_are_the_product_with_seeds_slowest(declared: Path) -> None:
    study = read_study(declared)
    assert (study.name, study.reference) == ("small", "FO")
    assert [str(cell.folder) for cell in study.cells()] == [
        f"{method}/{net}/seed_{seed}"
        for seed in (1, 2)
        for net in ("ScalableCNN_0.5", "ScalableCNN_2", "SmallCNN")
        for method in ("FO", "ZO")
    ]


def test_overlays_go_from_the_general_to_the_special(declared: Path) -> None:
    cells = {(cell.method, cell.task): cell for cell in read_study(declared).cells()}
    base, common, net, file, own, special = cells["ZO", "ScalableCNN 0.5"].overlays
    assert base == {"data": {"class_path": "Digits"}}
    assert common == {"trainer": {"max_epochs": 3}}
    assert net == {"model": {"net": {"class_path": "ScalableCNN", "init_args": {"scale": 0.5}}}}
    assert file == {"model": {"estimator": "ZerothOrder"}}
    assert own["model"]["optimizer"]["init_args"] == {"lr": 1e-3}  # a number, as fit reads it
    assert special["model"]["optimizer"]["init_args"] == {"lr": 4e-3}
    assert cells["ZO", "ScalableCNN 2"].overlays == (base, common, {"model": {"net": {
        "class_path": "ScalableCNN", "init_args": {"scale": 2.0}}}}, file, own)  # fmt: skip
    assert cells["ZO", "SmallCNN"].overlays[2] == {"model": {"net": {"class_path": "SmallCNN"}}}


def test_declaration_gives_itself_without_the_files(declared: Path) -> None:
    study = read_study(declared, ("--data.batch_size", "32"))
    for file in declared.parent.iterdir():
        file.unlink()
    copy = Study.from_declaration(yaml.safe_load(yaml.safe_dump(study.declaration())))
    assert copy.declaration() == study.declaration()
    assert copy.cells() == study.cells()


BAD = {
    "methods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: []": "'seeds' is empty",
    "methods: {}\nnets: {SmallCNN: null}\nseeds: [1]": "'methods' is empty",
    "methods: {FO: {}}\nnets: {ScalableCNN: []}\nseeds: [1]": "'nets.ScalableCNN' is empty",
    "methods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [1]\nmethds: 1": "unknown key 'methds' .did you mean methods",
    "methods: {FO: {modl: {}}}\nnets: {SmallCNN: null}\nseeds: [1]": "methods.FO: unknown key 'modl'.*mean model",
    "methods: {FO: 3}\nnets: {SmallCNN: null}\nseeds: [1]": "methods.FO: expected configuration, got 3",
    "methods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [-1]": "whole numbers of at least 0, got -1",
    "methods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: 3": "seeds must be a list of whole numbers, got 3",
    "methods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [1, 1]": "two cells would share the folder 'FO/SmallCNN/seed_1'",
    "methods: {FO: {}}\nnets: {ScalableCNN: [big]}\nseeds: [1]": "a scale must be a number, got 'big'",
    "methods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [1]\nreference: ZO": "'ZO' is none of the methods FO",
    "methods: {FO: {base: no.yaml}}\nnets: {SmallCNN: null}\nseeds: [1]": "'no.yaml' is neither a file nor",
    "methods: {FO: {by_task: {Big: {}}}}\nnets: {SmallCNN: null}\nseeds: [1]": "'Big' is none of the tasks SmallCNN",
    "common: {seed_everything: 1}\nmethods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [1]": "seed_everything is the",
    "methods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [1]\nsnapshots: 0": "at least 1, or null, got 0",
    "name: a/b\nmethods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [1]": "name 'a/b' is to be a folder's name",
    "name:\nmethods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [1]": "name None is to be a folder's name",
    "base: 3\nmethods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [1]": "base must be a file's name or .*, got 3",
    "methods: {FO: {base: [{a: 1}]}}\nnets: {SmallCNN: null}\nseeds: [1]": "base must be .*, got {'a': 1}",
    "methods: {FO: {}}\nnets: {SmallCNN: null}\nseeds: [1]\nreference: [a]": r"reference '\['a'\]' is none of",
    "methods: [": "not YAML",
    "just words": "expected keys and values, got str",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=list(BAD.values()))
def test_bad_declaration_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_study(tmp_path / "bad.yaml")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read '.*nowhere.yaml'"):
        read_study(tmp_path / "nowhere.yaml")


def test_first_difference_names_the_key() -> None:
    old = {"a": {"b": [1, {"c": 2}]}, "same": 0}
    assert first_difference(old, {"a": {"b": [1, {"c": 2}]}, "same": 0}) is None
    assert first_difference(old, {"a": {"b": [1, {"c": 3}]}, "same": 0}) == "a.b.c is 2 there and 3 here"
    assert first_difference(old, {"a": {"b": [1, {"c": 2}]}, "same": 0, "d": 1}) == "d is absent there and 1 here"
    assert first_difference({"a": {}}, {"a": {"b": None}}) == "a.b is absent there and None here"


def test_slug_is_safe_as_a_folder() -> None:
    assert slug("ZO-AdaMM, q = 4/µ") == "ZO-AdaMM_q_4"
    assert slug("..") == "_"


@pytest.mark.parametrize("name", [r"a $\frac{$", "x" * 300, "two\nlines", " "])
def test_names_that_no_figure_or_folder_can_bear(tmp_path: Path, name: str) -> None:
    """They are refused before anything is trained, not when it is drawn."""
    text = {"methods": {name: {"model": {"estimator": "Backprop"}}}, "nets": {"SmallCNN": None}, "seeds": [1]}
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match="cannot stand in a figure: take at most 80 characters, and no '\\$'"):
        read_study(tmp_path / "named.yaml")


TASKS = """
common: {trainer: {max_steps: 3}}
methods:
  FO: {model: {estimator: Backprop}, learning_rates: [1e-3, 1e-2]}
  ZO: {data: {init_args: {batch_size: 32}}, by_task: {b: {model: {memory: lean}}}, learning_rates: [1, 2]}
tasks: {a: {base: base.yaml, model: {net: SmallCNN}}, b: {data: {class_path: Digits}}}
nets: {ScalableCNN: 0.5}
budgets: [10, 20]
trials: {budgets: [10, 15], seed: 0}
seeds: [1, 2]
"""


def test_tasks_and_budgets_are_axes(declared: Path) -> None:
    (declared.parent / "tasks.yaml").write_text(TASKS)
    study = read_study(declared.parent / "tasks.yaml")
    assert study.snapshots is None
    cells = {str(cell.folder): cell for cell in study.cells()}
    assert len(cells) == 2 * 3 * 2 * 2
    assert cells["ZO/b/budget_20/seed_2"].budget == 20
    assert list(cells["ZO/a/budget_10/seed_1"].overlays[1:]) == [
        {"data": {"class_path": "Digits"}},  # the task's base
        {"model": {"net": "SmallCNN"}},
        {"data": {"init_args": {"batch_size": 32}}},
    ]
    assert cells["ZO/b/budget_10/seed_1"].overlays[-1] == {"model": {"memory": "lean"}}
    assert "ZO/ScalableCNN_0.5/budget_10/seed_1" in cells
    trials = study.trial_cells()
    assert len(trials) == 2 * 3 * 2 * 2
    assert {(cell.seed, cell.budget, cell.held_out) for cell in trials} == {(0, 10, 0.1), (0, 15, 0.1)}
    assert str(trials[0].folder) == "_trials/FO/ScalableCNN_0.5/budget_10/lr_0.001"
    copy = Study.from_declaration(yaml.safe_load(yaml.safe_dump(study.declaration())))
    assert copy.cells() == study.cells() and copy.trial_cells() == trials


@pytest.mark.parametrize(("budget", "tried"), [(1, 10), (10, 10), (99, 10), (100, 100), (5000, 100), (None, 100)])
def test_a_run_goes_by_the_longest_trials_within_its_budget(budget: int | None, tried: int) -> None:
    assert Trials((100, 10), seed=0).budget_for(budget) == tried


def test_a_task_may_name_the_class_alone(declared: Path) -> None:
    text = {**yaml.safe_load(TASKS), "tasks": {"a": {"base": "base.yaml"}, "b": {"model": "mine.Model"}}}
    (declared.parent / "tasks.yaml").write_text(yaml.safe_dump(text))
    cells = {(cell.method, cell.task): cell for cell in read_study(declared.parent / "tasks.yaml").cells()}
    assert cells["FO", "b"].overlays[1:] == (
        {"model": "mine.Model"},
        {"model": {"init_args": {"estimator": "Backprop"}}},
    )


def test_settings_of_the_model_are_those_of_the_class_that_a_task_names(declared: Path) -> None:
    net = {"class_path": "mine.Net"}
    task = {"model": {"class_path": "Regressor", "init_args": {"net": net}}}
    text = {**yaml.safe_load(TASKS), "tasks": {"a": {"base": "base.yaml"}, "b": task}, "nets": None}
    (declared.parent / "tasks.yaml").write_text(yaml.safe_dump(text))
    cells = {(cell.method, cell.task): cell for cell in read_study(declared.parent / "tasks.yaml").cells()}
    assert cells["FO", "a"].overlays[-1] == {"model": {"estimator": "Backprop"}}
    assert cells["FO", "b"].overlays[1:] == (task, {"model": {"init_args": {"estimator": "Backprop"}}})
    assert cells["ZO", "b"].overlays[-1] == {"model": {"init_args": {"memory": "lean"}}}  # of by_task as well


BAD_CHOICES = {
    "budgets: [10, 20]": ("budgets: [0]", "budgets must be a list of whole numbers of at least 1, got 0"),
    "seed: 0": ("seed: 2", "trials.seed 2 is one of the study's seeds"),
    "trials: {budgets: [10, 15], seed: 0}": ("", "methods.FO.learning_rates need 'trials', which say how to choose"),
    "{budgets: [10, 15], seed: 0}": ("{budgets: [10]}", "trials: 'seed' is missing"),
    "[10, 15], seed": ("[], seed", "trials: 'budgets' is missing"),
    "[10, 15]": ("[10, 10]", "two cells would share the folder '_trials/FO/ScalableCNN_0.5/budget_10/lr_0.001'"),
    "[10, 15], seed: 0": ("[10, 15, 17, 30], seed: 0", "trials.budgets: no run goes by that of 15 passes"),
    "budgets: [10, 15]": ("budget: 10", "unknown key 'budget' .did you mean budgets"),
    "seed: 0}": ("seed: 0, val_size: 1}", "val_size must be a share of the training data between 0 and 1, got 1"),
    "[1e-3, 1e-2]": ("[1e-3]", "as many learning_rates as the others, got FO 1, ZO 2"),
    "[1, 2]}\ntasks": ("[1, -2]}\ntasks", "methods.ZO.learning_rates: each must be above 0, got -2"),
    "{b: {model": ("{c: {model", "methods.ZO.by_task: 'c' is none of the tasks ScalableCNN 0.5, a, b"),
    "nets: {ScalableCNN: 0.5}": ("nets: {a: null}", "tasks.a: a net has this name already"),
}


@pytest.mark.parametrize(("old", "new"), BAD_CHOICES.items(), ids=[message for _, message in BAD_CHOICES.values()])
def test_bad_budgets_and_trials_are_refused_by_name(declared: Path, old: str, new: tuple[str, str]) -> None:
    assert old in TASKS
    (declared.parent / "bad.yaml").write_text(TASKS.replace(old, new[0], 1))
    with pytest.raises(UserError, match=new[1]):
        read_study(declared.parent / "bad.yaml")
