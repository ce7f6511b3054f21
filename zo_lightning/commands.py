"""All subcommands of ``zo-lightning``, and what a shell is told of how they ended."""

import logging
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from zo_lightning.cli import CLI, COMMANDS, Prepared, fit
from zo_lightning.cli_errors import DISK, UserError, nearest
from zo_lightning.distributed import ProcessLost, WeightsDiverged, closing_group, tells_of_loss
from zo_lightning.modules import TrainingDiverged
from zo_lightning.presets import configs_command
from zo_lightning.replay.command import export_command, replay_command
from zo_lightning.study.command import report, study
from zo_lightning.tuning.command import tune_command

_COMMANDS = {
    "tune": lambda words: tune_command(words, Prepared),
    "study": lambda words: study(words, fit),
    "report": lambda words: report(words, fit),
    "replay": replay_command,
    "export": export_command,
    "configs": configs_command,
}


def main(args: list[str] | None = None) -> int:
    """Run a command line; return its exit code: 0, 1 where a run failed, 2 where it was not begun."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_advertisement)
    threading.excepthook = _leave_disk_to_main
    words = sys.argv[1:] if args is None else args
    if "" not in sys.path and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script does not look there, unlike `python -m`
    try:
        if words and words[0] in _COMMANDS:
            return _COMMANDS[words[0]](words[1:])
        check_command(words)
        with closing_group():
            CLI(args)
    except UserError as error:
        return _fail(error, 2)
    except (TrainingDiverged, WeightsDiverged, ProcessLost, MisconfigurationException) as error:
        return _fail(error, 1)
    except RuntimeError as error:
        if not tells_of_loss(error):
            raise
        return _fail(error, 1)
    except BrokenPipeError:  # `| head` has seen enough; what Python would still write goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SIGTERMException as stop:
        return int(stop.code or 143)
    except OSError as error:
        if error.errno not in DISK:
            raise
        return _fail(OSError(f"{error.strerror}{f': {error.filename!r}' if error.filename else ''}"), 1)
    return 0


def check_command(words: Sequence[str]) -> None:
    """Raise UserError where a command line begins with no subcommand, and no option."""
    if words and (words[0].startswith("-") or words[0] in CLI.subcommands()):
        return
    known = (*CLI.subcommands(), *COMMANDS)
    problem = f"unknown command '{words[0]}'{nearest(words[0], known)}" if words else "a command is missing"
    raise UserError(f"{problem}; there are {', '.join(known)}")


def _fail(error: Exception, code: int) -> int:
    text = re.sub(r"[^\s']{500,}", lambda word: f"{word[0][:100]}...", str(error))
    print(f"zo-lightning: error: {text}", file=sys.stderr)
    return code


def _leave_disk_to_main(failed: threading.ExceptHookArgs) -> None:
    """Print no traceback of a thread whose disk is full, such as TensorBoard's: its next write raises here."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in DISK):
        threading.__excepthook__(failed)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
