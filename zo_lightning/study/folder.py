"""A study's folder: whose it is, which of its runs are complete, and files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import yaml

from zo_lightning.locks import locked
from zo_lightning.study.declared import read_yaml
from zo_lightning.study.grid import Cell, Study, first_difference
from zo_lightning.user_errors import UserError

DECLARATION = "study.yaml"
DECLARED = "declaration.yaml"  # the same, beside the tables of a report
FAILED = "error.txt"
FINISHED = "finished.yaml"  # a run's folder holds it when, and only when, the run is complete
METRICS = "metrics.csv"

_T = TypeVar("_T")


def claim(study: Study, folder: Path) -> None:
    """Make a folder the study's own, or see that it is.

    A study may have grown since: new methods, tasks, budgets and seeds are cells that have not been run.

    Raises:
        UserError: something else is there, a study that is running, or one in which a cell has another configuration;
            nothing is changed.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; the study needs a folder of that name")
    declared = folder / DECLARATION
    # What begins with a dot may be our own: a study that was stopped while it claimed the folder.
    if folder.exists() and not declared.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"'{folder}' holds something that is no study: choose another name, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    with running(folder):
        if declared.exists():
            _check_same(read_declaration(folder), study, folder)
        write_whole(declared, yaml.safe_dump(study.declaration(), sort_keys=False))


def read_declaration(folder: Path, name: str = DECLARATION) -> Study:
    """The study to which a folder belongs.

    Raises:
        UserError: the folder holds none, or it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' does not exist" if not folder.exists() else f"'{folder}' is no folder")
    if not (folder / name).is_file():
        raise UserError(f"'{folder}' holds no study: it has no {name}")
    try:
        study = Study.from_declaration(read_yaml(folder / name))
        if study.reference not in study.methods:
            raise KeyError(study.reference)
        _ = study.cells(), study.trial_cells()  # which a damaged one cannot make
        return study
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{folder / name}' is damaged: {error!r}") from error


def is_finished(folder: Path, cell: Cell) -> bool:
    """Whether a cell's run is complete."""
    return seconds_of(folder, cell) is not None


def seconds_of(folder: Path, cell: Cell) -> float | None:
    """How long a cell's complete run took; None where it is not complete, or what a crash has left of it is broken."""
    run = folder / cell.folder
    try:
        about = yaml.safe_load((run / FINISHED).read_text(encoding="utf-8"))
        # A trial that diverged at its first steps has no metrics.
        whole = "parameters" in about and (about.get("reached") == {} or (run / METRICS).stat().st_size > 0)
        return float(about["seconds"]) if whole else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return None


def read_finished(study: Study, folder: Path, read: Callable[[Cell, Path], _T]) -> tuple[list[_T], dict[Cell, str]]:
    """What ``read`` finds of each complete run in its folder; and the cells of which it finds nothing, with the reason.

    Raises:
        UserError: it finds nothing at all.
    """
    found, missing = [], {}
    for cell in study.cells():
        run = folder / cell.folder
        if not is_finished(folder, cell):
            missing[cell] = "failed" if (run / FAILED).is_file() else "not finished" if run.exists() else "not begun"
            continue
        try:
            found.append(read(cell, run))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            missing[cell] = f"damaged ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
    if not found:
        reasons = ", ".join(sorted(set(missing.values())))
        raise UserError(f"'{folder}': none of its {len(missing)} cells is finished ({reasons})")
    return found, missing


def running(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold a study's folder as the one process that runs it.

    Raises:
        UserError: another process does.
    """
    return locked(folder / ".lock", f"another process is running the study in '{folder}'")


def sync_metrics(path: Path) -> None:
    """See that a run's metrics are on the disk before the run is called finished."""
    if not path.exists() or path.stat().st_size == 0:
        raise UserError(f"the run has written no {path.name}: has it trained an epoch?")
    with path.open("a") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write all of a file, or nothing, even where the machine stops in between."""
    staged = path.with_name(f".{path.name}.new")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _check_same(there: Study, here: Study, folder: Path) -> None:
    advice = "choose another name, or remove the folder"
    if there.snapshots != here.snapshots:
        raise UserError(
            f"'{folder}' belongs to a study with snapshots: {there.snapshots}, not {here.snapshots}: {advice}"
        )
    if _split(there.options) != _split(here.options):
        raise UserError(
            f"'{folder}' belongs to a study with the options '{' '.join(there.options)}', "
            f"not '{' '.join(here.options)}': {advice}"
        )
    if where := first_difference(_choice(there), {**_choice(here), **_rates(there, here)}):
        raise UserError(f"'{folder}' belongs to a study that chose its learning rates otherwise: {where}; {advice}")
    new = {cell.folder: cell for cell in here.cells()}
    for old in there.cells():
        cell = new.get(old.folder)
        if cell is None:
            raise UserError(f"'{folder}' belongs to a study with a cell that this one lacks ({old}): {advice}")
        for there_and_here in zip_longest(old.overlays, cell.overlays, fillvalue={}):
            if where := first_difference(*there_and_here):
                raise UserError(f"'{folder}' belongs to a study with another configuration of {old}: {where}; {advice}")


def _choice(study: Study) -> dict[str, Any]:
    """How learning rates are chosen, and among which."""
    rates = {name: list(method.learning_rates) for name, method in study.methods.items()}
    return {"trials": study.declaration()["trials"], "learning_rates": rates}


def _rates(there: Study, here: Study) -> dict[str, Any]:
    """Those of ``here``, of the methods that ``there`` has: a study may grow."""
    return {"learning_rates": {n: list(m.learning_rates) for n, m in here.methods.items() if n in there.methods}}


def _split(options: Sequence[str]) -> list[str]:
    """Words of a command line, of which --name=value and --name value are the same."""
    return [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
