"""Studies as declared in YAML."""

import re
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from zo_lightning.presets import find
from zo_lightning.study.grid import Method, Overlay, Study, Trials, slug
from zo_lightning.user_errors import UserError
from zo_lightning.yaml_files import read_text

_SECTIONS = ("model", "data", "trainer", "checkpoint", "last_checkpoint", "progress_bar")
_KEYS = (
    "name",
    "base",
    "common",
    "methods",
    "nets",
    "tasks",
    "seeds",
    "budgets",
    "trials",
    "reference",
    "control",
    "snapshots",
)
_METHOD_KEYS = ("base", "by_task", "learning_rates", *_SECTIONS)
_TASK_KEYS = ("base", *_SECTIONS)
_TRIAL_KEYS = ("budgets", "seed", "val_size")


def read_study(path: str | Path, options: tuple[str, ...] = ()) -> Study:
    """Read a study's YAML file. It has the keys

    - ``name``: of the study's folder; the file's own name where it is left out;
    - ``base``: configuration files that every cell begins with, relative to the study's file;
    - ``common``: more configuration for every cell;
    - ``methods``: by name, configuration (``model``, ``trainer``, ...), files with more of it (``base``), exceptions at
      single tasks (``by_task``) and learning rates to choose from (``learning_rates``);
    - ``tasks``: by name, configuration (``model``, ``data``, ...) and files with more of it (``base``);
    - ``nets``: tasks that differ in the net alone: scales by net class, or null for a net that has none. A task's name
      is then the net's and its scale, such as ``ScalableCNN 12.33``;
    - ``seeds``;
    - ``budgets``: forward passes of 128 examples, a run each, by default none: the configuration says when a run ends;
    - ``trials``: how learning rates are chosen: ``budgets``, of which each run goes by the largest within its own,
      ``seed`` and ``val_size``, the share that is held out;
    - ``reference``: the method that the others are compared with, by default the first;
    - ``control``: the method that is the reference but for the order of the batches;
    - ``snapshots``: epochs from one snapshot of all weights to the next, or null for none; the default is 1, and null
      where there are budgets.

    Raises:
        UserError: the file cannot be read, or has unknown keys, no cells or the same cell twice.
    """
    path = Path(path)
    text = read_yaml(path)
    _check_keys(text, _KEYS, f"{path}")
    methods = _mapping(text, "methods", path)
    tasks = _tasks(text, path)
    seeds = text.get("seeds") or []
    for empty, given in (("methods", methods), ("nets' or 'tasks", tasks), ("seeds", seeds)):
        if not given:
            raise UserError(f"{path}: '{empty}' is empty: a study needs a method, a net or a task, and a seed at least")
    reference = str(text.get("reference", next(iter(methods))))
    if reference not in map(str, methods):
        raise UserError(f"{path}: reference '{reference}' is none of the methods {', '.join(map(str, methods))}")
    control = text.get("control")
    if control is not None and (str(control) not in map(str, methods) or str(control) == reference):
        raise UserError(f"{path}: control '{control}' is to be one of the methods, and not the reference '{reference}'")
    budgets = _whole_numbers(text.get("budgets") or [], "budgets", 1, path)
    every = text.get("snapshots", None if budgets else 1)
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise UserError(f"{path}: snapshots must be a whole number of epochs of at least 1, or null, got {every!r}")
    name = text.get("name", path.stem)
    if name is None or slug(str(name)) != str(name):
        raise UserError(f"{path}: name {name!r} is to be a folder's name: letters, digits, '.', '_' and '-'")
    study = Study(
        name=str(name),
        common=(*_files(text, path), *([_overlay(text["common"], f"{path}: common")] if text.get("common") else [])),
        methods={str(name): _method(spec or {}, path, str(name)) for name, spec in methods.items()},
        tasks=tasks,
        seeds=_whole_numbers(seeds, "seeds", 0, path),
        reference=reference,
        control=None if control is None else str(control),
        snapshots=every,
        options=options,
        budgets=budgets,
        trials=_trials(text, path),
    )
    _check(study, path)
    return study


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: there is none.
    """
    content = yaml.load(read_text(path), _Loader)  # a SafeLoader
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, got {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is one, as it is for ``fit``."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _check(study: Study, path: Path) -> None:
    """See that all names fit together.

    Raises:
        UserError: they do not.
    """
    twice = [
        str(folder)
        for folder, count in Counter(cell.folder for cell in (*study.cells(), *study.trial_cells())).items()
        if count > 1
    ]
    if twice:
        raise UserError(
            f"{path}: two cells would share the folder '{twice[0]}': a name, a number or a seed stands twice"
        )
    for name, method in study.methods.items():
        for task in method.by_task:
            if task not in study.tasks:
                raise UserError(
                    f"{path}: methods.{name}.by_task: '{task}' is none of the tasks {', '.join(study.tasks)}"
                )
    choosing = {name: len(method.learning_rates) for name, method in study.methods.items() if method.learning_rates}
    if choosing and study.trials is None:
        raise UserError(f"{path}: methods.{next(iter(choosing))}.learning_rates need 'trials', which say how to choose")
    if study.trials is not None and not choosing:
        raise UserError(f"{path}: 'trials' choose among 'learning_rates', and no method has any")
    if len(set(choosing.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in choosing.items())
        raise UserError(f"{path}: each method has to have as many learning_rates as the others, got {counts}")
    if study.trials is not None and study.trials.seed in study.seeds:
        raise UserError(f"{path}: trials.seed {study.trials.seed} is one of the study's seeds: take another one")
    if study.trials is not None:
        asked = {study.trials.budget_for(budget) for budget in study.budgets or (None,)}
        if idle := [budget for budget in study.trials.budgets if budget not in asked]:
            raise UserError(
                f"{path}: trials.budgets: no run goes by that of {idle[0]} passes, but by the largest within its own"
            )


def _mapping(text: Mapping[str, Any], key: str, path: Path) -> dict[Any, Any]:
    value = text.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} must be names and what they stand for, got {value!r}")
    return value


def _tasks(text: Mapping[str, Any], path: Path) -> dict[str, tuple[Overlay, ...]]:
    """Those of ``nets`` and of ``tasks``."""
    found: dict[str, tuple[Overlay, ...]] = {}
    for net, scales in _mapping(text, "nets", path).items():
        name = str(net).rpartition(".")[2]
        if scales == []:
            raise UserError(f"{path}: 'nets.{net}' is empty: give scales, or null for a net that has none")
        for scale in [None] if scales is None else scales if isinstance(scales, list) else [scales]:
            value = None if scale is None else _number(scale, f"{path}: nets.{net}: a scale")
            label = name if value is None else f"{name} {value:.6g}"
            if label in found:
                raise UserError(f"{path}: nets: '{label}' stands twice")
            arguments = {} if value is None else {"init_args": {"scale": value}}
            found[label] = ({"model": {"net": {"class_path": str(net), **arguments}}},)
    for name, spec in _mapping(text, "tasks", path).items():
        where = f"{path}: tasks.{name}"
        if str(name) in found:
            raise UserError(f"{where}: a net has this name already")
        found[str(name)] = _configuration(spec or {}, path, where, _TASK_KEYS)
    return found


def _method(spec: Any, path: Path, name: str) -> Method:
    where = f"{path}: methods.{name}"
    own = _configuration(spec, path, where, _METHOD_KEYS)
    exceptions = {
        str(task): _overlay(overlay, f"{where}.by_task.{task}")
        for task, overlay in _mapping(spec, "by_task", path).items()
    }
    rates = spec.get("learning_rates") or []
    rates = [_number(rate, f"{where}.learning_rates: each") for rate in (rates if isinstance(rates, list) else [rates])]
    if any(rate <= 0 for rate in rates):
        raise UserError(f"{where}.learning_rates: each must be above 0, got {min(rates)}")
    return Method(own, exceptions, tuple(rates))


def _configuration(spec: Any, path: Path, where: str, known: tuple[str, ...]) -> tuple[Overlay, ...]:
    """The files that a method or a task names, and what it says itself."""
    if not isinstance(spec, dict):
        raise UserError(f"{where}: expected configuration, got {spec!r}")
    _check_keys(spec, known, where)
    own = {key: value for key, value in spec.items() if key in _SECTIONS}
    return (*_files(spec, path), *([own] if own else []))


def _trials(text: Mapping[str, Any], path: Path) -> Trials | None:
    spec = _mapping(text, "trials", path)
    if not spec:
        return None
    where = f"{path}: trials"
    _check_keys(spec, _TRIAL_KEYS, where)
    for key in ("budgets", "seed"):
        if spec.get(key) in (None, []):
            raise UserError(f"{where}: '{key}' is missing: trials have budgets and a seed of their own")
    budgets = _whole_numbers(spec["budgets"], "trials.budgets", 1, path)
    [seed] = _whole_numbers([spec["seed"]], "trials.seed", 0, path)
    share = _number(spec.get("val_size", 0.1), f"{where}.val_size")
    if not 0 < share < 1:
        raise UserError(f"{where}.val_size must be a share of the training data between 0 and 1, got {share:g}")
    return Trials(budgets, seed, share)


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} must be a number, got {value!r}") from error


def _whole_numbers(values: Any, key: str, least: int, path: Path) -> tuple[int, ...]:
    for value in values if isinstance(values, list) else [values]:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{path}: {key} must be a list of whole numbers of at least {least}, got {value!r}")
    if not isinstance(values, list):
        raise UserError(f"{path}: {key} must be a list of whole numbers, got {values!r}")
    return tuple(values)


def _files(spec: Mapping[str, Any], path: Path) -> list[Overlay]:
    names = spec.get("base") or []
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{path}: base must be a file's name or a list of them, got {name!r}")
    beside = [path.parent / name for name in names]
    files = [file if file.exists() else find(name) for file, name in zip(beside, names, strict=True)]
    return [_overlay(read_yaml(file), str(file)) for file in files]


def _overlay(value: Any, where: str) -> Overlay:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected configuration, got {value!r}")
    if "seed_everything" in value:
        raise UserError(f"{where}: seed_everything is the study's to set: see 'seeds'")
    _check_keys(value, _SECTIONS, where)
    return value


def _check_keys(text: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in text:
        if key not in known:
            nearest = get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise UserError(f"{where}: unknown key '{key}'{hint}; there are {', '.join(known)}")
