"""Studies with tasks, budgets and learning rates to choose from: what they run, choose and say."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from zo_lightning.__main__ import main
from zo_lightning.study.devices import device_name
from zo_lightning.study.folder import read_declaration
from zo_lightning.study.reached import choose_rates, read_reached
from zo_lightning.study.runs import with_rates
from zo_lightning.study.runs_table import COLUMNS, read_runs
from zo_lightning.user_errors import UserError

DECLARED = """
common: {trainer: {log_every_n_steps: 2}}
methods:
  FO:
    model: {estimator: Backprop, optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1e-3}}}
    by_task: {linear: {data: {init_args: {batch_size: 64}}}}
    learning_rates: [1e-9, 1e-2]
  signs:
    data: {init_args: {batch_size: 32}}
    model:
      estimator: {class_path: ZerothOrder, init_args: {stencil: {class_path: ForwardDifference}, samples: 3}}
      optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1e-3}}
    learning_rates: [1e-4, 1e30]
tasks:
  conv: {model: {net: SmallCNN}, data: {class_path: Digits, init_args: {val_size: 0}}}
  linear:
    model: {net: {class_path: zo_lightning.MLP, init_args: {hidden: []}}}
    data: {class_path: Digits, init_args: {val_size: 0}}
budgets: [9, 30]
seeds: [1, 2]
trials: {budgets: [9, 30], seed: 0}
"""
STUDY = Path("lightning_logs", "small")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the study was run, and reported on."""
    folder = tmp_path_factory.mktemp("budgets")
    (folder / "small.yaml").write_text(DECLARED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["zo-lightning"])
        assert main(["study", "-c", "small.yaml", "--jobs", "2"]) == 0
        assert main(["report", str(STUDY)]) == 0
        yield folder


def test_each_budget_is_a_run_of_its_own(home: Path) -> None:
    table = read_runs(home / STUDY).table
    assert len(table) == 2 * 2 * 2 * 2
    assert set(table["passes"] <= table["budget"]) == {True}
    steps = table.set_index(["task", "method", "budget", "seed"])["steps"]
    assert steps["conv", "FO", 30, 1] == 10
    assert steps["linear", "FO", 30, 1] == 20  # of half the examples
    assert steps["conv", "signs", 30, 2] == 30  # 4 passes of 32
    run = home / STUDY / "signs" / "conv" / "budget_30" / "seed_1"
    assert read_reached(run)["lr"] == 1e-4
    metrics = pd.read_csv(run / "metrics.csv")
    assert metrics["test/acc"].notna().sum() == 1 and "val/acc" not in metrics
    assert metrics["lr"].min() < 1e-5  # it decays


def test_everything_is_measured(home: Path) -> None:
    table = read_runs(home / STUDY).table
    assert tuple(table.columns) == COLUMNS
    assert table.notna().all(axis=None)
    assert set(table["device"]) == {device_name(torch.device("cpu"))}
    assert dict(zip(table["task"], table["d"], strict=True)) == {"conv": 2590, "linear": 7850}
    cost = table[table["method"] == "FO"].groupby("budget")["flops"].mean()
    assert cost[30] / cost[9] == pytest.approx(30 / 9, rel=0.01)


def test_learning_rates_are_chosen_on_held_out_training_data(home: Path) -> None:
    study = read_declaration(home / STUDY)
    assert choose_rates(study, home / STUDY) == {
        (method, task, budget): lr
        for method, lr in (("FO", 1e-2), ("signs", 1e-4))  # the other one of signs diverges
        for task in ("conv", "linear")
        for budget in (9, 30)
    }
    trial = home / STUDY / "_trials" / "FO" / "conv" / "budget_30" / "lr_0.01"
    assert yaml.safe_load((trial / "config.yaml").read_text())["data"]["init_args"]["val_size"] == 0.1
    metrics = pd.read_csv(trial / "metrics.csv")
    assert metrics["val/acc"].notna().sum() == 1 and "test/acc" not in metrics
    assert read_reached(home / STUDY / "_trials" / "signs" / "conv" / "budget_30" / "lr_1e+30") == {}


