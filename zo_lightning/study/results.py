"""The table of a study's results, from its runs or from a file, and the published numbers to set beside them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from zo_lightning.study.devices import device_of
from zo_lightning.study.folder import FINISHED, read_declaration, read_finished
from zo_lightning.study.grid import Cell, Method, Study
from zo_lightning.study.tables import declared_beside, missing_cells, name_of, read_table
from zo_lightning.user_errors import UserError

PUBLISHED = Path(__file__).with_name("published.csv")
# What the published study calls its methods, and what they are called here.
_PUBLISHED_NAMES = {"AdaMM": "FO-AdaMM", "ZO-AdaMM": "ZO-AdaMM"}
_METRICS = {
    "train/loss_epoch": "train_loss",
    "val/loss": "val_loss",
    "val/acc": "val_accuracy",
    "epoch/forward_passes": "forward_passes",
    "epoch/flops": "flops",
    "epoch/seconds": "epoch_seconds",
}
COLUMNS = ("method", "task", "data", "d", "seed", "epoch", *_METRICS.values(), "seconds", "device")


@dataclass(frozen=True)
class Results:
    """What a study has brought so far.

    Attributes:
        study: its declaration; of a table without one, the names in it, the first method the reference.
        folder: of the study; of a table in a file, the file's, which need not hold runs.
        table: one row per finished cell and epoch, with `COLUMNS`. ``data`` is their class, ``epoch`` counts from 1,
            ``d`` is the number of weights, ``forward_passes`` (of a batch), ``flops`` (floating-point operations, NaN
            where a run has not counted them) and ``seconds`` (of training steps) add up from the beginning, and
            ``device`` is what the run was trained on.
        missing: cells without a run, and why.
        published: the published numbers, or None where the study's data are others.
    """

    study: Study
    folder: Path
    table: pd.DataFrame
    missing: dict[Cell, str]
    published: pd.DataFrame | None

    @cached_property
    def cells(self) -> list[Cell]:
        """The finished cells."""
        return [cell for cell in self.study.cells() if cell not in self.missing]

    @cached_property
    def diverged(self) -> list[Cell]:
        """Finished cells whose last validation loss is NaN or infinite."""
        last = self.table.groupby(["method", "task", "seed"])["val_loss"].last(skipna=False)
        return [cell for cell in self.cells if not np.isfinite(last[cell.method, cell.task, cell.seed])]

    @cached_property
    def methods(self) -> list[str]:
        """Methods with a finished cell, the reference first."""
        found = [method for method in self.study.methods if method in set(self.table["method"])]
        return sorted(found, key=lambda method: method != self.study.reference)

    @property
    def others(self) -> list[str]:
        """Methods that are compared with the reference."""
        return [method for method in self.methods if method != self.study.reference]

    @cached_property
    def tasks(self) -> dict[str, int]:
        """Sizes d by task, smallest first."""
        sizes = dict(zip(self.table["task"], self.table["d"], strict=True))
        return dict(sorted(sizes.items(), key=lambda item: item[1]))


def read_results(source: Path) -> Results:
    """Read the finished runs of a study's folder, or the table of them that a report has written.

    The declaration that the report has put beside the table says what is compared with what; without it the first
    method is the reference. Nothing is trained and nothing is written.

    Raises:
        UserError: the folder holds no study, or one without a finished cell; or the file is no such table.
    """
    return _from_file(source) if source.is_file() else _from_folder(source)


def _from_file(path: Path) -> Results:
    table = read_table(path, COLUMNS, ("method", "task", "seed", "epoch"))
    if table.empty:
        raise UserError(f"'{path}' has no rows")
    if (table["epoch"] < 1).any():
        raise UserError(f"'{path}' is damaged: epochs count from 1")
    in_order = table.groupby(["method", "task", "seed"], sort=False).ngroup()
    table = table.assign(run=in_order).sort_values(["run", "epoch"], ignore_index=True).drop(columns="run")
    sizes = table.groupby("task")["d"].nunique()
    if (sizes > 1).any():
        raise UserError(f"'{path}' is damaged: task '{sizes.idxmax()}' has more than one d")
    study = declared_beside(path) or _named_in(table, name_of(path))
    missing = dict.fromkeys(missing_cells(path, table, study), "not in the table")
    return Results(study, path.parent, table, missing, _published_for(table))


def _named_in(table: pd.DataFrame, name: str) -> Study:
    methods, tasks, seeds = (list(dict.fromkeys(table[column])) for column in ("method", "task", "seed"))
    return Study(
        name=name,
        common=(),
        methods=dict.fromkeys(methods, Method(())),
        tasks=dict.fromkeys(tasks, ()),
        seeds=tuple(seeds),
        reference=methods[0],
    )


def _from_folder(folder: Path) -> Results:
    study = read_declaration(folder)
    tables, missing = read_finished(study, folder, _read_run)
    table = pd.concat(tables, ignore_index=True)
    return Results(study, folder, table, missing, _published_for(table))


def published() -> pd.DataFrame:
    """The published means and standard deviations over 10 runs, by ``method`` (named as here), ``d`` and ``epoch``.

    Source: *AdaMM vs ZO-AdaMM: convergence analysis and minima shape*, EPFL CS-439 mini-project, 2022. The published
    code had defects (its perturbation was never undone, among others); the numbers are as they were published.
    """
    table = pd.read_csv(PUBLISHED, comment="#")
    return table.assign(method=table["method"].map(_PUBLISHED_NAMES))


def _published_for(table: pd.DataFrame) -> pd.DataFrame | None:
    return published() if set(table["data"]) == {"MNIST"} else None


def published_at(results: Results, method: str, d: int) -> pd.DataFrame:
    """The published curve of a method at a size, within 1 %, as long as the study's runs; empty where there is none."""
    table = results.published
    if table is None:
        return pd.DataFrame(columns=["epoch"])
    is_there = (table["method"] == method) & ((table["d"] - d).abs() <= d / 100)
    return table[is_there & (table["epoch"] <= results.table["epoch"].max())]


def write_results(results: Results, path: Path) -> None:
    """Write the table as CSV, numbers to the last bit."""
    results.table.to_csv(path, index=False)


def _read_run(cell: Cell, run: Path) -> pd.DataFrame:
    about: dict[str, Any] = yaml.safe_load((run / FINISHED).read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    log = pd.read_csv(run / "metrics.csv", dtype=str).astype(float)  # Python's own conversion: exact to the last bit
    by_epoch = log[log["epoch"].notna()].groupby("epoch").last()  # of each column the last value
    table = by_epoch.reindex(columns=list(_METRICS)).rename(columns=_METRICS).dropna(subset=["val_accuracy"])
    if table.empty:
        raise ValueError("no validation in its metrics.csv")
    return table.reset_index().assign(
        epoch=lambda t: t["epoch"].astype(int) + 1,
        method=cell.method,
        task=cell.task,
        data=config["data"]["class_path"].rpartition(".")[2],
        d=int(about["parameters"]),
        seed=cell.seed,
        seconds=by_epoch["epoch/seconds"].cumsum().reindex(table.index).to_numpy(),
        device=device_of(about),
    )[list(COLUMNS)]
