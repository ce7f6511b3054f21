"""The table of runs with given budgets: read from a study's folder, or from the CSV file that a report has written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from zo_lightning.study.folder import is_finished, read_declaration, read_finished
from zo_lightning.study.grid import Cell, Study
from zo_lightning.study.reached import choose_rates, read_reached
from zo_lightning.study.tables import RESULTS, declared_beside, missing_cells, name_of, read_table
from zo_lightning.user_errors import UserError

_NUMBERS = ("budget", "seed", "d", "accuracy", "loss", "flops", "passes", "steps", "seconds", "lr")
COLUMNS = ("task", "method", *_NUMBERS, "device")
TRIALS = ("task", "method", "budget", "lr", "accuracy", "loss", "chosen")
TRIALS_FILE = "trials.csv"
"""The table of trials that a report writes beside its ``results.csv``."""


@dataclass(frozen=True)
class Runs:
    """What runs with given budgets have reached.

    Attributes:
        name: of the study.
        reference: the method that the others are compared with.
        table: a row per finished run, with `COLUMNS`: ``accuracy`` (NaN of a regression) and ``loss`` on the test set,
            of the last weights; ``budget`` and ``passes`` in forward passes of 128 examples, ``flops`` and ``seconds``
            of all training steps, ``lr`` at their start.
        trials: a row per finished trial, with `TRIALS`; accuracy and loss on training data that were held out.
        study: the declaration; None where the table comes from a file without one.
        missing: cells without a run, and why.
    """

    name: str
    reference: str
    table: pd.DataFrame
    trials: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(TRIALS)))
    study: Study | None = None
    missing: dict[Cell, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """In their order in the table."""
        return list(dict.fromkeys(self.table["method"]))

    @property
    def tasks(self) -> list[str]:
        """In their order in the table."""
        return list(dict.fromkeys(self.table["task"]))


def read_runs(source: Path) -> Runs:
    """Read a study's folder, or a CSV file of such runs, and of a ``results.csv`` the trials beside it.

    Raises:
        UserError: there is no finished run in it, or it is something else; or what stands beside it is damaged.
    """
    return _from_file(source) if source.is_file() else _from_folder(source)


def write_runs(runs: Runs, path: Path) -> None:
    """Write the table as CSV, as ``read_runs`` reads it."""
    whole = runs.table["flops"].map(lambda value: "" if np.isnan(value) else f"{value:.0f}")
    runs.table.assign(flops=whole).to_csv(path, index=False)


def _from_file(path: Path) -> Runs:
    table = read_table(path, COLUMNS, ("task", "method", "budget", "seed"))
    if table.empty:
        raise UserError(f"'{path}' has no rows")
    study, trials = declared_beside(path), _trials_beside(path)
    if study is None:
        return Runs(name_of(path), str(table["method"].iloc[0]), table, trials)
    missing = dict.fromkeys(missing_cells(path, table, study), "not in the table")
    return Runs(study.name, study.reference, table, trials, study, missing)


def _trials_beside(path: Path) -> pd.DataFrame:
    beside = path.with_name(TRIALS_FILE)
    if path.name != RESULTS or not beside.is_file():
        return pd.DataFrame(columns=list(TRIALS))
    trials = read_table(beside, TRIALS, ("task", "method", "budget", "lr"))
    if (trials.groupby(["task", "method", "budget"])["chosen"].sum() > 1).any():
        raise UserError(f"'{beside}' is damaged: of one method two learning rates are chosen at one task and budget")
    return trials


def _from_folder(folder: Path) -> Runs:
    study = read_declaration(folder)
    rows, missing = read_finished(study, folder, _row)
    digits = {"accuracy": 5, "loss": 5, "passes": 2, "seconds": 2}  # that mean something: the table is to be read
    table = pd.DataFrame(rows, columns=list(COLUMNS)).round(digits)
    order = {"task": list(study.tasks), "method": list(study.methods)}
    table = table.sort_values(
        ["task", "method", "budget", "seed"],
        key=lambda column: column.map(order[str(column.name)].index) if column.name in order else column,
        ignore_index=True,
    )
    return Runs(study.name, study.reference, table, _trials(study, folder), study, missing)


def _row(cell: Cell, run: Path) -> dict[str, Any]:
    key = {"task": cell.task, "method": cell.method, "budget": cell.budget, "seed": cell.seed}
    reached = read_reached(run)
    numbers = {name: float("nan") if reached[name] is None else reached[name] for name in _NUMBERS if name not in key}
    return {**key, **numbers, "device": str(reached["device"])}


def _trials(study: Study, folder: Path) -> pd.DataFrame:
    chosen = choose_rates(study, folder)
    rows = []
    for cell in study.trial_cells():
        if is_finished(folder, cell):
            reached = read_reached(folder / cell.folder)
            accuracy = reached.get("accuracy")
            rows.append(
                {
                    "task": cell.task,
                    "method": cell.method,
                    "budget": cell.budget,
                    "lr": cell.lr,
                    "accuracy": np.nan if accuracy is None else accuracy,
                    "loss": reached.get("loss", np.nan),
                    "chosen": chosen.get((cell.method, cell.task, cell.budget)) == cell.lr,
                }
            )
    return pd.DataFrame(rows, columns=list(TRIALS)).round({"accuracy": 5, "loss": 5})
