"""Random bits by counter: any part of any stream can be computed by itself, on any device, and is always the same.

The generator is Philox-4x64-10 (Salmon, Moraes, Dror & Shaw, *Parallel random numbers: as easy as 1, 2, 3*, 2011), a
bijection of a counter of 256 bits for each key of 128. Streams are told apart by key and counter, not by a hash: no two
of them share a block.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 256
"""Numbers of a stream begin to be drawn at multiples of this: at whole blocks, whatever their bits."""

_WORD = (1 << 64) - 1
_HALF = (1 << 32) - 1
_PIECE = 1 << 20  # numbers drawn at once: what is beside them takes little memory
_COPIED = 1 << 18  # so many words or fewer are computed by the CPU for other devices: some hundred kernels take longer
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)

_log = logging.getLogger(__name__)


def mix(*words: int) -> int:
    """Hash integers to one of 64 bits: the seed of a random stream that belongs to these words alone.

    Each word is absorbed by the finaliser of SplitMix64 (Steele, Lea & Flood, *Fast splittable pseudorandom number
    generators*, 2014), so neighbouring seeds, steps and indices give unrelated streams.
    """
    state = 0
    for word in words:
        state = (state + (word & _WORD) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class Stream:
    """The random numbers of one direction; those of another seed, step or index are unrelated.

    Attributes:
        seed: of the run, of which 64 bits count.
        step: of the training.
        index: of the direction within the step.
    """

    seed: int
    step: int
    index: int

    def words(self, block: int, count: int, device: torch.device) -> Tensor:
        """``count`` words of 64 random bits from the given block of four on, [count], int64."""
        if device.type == "cpu" or count <= _COPIED:
            return _sent(torch.from_numpy(self._raw(block, count).view(np.int64)), device)
        blocks = torch.arange(block, block + -(-count // 4), device=device)
        zero = torch.zeros_like(blocks)
        counters = torch.stack([blocks, zero + _signed(self.index), zero, zero])
        return philox(counters, (self.seed, self.step)).T.reshape(-1)[:count]

    def _raw(self, block: int, count: int) -> Any:
        counter = (block | (self.index & _WORD) << 64) - 1  # NumPy begins one later
        words = [counter >> 64 * k & _WORD for k in range(4)]
        generator: Any = _generator(get_ident())  # its setter takes any sequences
        generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": words, "key": (self.seed & _WORD, self.step & _WORD)},
            "buffer": (0, 0, 0, 0),
            "buffer_pos": 4,  # nothing is left in it
            "has_uint32": 0,
            "uinteger": 0,
        }
        return generator.random_raw(count)

    def signs(self, out: Tensor, start: int) -> None:
        """Write independent signs ±1 into ``out`` [n], those from ``start`` on: ``draw_signs`` for one stream."""
        draw_signs([self], out.unsqueeze(0), start)

    def normals(self, out: Tensor, start: int) -> None:
        """Write normal numbers into ``out`` [n], those from ``start`` on: ``draw_normals`` for one stream."""
        draw_normals([self], out.unsqueeze(0), start)

    def _signs(self, out: Tensor, start: int) -> None:
        if out.device.type != "cpu" or torch.compiler.is_compiling():  # by NumPy's bytes a compiler is at a loss
            rows = -(-len(out) // 8)
            bits = self.words(start // 256, -(-rows // 8), out.device).view(torch.uint8)[:rows].int()
            out.copy_(_signs(out.device, out.dtype)[bits].view(-1)[: len(out)])
            return
        signs, memory = _rows(out.dtype), out.view(torch.uint8).numpy()
        piece = _PIECE // 8 * signs.itemsize
        for begin in range(0, len(memory), piece):
            place = memory[begin : begin + piece]
            whole, rest = divmod(len(place), signs.itemsize)
            block = (start + begin // signs.itemsize * 8) // 256
            bits = self._raw(block, (whole + bool(rest) + 7) // 8).view(np.uint8)
            # NumPy copies eight numbers at once, in half the time that PyTorch takes.
            np.take(signs, bits[:whole], out=place[: whole * signs.itemsize].view(signs.dtype), mode="clip")
            if rest:
                place[-rest:] = signs[bits[whole : whole + 1]].view(np.uint8)[:rest]

    def _normals(self, out: Tensor, start: int) -> None:
        quantiles = _quantiles(out.device, out.dtype)
        for begin, piece in _pieces(out):
            words = self.words((start + begin) // 16, -(-len(piece) // 4), out.device)
            torch.index_select(quantiles, 0, words.view(torch.uint16).int()[: len(piece)], out=piece)


def draw_signs(streams: Sequence[Stream], out: Tensor, start: int) -> None:
    """Write independent signs ±1 of each stream into a row of ``out``: one bit for each.

    Args:
        streams: of one seed and step.
        out: [streams, n], the numbers of a row side by side in memory.
        start: of the first sign in its stream, a multiple of ``ALIGNMENT``.
    """
    if not out.numel():
        return
    if (kernels := _kernels(out.device)) and (indices := _evenly_spaced(streams)):
        kernels.signs(out, start // 256, (streams[0].seed, streams[0].step), indices)
        return
    for stream, row in zip(streams, out.unbind(), strict=True):
        stream._signs(row, start)


def draw_normals(streams: Sequence[Stream], out: Tensor, start: int) -> None:
    """Write independent standard normal numbers of each stream into a row of ``out``, as ``draw_signs`` does.

    A number has 16 bits: they choose one of 65,536 equally likely values, the quantiles of the normal distribution
    up to ±4.3, with mean 0 and variance 1. So numbers are the same on every device, to the last bit.
    """
    if not out.numel():
        return
    if (kernels := _kernels(out.device)) and (indices := _evenly_spaced(streams)):
        key = streams[0].seed, streams[0].step
        kernels.normals(out, _quantiles(out.device, out.dtype), start // 16, key, indices)
        return
    for stream, row in zip(streams, out.unbind(), strict=True):
        stream._normals(row, start)


def _evenly_spaced(streams: Sequence[Stream]) -> range | None:
    """The indices of the streams, where they are those of a range."""
    first, *rest = (stream.index for stream in streams)
    indices = range(first, first + len(streams) * (stride := rest[0] - first if rest else 1), stride)
    return indices if stride > 0 and list(indices) == [first, *rest] else None


@lru_cache
def _kernels(device: torch.device) -> Any:
    """The module of kernels for a device, or None."""
    if device.type != "cuda":
        return None
    try:
        from zo_lightning import counter_kernels

        counter_kernels.signs(torch.empty(1, 1, device=device), 0, (0, 0), range(1))
    except Exception as error:  # no Triton, no compiler for it, a GPU that it does not know: each says so in its way
        _log.warning("PyTorch computes random numbers on %s by itself, which takes longer: %s", device, error)
        return None
    return counter_kernels


@lru_cache(16)
def _generator(thread: int) -> np.random.Philox:
    """A thread's own, to be set: making one takes twenty times as long."""
    return np.random.Philox(0)


