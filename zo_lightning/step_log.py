"""The log of a run's steps on disk: one checksummed record of some tens of bytes for each batch."""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_MAGIC = b"zo_lightning steps 1\n"
_HEAD = struct.Struct("<BIIHI")  # flags, step, slopes, learning rates, forward passes
_CHECKSUM = struct.Struct("<I")
_SKIPPED, _STEPPED, _LEAVES_TRACES, _HAS_MU, _HAS_SCALE, _HASH, _SETTINGS = (1 << k for k in range(7))


@dataclass(frozen=True)
class Step:
    """What the estimate of one batch came to.

    Attributes:
        step: ``global_step`` before the optimizer's step; with seed and index it makes the directions.
        loss: at the weights; not finite where the batch was skipped.
        slopes: along each direction of the batch; none where it was skipped.
        rates: the learning rate of each of the optimizer's groups at its step; none where it did not step.
        mu: the finite-difference step, or None.
        passes: forward passes of the batch that it took.
        scale: of the estimate in ``.grad``: 1, or 1 / batches where several are accumulated.
        skipped: whether the batch added nothing to ``.grad``.
        stepped: whether the optimizer stepped after it.
        leaves_traces: whether the pass left more than its loss: buffers, metrics, attributes of the module.
    """

    step: int
    loss: float
    slopes: tuple[float, ...]
    rates: tuple[float, ...] = ()
    mu: float | None = None
    passes: int = 0
    scale: float = 1.0
    skipped: bool = False
    stepped: bool = True
    leaves_traces: bool = False

    def _pack(self) -> bytes:
        flags = _SKIPPED * self.skipped | _STEPPED * self.stepped | _LEAVES_TRACES * self.leaves_traces
        flags |= _HAS_MU * (self.mu is not None) | _HAS_SCALE * (self.scale != 1.0)
        numbers = [self.loss, *self.slopes, *self.rates]
        numbers += [] if self.mu is None else [self.mu]
        numbers += [] if self.scale == 1.0 else [self.scale]
        head = _HEAD.pack(flags, self.step, len(self.slopes), len(self.rates), self.passes)
        return head + struct.pack(f"<{len(numbers)}d", *numbers)


@dataclass(frozen=True)
class Check:
    """A hash of the weights after ``step`` optimizer steps, by which a replay is checked."""

    step: int
    digest: int

    def _pack(self) -> bytes:
        return _HEAD.pack(_HASH, self.step, 0, 0, 0) + struct.pack("<Q", self.digest)


@dataclass(frozen=True)
class Settings:
    """What has changed in the optimizer's groups beside the learning rate: a momentum that a schedule moves.

    Attributes:
        step: the first optimizer step that is made with them.
        groups: of each group, the names and values that are new.
    """

    step: int
    groups: tuple[dict[str, Any], ...]

    def _pack(self) -> bytes:
        data = json.dumps(self.groups).encode()
        return _HEAD.pack(_SETTINGS, self.step, len(data), 0, 0) + data


Record = Step | Check | Settings


class StepLog:
    """The log of a run, opened to be continued.

    Each record carries a checksum of itself and of all before it, and is handed to the operating system in one piece: a
    process that is killed loses the record in flight at most. What is damaged or torn ends the log.

    Args:
        path: the file; it is made where there is none.
        place: where to go on, and what comes after it is cut off; None: at the end.

    Attributes:
        place: the checksum of all records so far, 0 before the first: it names a place in this log, and in no other.

    Raises:
        ValueError: the file is something else, or does not hold that place.
    """

    def __init__(self, path: Path, place: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b", buffering=0)
        begin = self._file.read(len(_MAGIC))
        if not _MAGIC.startswith(begin):
            raise ValueError(f"'{path}' is no log of steps")
        self._file.seek(0)
        end, self.place = len(_MAGIC), 0
        records = _records(self._file)
        while self.place != place and (found := next(records, None)) is not None:
            _, end, self.place = found
        if place not in (None, self.place):
            raise ValueError(f"'{path}' is the log of another run, or ends too early")
        self._file.truncate(end)
        self._file.seek(0)
        self._file.write(_MAGIC)
        self._file.seek(end)

    def append(self, record: Record) -> None:
        """Write one record.

        Raises:
            OSError: the disk is full, or the like; what was written before is intact.
        """
        data = record._pack()
        place = zlib.crc32(data, self.place)
        self._file.write(data + _CHECKSUM.pack(place))
        self.place = place

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_steps(path: Path) -> Iterator[Record]:
    """The records of a log, up to the first that is damaged or torn.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no log.
    """
    for record, _ in read_places(path):
        yield record


def read_places(path: Path) -> Iterator[tuple[Record, int]]:
    """The records of a log, each with the place after it, as ``read_steps`` gives them."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"'{path}' is no log of steps")
        file.seek(0)
        for record, _, place in _records(file):
            yield record, place


def unread(path: Path) -> int:
    """How many bytes at the end of a log belong to no whole record: torn in a kill, or behind a damaged place.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        end = max((after for _, after, _ in _records(file)), default=len(_MAGIC))
        return os.fstat(file.fileno()).st_size - end


def _records(file: BinaryIO) -> Iterator[tuple[Record, int, int]]:
    """Each record that is whole, with the place where it ends and the checksum there."""
    if file.read(len(_MAGIC)) != _MAGIC:
        return
    checksum, left = 0, os.fstat(file.fileno()).st_size
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        size = _size(*_HEAD.unpack(head))
        if size > left - file.tell():  # torn, or a damaged length
            return
        body, found = file.read(size), file.read(_CHECKSUM.size)
        checksum = zlib.crc32(head + body, checksum)
        if found != _CHECKSUM.pack(checksum):
            return
        yield _unpacked(body, *_HEAD.unpack(head)), file.tell(), checksum


def _size(flags: int, step: int, slopes: int, rates: int, passes: int) -> int:
    if flags & _SETTINGS:
        return slopes
    return 8 if flags & _HASH else 8 * (1 + slopes + rates + bool(flags & _HAS_MU) + bool(flags & _HAS_SCALE))


def _unpacked(body: bytes, flags: int, step: int, slopes: int, rates: int, passes: int) -> Record:
    if flags & _SETTINGS:
        return Settings(step, tuple(json.loads(body)))
    if flags & _HASH:
        return Check(step, int.from_bytes(body, "little"))
    loss, *numbers = struct.unpack(f"<{len(body) // 8}d", body)
    return Step(
        step,
        loss,
        tuple(numbers[:slopes]),
        tuple(numbers[slopes : slopes + rates]),
        numbers[slopes + rates] if flags & _HAS_MU else None,
        passes,
        numbers[-1] if flags & _HAS_SCALE else 1.0,
        bool(flags & _SKIPPED),
        bool(flags & _STEPPED),
        bool(flags & _LEAVES_TRACES),
    )
