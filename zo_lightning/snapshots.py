"""The weights of a run over time: safetensors files in one folder, one per moment, and the reader of them."""

import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FOLDER = "snapshots"
_NAME = re.compile(r"epoch=(\d+)(\+?)-step=(\d+)\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """All weights at one moment of a run, on disk.

    Attributes:
        path: the file, which is read by ``load`` only.
        step: optimizer steps done.
        epoch: epochs completed; 0 at initialisation.
        within_epoch: some batches of the next epoch are done too.
    """

    path: Path
    step: int
    epoch: int
    within_epoch: bool = False

    def load(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The weights by name, on the CPU, all of them or those of ``names``. Nothing is unpickled.

        Raises:
            ValueError: the file is damaged, or lacks one of the names.
        """
        try:
            return read_tensors(self.path, names)
        except ValueError as error:
            raise ValueError(f"snapshot '{self.path}': {error}") from error

    def shapes(self) -> dict[str, Tensor]:
        """Empty tensors of the weights' shapes, which the head of the file says: a file cut short is noticed.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in list(file.keys())}
                return {name: torch.empty(one.get_shape(), device="meta") for name, one in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"snapshot '{self.path}': {error}") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, with the checksum (CRC-32) of each in the file's metadata."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={name: str(_checksum(tensor)) for name, tensor in plain.items()})


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read what ``write_tensors`` wrote, or another file of safetensors, which has no checksums to compare.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or lacks one of the names.
    """
    try:
        with safe_open(path, framework="pt") as file:
            checksums = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, tensor in tensors.items():
        if checksums and checksums.get(name) != str(_checksum(tensor)):
            raise ValueError(f"the checksum of '{name}' in it is wrong")
    return tensors


def read_snapshots(run: str | Path) -> list[Snapshot]:
    """The snapshots of a run in the order of their steps, without reading their weights.

    Args:
        run: the folder of the run, or its ``snapshots``.

    Raises:
        FileNotFoundError: there is no such folder, or no snapshot in it.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"run '{run}' does not exist")
    found = _in(run / FOLDER) or _in(run)
    if not found:
        raise FileNotFoundError(f"run '{run}' has no weight snapshots: train it with the callback WeightSnapshots")
    return found


def snapshots_by_epoch(run: str | Path) -> dict[int, Snapshot]:
    """The snapshots of a run at the end of epochs, 0 for its start, by epoch; none where it has none."""
    try:
        return {snapshot.epoch: snapshot for snapshot in read_snapshots(run) if not snapshot.within_epoch}
    except FileNotFoundError:
        return {}


def write_snapshot(
    folder: Path, weights: Mapping[str, Tensor], step: int, epoch: int, within_epoch: bool = False
) -> Snapshot:
    """Write the weights of one moment. The file appears whole or not at all; one of the same step is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch={epoch:05d}{'+' if within_epoch else ''}-step={step:09d}.safetensors"
    beside = path.with_suffix(f".{os.getpid()}.partial")
    try:
        write_tensors(weights, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    for other in _in(folder):
        if other.step == step and other.path != path:
            other.path.unlink()
    return Snapshot(path, step, epoch, within_epoch)


def continue_snapshots(folder: Path, earlier: Path, steps: Iterable[int]) -> set[int]:
    """Let ``folder`` hold the history of a run up to a checkpoint: the snapshots of ``earlier`` with the given steps.

    In the same folder what came after the checkpoint is deleted, since it will be written again; into another one,
    which must be without snapshots, the history is copied.

    Returns:
        The steps whose snapshot is nowhere any more.

    Raises:
        FileExistsError: ``folder`` is another one and holds snapshots.
    """
    steps = set(steps)
    if folder.resolve() == earlier.resolve():
        for snapshot in _in(folder):
            if snapshot.step not in steps:
                snapshot.path.unlink()
    else:
        check_empty(folder)
        for snapshot in _in(earlier):
            if snapshot.step in steps:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(snapshot.path, folder / snapshot.path.name)
    return steps - {snapshot.step for snapshot in _in(folder)}


def check_empty(folder: Path) -> None:
    """Raise FileExistsError where a folder holds snapshots already: histories of two runs are never mixed."""
    if _in(folder):
        raise FileExistsError(
            f"'{folder}' holds snapshots of another run: give this one a folder of its own (a logger, or another "
            "default_root_dir), or delete them"
        )


def _checksum(tensor: Tensor) -> int:
    """Of shape and type too: a damaged head is noticed as well."""
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, zlib.crc32(head))


def _in(folder: Path) -> list[Snapshot]:
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*.safetensors")]
    found = [Snapshot(path, int(m[3]), int(m[1]), bool(m[2])) for path, m in names if m and path.is_file()]
    return sorted(found, key=lambda snapshot: snapshot.step)
