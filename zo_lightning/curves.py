"""The curves of a run on disk, TensorBoard's events and ``metrics.csv``: how far they go, and their continuation.

A run that goes on from a checkpoint draws again what came after it. So a checkpoint notes how far the files go, and
they are cut there before training goes on: no point is drawn twice, none is missing.
"""

import csv
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

EVENTS = "events.out.tfevents.*"
METRICS = "metrics.csv"

Marks = list[dict[str, Any]]


def mark(loggers: Iterable[Logger]) -> Marks:
    """Write out what the loggers hold, and note how far each one's files go: bytes of events, rows of a table."""
    marks = []
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
            folder = Path(logger.log_dir)
            sizes = {path.name: path.stat().st_size for path in folder.glob(EVENTS)}
            marks.append({"kind": "events", "folder": str(folder.resolve()), "sizes": sizes})
        elif isinstance(logger, CSVLogger):
            logger.save()
            folder = Path(logger.log_dir)
            marks.append({"kind": "rows", "folder": str(folder.resolve()), "rows": len(_read(folder / METRICS))})
    return marks


def continue_curves(loggers: Iterable[Logger], marks: Marks, run: Path | None = None) -> None:
    """Let the loggers' folders hold the curves up to where they were marked; called before a logger has written.

    In the same folder what came later is cut off; into another one the curves are copied.

    Args:
        loggers: of the run that goes on.
        marks: of its checkpoint.
        run: the folder in which the checkpoint lies now, should the run have been moved.
    """
    left = list(marks)
    for logger in loggers:
        kind = {TensorBoardLogger: "events", CSVLogger: "rows"}.get(type(logger))
        noted = next((one for one in left if one["kind"] == kind), None)
        if noted is None:
            continue
        left.remove(noted)
        folder = Path(logger.log_dir or ".")
        recorded = Path(noted["folder"])
        earlier = run if run is not None and not recorded.is_dir() else recorded
        if isinstance(logger, TensorBoardLogger):
            _continue_events(folder, earlier, noted["sizes"])
        elif isinstance(logger, CSVLogger):
            rows = _read(earlier / METRICS)[: noted["rows"]]
            if rows:  # the logger deletes the file that it finds, and then holds rows until it writes them
                logger.experiment.metrics[:0] = rows
                logger.save()


def _continue_events(folder: Path, earlier: Path, sizes: dict[str, int]) -> None:
    if folder.resolve() == earlier.resolve():
        for path in folder.glob(EVENTS):
            if path.name not in sizes:
                path.unlink()
            elif path.stat().st_size > sizes[path.name]:
                os.truncate(path, sizes[path.name])
        return
    for name, size in sizes.items():
        # Names come from a checkpoint, which may be anybody's.
        if fnmatch(name, EVENTS) and Path(name).name == name and (earlier / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(earlier / name, folder / name)
            os.truncate(folder / name, min(size, (folder / name).stat().st_size))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: value for name, value in row.items() if name and value} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