def test_each_budget_has_the_rate_of_its_own_trials(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / STUDY / "_trials", tmp_path / "_trials")
    trial = tmp_path / "_trials" / "FO" / "conv" / "budget_30" / "lr_0.01" / "finished.yaml"
    trial.write_text(yaml.safe_dump({**yaml.safe_load(trial.read_text()), "reached": {}}))  # as if it had diverged
    found = {(c.budget, c.task, c.lr) for c in with_rates(read_declaration(home / STUDY), tmp_path) if c.method == "FO"}
    assert found == {(9, "conv", 1e-2), (30, "conv", 1e-9), (9, "linear", 1e-2), (30, "linear", 1e-2)}


def test_study_goes_on_and_grows(home: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """What is finished stays, a run that was lost is made again, a new budget is added; the choice stands."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / STUDY, tmp_path / STUDY)
    lost = STUDY / "FO" / "conv" / "budget_9" / "seed_1"
    before = read_reached(lost)
    shutil.rmtree(lost)
    kept = {path: path.stat().st_mtime_ns for path in STUDY.rglob("finished.yaml")}
    (tmp_path / "small.yaml").write_text(DECLARED.replace("budgets: [9, 30]", "budgets: [9, 30, 3]", 1))
    assert main(["study", "-c", "small.yaml", "--jobs", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = read_reached(lost)
    same = set(before) - {"seconds"}
    assert {name: before[name] for name in same} == {name: again[name] for name in same}
    assert sorted(set(read_runs(STUDY).table["budget"])) == [3, 9, 30]
    capsys.readouterr()
    (tmp_path / "small.yaml").write_text(DECLARED.replace("[1e-9, 1e-2]", "[1e-9, 2e-2]"))
    assert main(["study", "-c", "small.yaml"]) == 2
    assert "chose its learning rates otherwise: learning_rates.FO is" in capsys.readouterr().err


def test_without_a_finished_trial_its_runs_fail(home: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(DECLARED.replace("[1e-4, 1e30]", "[1e29, 1e30]").replace("[1, 2]", "[1]"))
    words = ["study", "-c", "small.yaml", "--jobs", "2"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "signs, conv, 30 passes, seed 1: its learning rate is not chosen" in error
    assert set(read_runs(STUDY).table[["task", "method"]].itertuples(index=False, name=None)) >= {("conv", "FO")}
    assert {cell.method for cell in read_runs(STUDY).missing} == {"signs"}


def test_report_says_who_wins_and_how_rates_were_chosen(home: Path) -> None:
    report = home / STUDY / "report"
    assert {path.stem for path in report.glob("*.png")} == {"budgets_conv", "budgets_linear"}
    summary = (report / "summary.md").read_text()
    assert "16 of 16 cells are finished" in summary
    assert summary.index("Who wins where") < summary.index("1. conv, d = 2,590") < summary.index("How learning rates")
    assert "| conv | signs | 30 | 0.0001 | 0.0001: " in summary and "1e+30: diverged" in summary
    assert "of 9 and 30 passes with seed 0, judged on 10 % of the training data" in summary
    page = (report / "report.html").read_text()
    assert page.count('<img src="data:image/svg+xml;base64,') == 2 * 3  # a panel each


def test_tables_alone_give_the_same_report(home: Path, tmp_path: Path) -> None:
    report = home / STUDY / "report"
    for name in ("results.csv", "trials.csv", "declaration.yaml"):
        shutil.copy(report / name, tmp_path)
    assert main(["report", str(tmp_path / "results.csv")]) == 0
    for name in ("results.csv", "trials.csv", "declaration.yaml", "summary.md"):
        assert (tmp_path / "results_report" / name).read_bytes() == (report / name).read_bytes(), name
    for name in ("trials.csv", "declaration.yaml"):
        (tmp_path / name).unlink()
    assert main(["report", str(tmp_path / "results.csv")]) == 0  # drawn again with less
    made = {file.name for file in (tmp_path / "results_report").iterdir()}
    assert "budgets_conv.png" in made and not {"trials.csv", "declaration.yaml"} & made
    whole = (report / "summary.md").read_text()
    assert whole[whole.index("| task") : whole.index("Test accuracy of")] in _summary(tmp_path)


@pytest.mark.parametrize(("old", "new"), [("False", "no"), (",0.01,", ",1e-09,")], ids=["truth", "twice"])
def test_damaged_trials_beside_a_table_are_named(home: Path, tmp_path: Path, old: str, new: str) -> None:
    for name in ("results.csv", "trials.csv"):
        shutil.copy(home / STUDY / "report" / name, tmp_path)
    trials = tmp_path / "trials.csv"
    assert old in trials.read_text()
    trials.write_text(trials.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=r"trials\.csv' is damaged"):
        read_runs(tmp_path / "results.csv")


def test_a_declaration_beside_the_table_gives_name_reference_and_what_is_missing(home: Path, tmp_path: Path) -> None:
    for name in ("results.csv", "declaration.yaml"):
        shutil.copy(home / STUDY / "report" / name, tmp_path)
    text = (tmp_path / "results.csv").read_text().splitlines(keepends=True)
    (tmp_path / "results.csv").write_text("".join([text[0], *text[2:]]))
    runs = read_runs(tmp_path / "results.csv")
    declared = read_declaration(home / STUDY)
    assert (runs.name, runs.reference) == (declared.name, declared.reference) and len(runs.missing) == 1
    (tmp_path / "results.csv").write_text("".join(text[:2]))
    assert main(["report", str(tmp_path / "results.csv")]) == 0
    assert re.search(r"Missing cells: .* \(not in the table\); and 3 more\.\n", _summary(tmp_path))
    (tmp_path / "results.csv").write_text(text[0] + text[1].replace("conv,", "dense,"))
    with pytest.raises(UserError, match="none of the study's in declaration.yaml"):
        read_runs(tmp_path / "results.csv")


def test_trials_of_some_methods_are_not_called_all(home: Path, tmp_path: Path) -> None:
    for name in ("results.csv", "trials.csv"):
        shutil.copy(home / STUDY / "report" / name, tmp_path)
    trials = (tmp_path / "trials.csv").read_text().splitlines(keepends=True)
    assert main(["report", str(tmp_path / "results.csv")]) == 0
    assert "Each method had as many trials as the others." in _summary(tmp_path)
    (tmp_path / "trials.csv").write_text("".join(trials[:-1]))
    assert main(["report", str(tmp_path / "results.csv")]) == 0
    assert "Not all trials are here." in _summary(tmp_path)
    (tmp_path / "trials.csv").write_text("".join(trials).replace("False", "True"))
    with pytest.raises(UserError, match="two learning rates are chosen at one task"):
        read_runs(tmp_path / "results.csv")


def test_report_keeps_what_it_said_of_trials_that_are_gone(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / STUDY, tmp_path / STUDY)
    before = (STUDY / "report" / "trials.csv").read_bytes()
    shutil.rmtree(STUDY / "_trials")
    assert main(["report", str(STUDY)]) == 0
    assert (STUDY / "report" / "trials.csv").read_bytes() == before


def _summary(folder: Path) -> str:
    return (folder / "results_report" / "summary.md").read_text()


def test_foreign_table_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    assert main(["report", str(tmp_path / "mine.csv")]) == 2
    assert "not the results.csv of a report, which begins with 'method,task,data,d," in capsys.readouterr().err


def test_dry_run_lists_trials_and_budgets(home: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(home)
    assert main(["study", "-c", "small.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "lightning_logs/small/_trials/FO/conv/budget_30/lr_0.01  d = 2,590  finished" in printed
    assert "lightning_logs/small/signs/linear/budget_9/seed_2  d = 7,850  finished" in printed
    assert "32 cells, 32 of them finished" in printed
