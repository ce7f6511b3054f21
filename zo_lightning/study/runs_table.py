"""The table of runs with given budgets: read from a study's folder, or from the CSV file that a report has written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from zo_lightning.study.folder import is_finished, read_declaration
from zo_lightning.study.grid import Study
from zo_lightning.study.reached import choose_rates, read_reached
from zo_lightning.study.runs import FAILED
from zo_lightning.study.tables import declared_beside, missing_cells, name_of, read_table
from zo_lightning.user_errors import UserError

_NUMBERS = ("budget", "seed", "d", "accuracy", "loss", "flops", "passes", "steps", "seconds", "lr")
COLUMNS = ("task", "method", *_NUMBERS, "device")
TRIALS = ("task", "method", "lr", "accuracy", "loss", "chosen")


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
        missing: runs that there should be, and why they are not there.
    """

    name: str
    reference: str
    table: pd.DataFrame
    trials: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(TRIALS)))
    study: Study | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """In their order in the table."""
        return list(dict.fromkeys(self.table["method"]))

    @property
    def tasks(self) -> list[str]:
        """In their order in the table."""
        return list(dict.fromkeys(self.table["task"]))


def read_runs(source: Path) -> Runs:
    """Read a study's folder, or a CSV file of such runs.

    Raises:
        UserError: there is no finished run in it, or it is something else.
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
    study = declared_beside(path)
    if study is None:
        return Runs(name_of(path), str(table["method"].iloc[0]), table)
    missing = {str(cell): "not in the table" for cell in missing_cells(path, table, study)}
    return Runs(study.name, study.reference, table, study=study, missing=missing)


def _from_folder(folder: Path) -> Runs:
    study = read_declaration(folder)
    rows, missing = [], {}
    for cell in study.cells():
        run = folder / cell.folder
        if not is_finished(folder, cell):
            missing[str(cell)] = (
                "failed" if (run / FAILED).is_file() else "not finished" if run.exists() else "not begun"
            )
            continue
        try:
            rows.append(_row({"task": cell.task, "method": cell.method, "budget": cell.budget, "seed": cell.seed}, run))
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            missing[str(cell)] = f"damaged ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
    if not rows:
        reasons = ", ".join(sorted(set(missing.values())))
        raise UserError(f"'{folder}': none of its {len(missing)} cells is finished ({reasons})")
    digits = {"accuracy": 5, "loss": 5, "passes": 2, "seconds": 2}  # that mean something: the table is to be read
    table = pd.DataFrame(rows, columns=list(COLUMNS)).round(digits)
    order = {"task": list(study.tasks), "method": list(study.methods)}
    table = table.sort_values(
        ["task", "method", "budget", "seed"],
        key=lambda column: column.map(order[str(column.name)].index) if column.name in order else column,
        ignore_index=True,
    )
    return Runs(study.name, study.reference, table, _trials(study, folder), study, missing)


def _row(key: dict[str, Any], run: Path) -> dict[str, Any]:
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
                    "lr": cell.lr,
                    "accuracy": np.nan if accuracy is None else accuracy,
                    "loss": reached.get("loss", np.nan),
                    "chosen": chosen.get((cell.method, cell.task)) == cell.lr,
                }
            )
    return pd.DataFrame(rows, columns=list(TRIALS)).round({"accuracy": 5, "loss": 5})
