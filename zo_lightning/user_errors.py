"""What goes wrong on a command line, to say in one line; nothing heavy is imported."""

import argparse
import errno
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

_DISK = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "ENAMETOOLONG")
DISK = {getattr(errno, name) for name in _DISK}
"""What a full disk, a read-only one or a folder of somebody else's is to the system: no bug, so no traceback."""

ELSEWHERE_CALLED = {
    "epochs": "max_epochs",
    "gpus": "devices",
    "learning_rate": "lr",
    "num_epochs": "max_epochs",
    "num_steps": "max_steps",
    "q": "samples",
    "steps": "max_steps",
}
"""What other libraries call options of ours."""


class UserError(Exception):
    """A mistake in the command line, a configuration or the files it names: one or two lines, no traceback."""


class CommandParser(argparse.ArgumentParser):
    """The parser of a subcommand that is not Lightning's: mistakes are raised as ``UserError``."""

    def error(self, message: str) -> NoReturn:
        """Raise ``UserError``."""
        raise UserError(message)


def nearest(name: str, names: Iterable[str]) -> str:
    """``" (did you mean fit?)"``, or nothing where no name is like it.

    Of dotted names the last part may be one that other libraries use for the same thing.
    """
    by_lower = {candidate.lower(): candidate for candidate in names}
    beginning, dot, last = name.lower().rpartition(".")
    word = f"{beginning}{dot}{ELSEWHERE_CALLED.get(last, last)}"
    like = [word] if word in by_lower else get_close_matches(word, by_lower, n=1, cutoff=0.5)
    return f" (did you mean {by_lower[like[0]]}?)" if like else ""


def nearest_option(name: str, options: Iterable[str]) -> str:
    """The option most like one that was left out of all: ``--epochs`` is ``--trainer.max_epochs`` by its last part."""
    last = ELSEWHERE_CALLED.get(name.removeprefix("--").rpartition(".")[2])
    places = [option for option in options if last is not None and option.rpartition(".")[2] == last]
    return f" (did you mean {places[0]}?)" if len(places) == 1 else nearest(name, options)
