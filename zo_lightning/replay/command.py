"""The subcommands ``replay`` and ``export``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zo_lightning.user_errors import CommandParser, UserError
from zo_lightning.words import OTHERS

if TYPE_CHECKING:
    from torch import Tensor


def replay_command(words: list[str]) -> int:
    """Run the command line of ``replay``; return its exit code.

    Raises:
        UserError: the run has no log, or cannot be replayed to that step; nothing has been written.
    """
    parser = CommandParser(prog="zo-lightning replay", description=OTHERS["replay"].capitalize() + ".")
    parser.add_argument("run", type=Path, help="a run's folder, or a file that `export` wrote")
    parser.add_argument("--to", type=int, metavar="STEP", help="optimizer steps done; default: all that were logged")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the weights are written: .safetensors, or .ckpt for --init_from; default: none, only replay",
    )
    parser.add_argument("--trust", action="store_true", help="import the net's class that the file names")
    options = parser.parse_args(words)
    suffixes = (".safetensors", ".ckpt")
    if options.out is not None and options.out.suffix not in suffixes:
        raise UserError(f"--out '{options.out}' must end in {' or '.join(suffixes)}")
    from safetensors import SafetensorError  # slow to import, as all of the following
    from tqdm import tqdm

    from zo_lightning.replay.archive import Opened
    from zo_lightning.replay.rebuild import STEPS, rebuild, trajectory_folder
    from zo_lightning.replay.start import whole
    from zo_lightning.step_log import unread

    try:
        with Opened(options.run, options.trust) as folder:
            total = options.to if options.to is not None else _steps(folder)
            with tqdm(total=total, unit="step", desc="replay", disable=None) as bar:
                rebuilt = rebuild(folder, options.to, lambda step: bar.update(step - bar.n))
            torn = unread(trajectory_folder(folder) / STEPS) if options.to is None else 0
    except (ValueError, OSError) as error:  # CannotReplay, and what a damaged log is
        raise UserError(str(error)) from error
    checked = "" if rebuilt.checked is None else f", equal to the run's own at step {rebuilt.checked:,}"
    print(f"The weights after {rebuilt.step:,} steps are rebuilt{checked}.")
    if torn:
        what = f"the log is torn or damaged after step {rebuilt.step:,}: {torn:,} bytes are left out"
        print(f"zo-lightning: warning: {what}", file=sys.stderr)
    if options.out is not None:
        try:
            whole(options.out, lambda path: _write(path, options.out.suffix, rebuilt.tensors))
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--out '{options.out}' cannot be written: {reason}") from error
        print(f"They are in {options.out}.")
    return 0


def export_command(words: list[str]) -> int:
    """Run the command line of ``export``; return its exit code.

    Raises:
        UserError: the run has no log, or the file cannot be written.
    """
    parser = CommandParser(prog="zo-lightning export", description=OTHERS["export"].capitalize() + ".")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: <run's name>.zorun in the working directory")
    parser.add_argument("--weights", action="store_true", help="the start's weights too, where a seed would make them")
    options = parser.parse_args(words)
    from zo_lightning.replay.archive import export
    from zo_lightning.replay.start import CannotReplay

    out = options.out or Path(f"{options.run.resolve().name}.zorun")
    try:
        size = export(options.run, out, options.weights)
    except (CannotReplay, OSError) as error:
        raise UserError(str(error)) from error
    print(f"{out}: {size / 1000:,.1f} kB. Its weights at any step: zo-lightning replay {out} --to STEP --out FILE")
    return 0


def _steps(run: Path) -> int:
    from zo_lightning.replay.rebuild import STEPS, trajectory_folder
    from zo_lightning.step_log import Step, read_steps

    records = read_steps(trajectory_folder(run) / STEPS)
    return sum(isinstance(record, Step) and record.stepped for record in records)


def _write(path: Path, suffix: str, tensors: "dict[str, Tensor]") -> None:
    import torch
    from safetensors.torch import save_file

    from zo_lightning.replay.start import contiguous

    if suffix == ".safetensors":
        save_file(contiguous(tensors), path)
    else:
        torch.save({"state_dict": tensors}, path)
