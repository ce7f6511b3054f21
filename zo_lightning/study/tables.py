"""The tables that a report writes, read back from files in which anything may stand by then."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from zo_lightning.user_errors import UserError

_TEXTS = ("method", "task", "data", "device", "layer")
_WHOLE = ("d", "seed", "epoch", "budget", "steps")


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
        UserError: it has other columns, a value that is none of its column's or is missing, two rows with the
            same keys, or a task with two sizes.
    """
    if not begins_with(path, columns):
        raise UserError(f"'{path}' is no such table: its first line is to be {','.join(columns)}")
    try:
        # By pandas' reader a method called "NA" would have no name, and a line that was cut the right length.
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = filter(None, csv.reader(file))
        if header != list(columns) or any(len(row) != len(columns) for row in rows):
            raise ValueError("a line has too few values, or too many")
        table = pd.DataFrame(rows, columns=header, dtype=str)
        for column in columns:
            if column in _TEXTS:
                if (table[column].str.strip() == "").any():
                    raise ValueError(f"a {column} has no name")
            elif column in _WHOLE:
                table[column] = table[column].astype(int)
            else:
                table[column] = table[column].replace("", "nan").astype(float)
    except (ValueError, csv.Error) as error:
        raise UserError(f"'{path}' is damaged: {' '.join(str(error).split())}") from error
    if table.duplicated(list(keys)).any():
        raise UserError(f"'{path}' is damaged: two rows have the same {', '.join(keys)}")
    sizes = table.groupby("task")["d"].nunique()
    if (sizes > 1).any():
        raise UserError(f"'{path}' is damaged: task '{sizes.idxmax()}' has more than one d")
    return table


def name_of(path: Path) -> str:
    """What to call a study of which only the table is known: as the file, or its folder where that is telling."""
    return path.resolve().parent.name if path.stem == "results" else path.stem
