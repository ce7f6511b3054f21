"""The folders of runs: which one a run writes to, what is there already, and where a checkpoint is found."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from zo_lightning.checkpoint_io import DamagedCheckpoint, load_checked
from zo_lightning.curves import EVENTS, METRICS
from zo_lightning.locks import locked
from zo_lightning.user_errors import UserError

CHECKPOINTS = "checkpoints"


def find_checkpoint(trainer: Trainer, word: str, *, to_train: bool) -> Path:
    """The file that ``--ckpt_path last`` or ``best`` means: of the trainer's own folder, or of the newest run.

    A damaged file is passed over for the newest one that is whole.

    Args:
        trainer: its loggers say where runs are.
        word: ``"last"`` or ``"best"``.
        to_train: leave out what holds weights alone.

    Raises:
        UserError: there is none.
    """
    folders = _checkpoint_folders(trainer)
    found = [(folder, sorted(folder.glob("*.ckpt"), key=_time, reverse=True)) for folder in folders]
    named = [(folder, files) for folder, files in found if any(file.name.startswith(word) for file in files)]
    if not named:
        where = f"'{folders[0]}'" if len(folders) == 1 else f"any run in '{_root(trainer)}'"
        raise UserError(f"ckpt_path {word}: there is no {word}.ckpt in {where}")
    _, files = max(named, key=lambda one: max(_time(file) for file in one[1] if file.name.startswith(word)))
    files.sort(key=lambda file: not file.name.startswith(word))  # of equals the newest comes first
    damaged: list[str] = []
    for file in files:
        try:
            checkpoint = load_checked(file)
        except DamagedCheckpoint as error:
            damaged.append(f"'{file}' {error}")
            continue
        if to_train and "optimizer_states" not in checkpoint and len(files) > 1:
            continue
        for text in damaged:
            _warn(f"{text}: '{file}' of step {checkpoint.get('global_step')} is taken in its place")
        return file
    raise UserError(f"ckpt_path {word}: {'; '.join(damaged) or 'there are weights alone'}")


def settle_in(trainer: Trainer, checkpoint: Path | None, *, is_last: bool) -> None:
    """Choose the folder of a run that is to begin, or to go on from ``checkpoint``: nothing is written yet.

    A run whose folder has no name of its own goes on where it was, if it goes on from where it stopped (``is_last``);
    else it gets a new one, and the old one keeps what came after the checkpoint.

    Raises:
        UserError: the folder holds another run.
    """
    if checkpoint is not None and is_last:
        for logger in _unnamed(trainer):
            if checkpoint.resolve().parent.parent.parent == Path(logger.root_dir).resolve():
                number = checkpoint.resolve().parent.parent.name.removeprefix("version_")
                logger._version = int(number) if number.isdigit() else None
    if _is_first():
        for folder in named_folders(trainer):
            goes_on_here = checkpoint is not None and folder.resolve() in checkpoint.resolve().parents
            if not goes_on_here and _holds_run(folder):
                raise UserError(
                    f"'{folder}' holds another run: go on with that one by --ckpt_path last, or write elsewhere, for "
                    "example with --trainer.logger true"
                )


def named_folders(trainer: Trainer) -> list[Path]:
    """The folders that the configuration names; others are the next free version, known when the run begins."""
    unnamed = _unnamed(trainer)
    return list(dict.fromkeys(Path(logger.log_dir) for logger in _local(trainer) if logger not in unnamed))


@contextmanager
def own_folder(trainer: Trainer) -> Iterator[None]:
    """Claim the run's folder: the next free version, made by no one else; hold it against a second process.

    Raises:
        UserError: another process trains in it.
    """
    if not _is_first() or not _local(trainer):
        yield
        return
    claimed: dict[str, int] = {}
    for logger in _unnamed(trainer):
        root = str(Path(logger.root_dir).resolve())
        logger._version = claimed[root] if root in claimed else _claim(logger)
        claimed[root] = logger._version
    folder = Path(_local(trainer)[0].log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", f"another process is training in '{folder}': wait for it, or write elsewhere"):
        yield


def _claim(logger: Any) -> int:
    version = logger._get_next_version()
    while True:
        try:
            Path(logger.root_dir, f"version_{version}").mkdir(parents=True)
        except FileExistsError:
            version += 1
        else:
            return version


def _checkpoint_folders(trainer: Trainer) -> list[Path]:
    named = getattr(trainer.checkpoint_callback, "dirpath", None)
    if named is not None:
        return [Path(named)]
    if not (loggers := _local(trainer)):
        return [Path(trainer.default_root_dir, CHECKPOINTS)]
    if loggers[0] not in _unnamed(trainer):
        return [Path(loggers[0].log_dir, CHECKPOINTS)]
    return sorted(Path(loggers[0].root_dir).glob(f"version_*/{CHECKPOINTS}"))


def _root(trainer: Trainer) -> Path:
    return Path(_local(trainer)[0].root_dir)


def _local(trainer: Trainer) -> list[Any]:
    """The loggers that write into a folder of the run."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger | CSVLogger)]


def _unnamed(trainer: Trainer) -> list[Any]:
    """Those that count versions: which one is not known before it is asked for."""
    return [logger for logger in _local(trainer) if logger._version is None]


def _holds_run(folder: Path) -> bool:
    patterns = (EVENTS, METRICS, "config.yaml", f"{CHECKPOINTS}/*.ckpt")
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _is_first() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _warn(message: str) -> None:
    if _is_first():
        print(f"zo-lightning: warning: {message}", file=sys.stderr)
