"""The tables that a report writes, read back from files in which anything may stand by then."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from zo_lightning.study.folder import DECLARED, read_declaration
from zo_lightning.study.grid import Cell, Study
from zo_lightning.user_errors import UserError

RESULTS = "results.csv"
"""A report's table of all that the runs have brought."""

_TEXTS = ("method", "task", "data", "device", "layer")
_WHOLE = ("d", "seed", "epoch", "budget", "steps")
_TRUTHS = ("chosen",)


def begins_with(path: Path, columns: Sequence[str]) -> bool:
    """Whether these are a file's first columns."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:  # some programs put a mark before the first letter
        return tuple(file.readline().strip().split(","))[: len(columns)] == tuple(columns)


def read_table(path: Path, columns: Sequence[str], keys: Sequence[str]) -> pd.DataFrame:
    """Read a table with just these columns: names as text, numbers to the last bit.

    Args:
        path: a CSV file.
        columns: in their order.
        keys: columns of which no two rows have the same values.

    Raises:
        UserError: it has other columns, a value that is none of its column's or is missing, or two rows with the same
            keys.
    """
    # By pandas' reader a method called "NA" would have no name, and a line that was cut the right length.
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
        if header != list(columns):
            raise UserError(f"'{path}': its first line is to be {','.join(columns)}")
        for place, row in enumerate(rows, 2):
            if len(row) != len(columns):
                raise ValueError(f"row {place} has {len(row)} values, not {len(columns)}")
        table = pd.DataFrame(rows, columns=header, dtype=str)
        for column in columns:
            if column in _TEXTS:
                if (table[column].str.strip() == "").any():
                    raise ValueError(f"a {column} is empty")
            elif column in _WHOLE:
                table[column] = table[column].astype(int)
            elif column in _TRUTHS:
                if not table[column].isin(["True", "False"]).all():
                    raise ValueError(f"{column} is to be True or False")
                table[column] = table[column] == "True"
            else:  # by Python's own conversion, exact
                table[column] = table[column].replace("", "nan").astype(float)
    except (ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"'{path}' is damaged: {' '.join(str(error).split())}") from error
    if table.duplicated(list(keys)).any():
        raise UserError(f"'{path}' is damaged: two rows have the same {', '.join(keys)}")
    return table


def name_of(path: Path) -> str:
    """What to call a study of which only the table is known: as the file, or where that is `results` its folder."""
    return (path.resolve().parent.name if path.stem == "results" else path.stem) or path.stem


def declared_beside(path: Path) -> Study | None:
    """The declaration that a report has put beside its ``results.csv``, if there is one.

    Raises:
        UserError: it is damaged.
    """
    is_there = path.name == RESULTS and (path.parent / DECLARED).is_file()
    return read_declaration(path.parent, DECLARED) if is_there else None


def missing_cells(path: Path, table: pd.DataFrame, study: Study) -> list[Cell]:
    """The study's cells that a table in a file lacks.

    Raises:
        UserError: the table has others.
    """
    keys = [key for key in ("method", "task", "seed", "budget") if key in table]
    there = set(table[keys].itertuples(index=False, name=None))
    cells = {tuple(getattr(cell, key) for key in keys): cell for cell in study.cells()}
    if bool(study.budgets) != ("budget" in keys) or not there <= cells.keys():
        raise UserError(f"'{path}' has runs that are none of the study's in {DECLARED} beside it: take that away")
    return [cell for key, cell in cells.items() if key not in there]
