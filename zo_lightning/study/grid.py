"""A study: which cells there are, and the configuration of each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo_lightning.user_errors import UserError

Overlay = dict[str, Any]

_LONGEST = 80
TRIALS = "_trials"
"""The folder of a study's trials; no method's has this name."""
_OF_A_CLASS = {"class_path", "init_args", "dict_kwargs"}


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        method: the method's name.
        task: the task's name, such as ``"ScalableCNN 12.33"``.
        seed: decides initialisation, split, order of the batches and directions.
        overlays: configurations as ``fit`` takes them, of which later ones override earlier ones.
        budget: forward passes of 128 examples, or None where the configuration says when the run ends.
        lr: the learning rate, or None for that of the configuration.
        held_out: the share of the training data on which a trial is judged; None for the study's own runs.
    """

    method: str
    task: str
    seed: int
    overlays: tuple[Overlay, ...] = field(hash=False)
    budget: int | None = None
    lr: float | None = None
    held_out: float | None = None

    @property
    def folder(self) -> Path:
        """Where the run lies, relative to the study's folder."""
        place = Path(slug(self.method), slug(self.task))
        if self.held_out is not None:
            return TRIALS / place / f"budget_{self.budget}" / f"lr_{self.lr:g}"
        if self.budget is not None:
            place /= f"budget_{self.budget}"
        return place / f"seed_{self.seed}"

    def __str__(self) -> str:
        where = f"{self.method}, {self.task}"
        if self.held_out is not None:
            return f"{where}, {self.budget} passes, trial of lr {self.lr:g}"
        return f"{where}, {'' if self.budget is None else f'{self.budget} passes, '}seed {self.seed}"


@dataclass(frozen=True)
class Method:
    """What a method adds to the configuration: everywhere, and at single tasks.

    Args:
        overlays: everywhere.
        by_task: exceptions, by the task's name.
        learning_rates: of which the best is taken at each task; none: that of the configuration.
    """

    overlays: tuple[Overlay, ...]
    by_task: Mapping[str, Overlay] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()

    def at(self, task: str) -> tuple[Overlay, ...]:
        """The overlays at a task."""
        return (*self.overlays, self.by_task[task]) if task in self.by_task else self.overlays


@dataclass(frozen=True)
class Trials:
    """How learning rates are chosen: one run each, judged once, at its end, on training data that it has not seen.

    The best rate of a short run is often too large for a long one. With several budgets each rate is tried with each.

    Args:
        budgets: forward passes of 128 examples.
        seed: none of the study's.
        val_size: the share of the training data that is held out.
    """

    budgets: tuple[int, ...]
    seed: int
    val_size: float = 0.1

    def budget_for(self, budget: int | None) -> int:
        """That of the trials whose choice a run takes: the largest within the run's own, or else the smallest.

        A run without a budget takes that of the longest trials.
        """
        within = [tried for tried in self.budgets if budget is None or tried <= budget]
        return max(within) if within else min(self.budgets)


