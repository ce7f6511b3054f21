"""Checkpoints that are written whole or not at all, and read only where their checksums hold."""

import os
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric.plugins.io import CheckpointIO, TorchCheckpointIO


class DamagedCheckpoint(ValueError):
    """A file is no checkpoint, or not all of what was written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, ``Trainer(plugins=[AtomicCheckpointIO()])``, safe against whatever stops a run.

    A checkpoint is written beside its name, forced to the disk, and then renamed: under its name there is always a
    whole one, the new or the one before, also after a power failure or on a full disk. It is read only where the
    checksums (CRC-32) that PyTorch's zip format holds of every tensor are right; nothing is unpickled.

    Raises:
        DamagedCheckpoint: in ``load_checkpoint``.
        OSError: in ``save_checkpoint``; the file of that name is as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write all of a checkpoint, or nothing."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint whose checksums hold."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return load_checked(Path(path), map_location)


def with_atomic_checkpoints(options: Mapping[str, Any]) -> list[Any]:
    """The plugins among a trainer's options, and ``AtomicCheckpointIO``, unless something else writes checkpoints."""
    plugins = options.get("plugins")
    plugins = plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
    shards = any(name in str(options.get("strategy")).lower() for name in ("fsdp", "deepspeed", "xla", "modelparallel"))
    if shards or any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        return plugins
    return [*plugins, AtomicCheckpointIO()]


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let ``write`` fill a file that appears under its name when all of it is on the disk.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            failure = None
            try:
                write(file)
            except RuntimeError as error:  # torch's writer hides the reason, such as a full disk
                failure = error.__context__ if isinstance(error.__context__, OSError) else error
            if failure is not None:
                raise failure
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def load_checked(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The checkpoint in a file, on the CPU unless told otherwise. Nothing is unpickled.

    Raises:
        DamagedCheckpoint: the file is none, or its checksums do not hold.
        OSError: the file cannot be read.
    """
    check_whole(path)
    try:
        checkpoint: Any = torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen types for what is no checkpoint
        raise DamagedCheckpoint("is damaged or not a checkpoint") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise DamagedCheckpoint("holds no Lightning checkpoint: it has no state_dict")
    return checkpoint


def check_whole(path: Path) -> None:
    """Raise DamagedCheckpoint unless the checksums of all that a checkpoint's zip archive holds are right."""
    if not path.is_file():
        raise DamagedCheckpoint("is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # of a broken directory: struct's, zlib's and Unicode's errors beside BadZipFile
        raise DamagedCheckpoint("is damaged or not a checkpoint") from error
    if broken is not None:
        raise DamagedCheckpoint(f"is damaged: the checksum of '{broken}' in it is wrong")


def _sync_folder(folder: Path) -> None:
    """Let the new name survive a power failure; not every file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
