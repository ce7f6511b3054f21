"""All subcommands of ``zo-lightning``, and what a shell is told of how they ended.

What is wrong with the words alone is said before anything heavy is imported, which takes seconds.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zo_lightning import help_page, noise
from zo_lightning.presets import configs_command, with_paths
from zo_lightning.user_errors import DISK, UserError
from zo_lightning.words import OF_LIGHTNING, OTHERS, check_command, check_options

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def main(args: list[str] | None = None) -> int:
    """Run a command line; return its exit code: 0, 1 where a run failed, 2 where it was not begun."""
    noise.leave_out()
    threading.excepthook = _leave_disk_to_main
    words = sys.argv[1:] if args is None else args
    if "" not in sys.path and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script does not look there, unlike `python -m`
    try:
        return _run(words)
    except UserError as error:
        return _fail(error, 2)
    except BrokenPipeError:  # `| head` has seen enough; what Python would still write goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in DISK:
            raise
        return _fail(OSError(f"{error.strerror}{f': {error.filename!r}' if error.filename else ''}"), 1)
    except (Exception, SystemExit) as error:
        if type(error) is SystemExit:  # a parser has said what there is to say
            raise
        from zo_lightning.cli import exit_code_of  # whatever could raise it has imported this

        if (code := exit_code_of(error)) is None:
            raise
        return code if isinstance(error, SystemExit) else _fail(error, code)


def _run(words: list[str]) -> int:
    check_command(words)
    if help_page.asked(words):
        print(help_page.page(words), flush=True)
        return 0
    if words[0] in _COMMANDS:
        return _COMMANDS[words[0]](words[1:])
    if words[0] in OF_LIGHTNING:
        check_options(words := with_paths(words))
    from zo_lightning.cli import CLI
    from zo_lightning.distributed import closing_group

    with closing_group():
        CLI(["--help" if word == help_page.ALL else word for word in words])
    return 0


def _study(words: list[str]) -> int:
    from zo_lightning.study.command import study

    return study(words, _fit)


def _report(words: list[str]) -> int:
    from zo_lightning.study.command import report

    return report(words, _fit)


def _fit(words: Sequence[str]) -> "Trainer":
    from zo_lightning.cli import fit

    return fit(words)


def _replay(words: list[str]) -> int:
    from zo_lightning.replay.command import replay_command

    return replay_command(words)


def _export(words: list[str]) -> int:
    from zo_lightning.replay.command import export_command

    return export_command(words)


def _tune(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(f"zo-lightning tune: {OTHERS['tune']}. Its options:\n\n{help_page.page(['fit'])}", flush=True)
        return 0
    check_options(with_paths(["fit", *words]))
    from zo_lightning.cli import Prepared
    from zo_lightning.tuning.command import tune_command

    return tune_command(words, Prepared)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "tune": _tune,
    "study": _study,
    "report": _report,
    "replay": _replay,
    "export": _export,
    "configs": configs_command,
}


def _fail(error: BaseException, code: int) -> int:
    text = re.sub(r"[^\s']{500,}", lambda word: f"{word[0][:100]}...", str(error))
    print(f"zo-lightning: error: {text}", file=sys.stderr)
    return code


def _leave_disk_to_main(failed: threading.ExceptHookArgs) -> None:
    """Print no traceback of a thread whose disk is full, such as TensorBoard's: its next write raises here."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in DISK):
        threading.__excepthook__(failed)