@dataclass(frozen=True)
class Study:
    """A grid of methods × tasks × budgets × seeds.

    Args:
        name: of the study's folder.
        common: overlays that every cell begins with.
        methods: by name.
        tasks: overlays by name: net, data, and what else belongs to them. Where a cell's overlays name the model's
            class (``model.class_path``), settings of ``model`` by other overlays are arguments of that class.
        seeds: one run each.
        reference: the method that the others are compared with.
        snapshots: epochs from one snapshot of the weights to the next, or None for no snapshots.
        options: words of the command line that every cell's ``fit`` is given.
        budgets: forward passes of 128 examples, a run each; none: the configuration says when a run ends.
        trials: how the methods' learning rates are chosen; None: they have none to choose from.
        control: the method that is the reference but for the order of the batches: how far its minima lie from the
            reference's says what "different" means.

    Raises:
        UserError: the declaration has no cells, or is otherwise not as described.
    """

    name: str
    common: tuple[Overlay, ...]
    methods: Mapping[str, Method]
    tasks: Mapping[str, tuple[Overlay, ...]]
    seeds: tuple[int, ...]
    reference: str
    snapshots: int | None = 1
    options: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    trials: Trials | None = None
    control: str | None = None

    def __post_init__(self) -> None:
        for name in (*self.methods, *self.tasks):
            if len(name) > _LONGEST or not name.isprintable() or "$" in name or not name.strip():
                raise UserError(
                    f"'{name[:_LONGEST]}' cannot stand in a figure: take at most {_LONGEST} characters, and no '$'"
                )

    def cells(self) -> list[Cell]:
        """All cells; seeds vary slowest, so that an unfinished study is a whole one with fewer seeds."""
        return [
            Cell(method, task, seed, self._overlays(method, task), budget)
            for seed in self.seeds
            for budget in self.budgets or (None,)
            for task in self.tasks
            for method in self.methods
        ]

    def trial_cells(self) -> list[Cell]:
        """A run for each method, task, budget of trials and learning rate to choose from."""
        if self.trials is None:
            return []
        seed, held_out = self.trials.seed, self.trials.val_size
        return [
            Cell(name, task, seed, self._overlays(name, task), budget, lr, held_out)
            for budget in self.trials.budgets
            for task in self.tasks
            for name, method in self.methods.items()
            for lr in method.learning_rates
        ]

    def declaration(self) -> dict[str, Any]:
        """All of it in YAML's types, with the contents of files in place of their names: `from_declaration`'s input."""
        return {
            "name": self.name,
            "reference": self.reference,
            "control": self.control,
            "snapshots": self.snapshots,
            "seeds": list(self.seeds),
            "budgets": list(self.budgets),
            "trials": None if self.trials is None else {**vars(self.trials), "budgets": list(self.trials.budgets)},
            "tasks": {name: list(overlays) for name, overlays in self.tasks.items()},
            "methods": {
                name: {
                    "overlays": list(method.overlays),
                    "by_task": dict(method.by_task),
                    "learning_rates": list(method.learning_rates),
                }
                for name, method in self.methods.items()
            },
            "common": list(self.common),
            "options": list(self.options),
        }

    @classmethod
    def from_declaration(cls, declaration: Mapping[str, Any]) -> "Study":
        """The study of which `declaration` was asked."""
        methods = {
            name: Method(tuple(m["overlays"]), m["by_task"], tuple(m["learning_rates"]))
            for name, m in declaration["methods"].items()
        }
        return cls(
            name=declaration["name"],
            common=tuple(declaration["common"]),
            methods=methods,
            tasks={name: tuple(overlays) for name, overlays in declaration["tasks"].items()},
            seeds=tuple(declaration["seeds"]),
            reference=declaration["reference"],
            control=declaration["control"],
            snapshots=declaration["snapshots"],
            options=tuple(declaration["options"]),
            budgets=tuple(declaration["budgets"]),
            trials=None if declaration["trials"] is None else _trials(declaration["trials"]),
        )

    def _overlays(self, method: str, task: str) -> tuple[Overlay, ...]:
        overlays = (*self.common, *self.tasks[task], *self.methods[method].at(task))
        models = [overlay.get("model") or {} for overlay in overlays]
        if not any(isinstance(model, str) or "class_path" in model for model in models):
            return overlays
        return tuple(
            overlay if isinstance(model, str) or not model.keys() - _OF_A_CLASS else {**overlay, "model": _args(model)}
            for overlay, model in zip(overlays, models, strict=True)
        )


def _trials(spec: Mapping[str, Any]) -> Trials:
    return Trials(**{**spec, "budgets": tuple(spec["budgets"])})


def _args(model: Overlay) -> Overlay:
    """The settings of a model as arguments of its class."""
    about = {key: value for key, value in model.items() if key in _OF_A_CLASS}
    rest = {key: value for key, value in model.items() if key not in _OF_A_CLASS}
    return {**about, "init_args": {**about.get("init_args", {}), **rest}}


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """Say in which key two configurations differ first, and how; None where they do not."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            if found := first_difference(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{key}.{name}".lstrip(".")):
                return found
        return None
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        return next(filter(None, (first_difference(*pair, key) for pair in zip(old, new, strict=True))), None)
    return None if old == new else f"{key} is {old!r} there and {new!r} here"


def slug(name: str) -> str:
    """A name with nothing in it that a file system or a shell could take amiss."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_.") or "_"


class _Absent:
    """What stands where a configuration lacks a key, which is not the same as null."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()