def philox(counters: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox-4x64-10 in PyTorch's int64 arithmetic, which wraps: [4, n] words of as many counters."""
    device = counters.device
    keys = [[[_signed(k + turn * w)] for k, w in zip(key, _WEYL, strict=True)] for turn in range(10)]
    *keys, multipliers = _sent(torch.tensor([*keys, [[_signed(m)] for m in _MULTIPLIERS]]), device)
    high, low = _upper(multipliers), multipliers & _HALF
    multiplied, kept = counters[::2], counters[1::2]
    for turn_key in keys:
        # The upper words of the products of 64 bits, from products of halves.
        x_high, x_low = _upper(multiplied), multiplied & _HALF
        cross, other = x_high * low, x_low * high
        carry = (_upper(x_low * low) + (cross & _HALF) + (other & _HALF)) >> 32
        upper = x_high * high + _upper(cross) + _upper(other) + carry
        multiplied, kept = upper.flip(0) ^ kept ^ turn_key, (multiplied * multipliers).flip(0)
    return torch.stack([multiplied, kept], 1).view(4, -1)


def _sent(words: Tensor, device: torch.device) -> Tensor:
    """Words of the CPU on a device; from pinned memory, so that nothing waits for what a GPU still has to do."""
    return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words.to(device)


def _upper(x: Tensor) -> Tensor:
    return (x >> 32) & _HALF


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _pieces(out: Tensor) -> Iterator[tuple[int, Tensor]]:
    if out.device.type != "cpu" or len(out) <= _PIECE:
        yield 0, out
    else:
        yield from zip(range(0, len(out), _PIECE), out.split(_PIECE), strict=True)


@lru_cache
def _signs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The eight signs that a byte stands for, [256, 8]."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (2 * bits - 1).to(device, dtype)


@lru_cache
def _rows(dtype: torch.dtype) -> Any:
    """The same for NumPy, [256], as bytes: it lacks some dtypes."""
    signs = _signs(torch.device("cpu"), dtype)
    return signs.view(torch.uint8).numpy().view(f"V{8 * signs.itemsize}").ravel()


@lru_cache
def _quantiles(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Equally likely values of a normal number, [65536], with mean 0 and variance 1."""
    half = torch.special.ndtri((torch.arange(32768, dtype=torch.float64) + 0.5) / 65536)
    half /= half.square().mean().sqrt()
    return torch.cat([half, -half.flip(0)]).float().to(device, dtype)
