# pyright: reportInvalidTypeForm=false, reportMissingParameterType=false
"""The counter's numbers on a GPU by one kernel of Triton each, where PyTorch's own arithmetic takes some hundred.

Importing it needs Triton, which PyTorch brings along for NVIDIA and AMD on Linux.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_BITS = 1 << 64
_M0 = tl.constexpr(0xD2E7470EE14C6C93)
_M1 = tl.constexpr(0xCA5A826395121157)
_W0 = tl.constexpr(0x9E3779B97F4A7C15)
_W1 = tl.constexpr(0xBB67AE8584CAA73B)


def signs(out: Tensor, block: int, key: tuple[int, int], indices: range) -> None:
    """Write random signs of the streams of some indices, from a block of 256 on, into the rows of ``out`` [rows, n]."""
    _launch(_signs, out, 256, 32, block, key, indices)


def normals(out: Tensor, quantiles: Tensor, block: int, key: tuple[int, int], indices: range) -> None:
    """Write random quantiles of the streams of some indices, from a block of 16 on, into ``out`` [rows, n]."""
    _launch(_normals, out, 16, 256, block, key, indices, quantiles)


def _launch(
    kernel: Any, out: Tensor, numbers: int, blocks: int, block: int, key: tuple[int, int], indices: range, *more: Tensor
) -> None:
    rows, n = out.shape
    grid = (triton.cdiv(n, numbers * blocks), rows)
    words = (block % _BITS, indices.start % _BITS, indices.step % _BITS, key[0] % _BITS, key[1] % _BITS)
    kernel[grid](out, *more, n, out.stride(0), *words, blocks=blocks)


@triton.jit
def _philox(block, index, key0, key1):
    a, b = block, index
    c = block ^ block
    d = c
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        low0, high0 = a * _M0, tl.umulhi(a, tl.full(a.shape, _M0, tl.uint64))
        low1, high1 = c * _M1, tl.umulhi(c, tl.full(a.shape, _M1, tl.uint64))
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0 += _W0
        key1 += _W1
    return a, b, c, d


@triton.jit
def _words(block, index, stride, key0, key1, blocks: tl.constexpr):
    """The place of each block among those of the row, and its four words."""
    place = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    zero = tl.zeros((blocks,), tl.uint64)
    row = zero + index + stride * tl.program_id(1).to(tl.uint64)
    a, b, c, d = _philox(place.to(tl.uint64) + block, row, zero + key0, zero + key1)
    return place, a, b, c, d


@triton.jit
def _sign(out, n, start, word, bits):
    at = start[:, None] + bits[None, :]
    sign = ((word[:, None] >> bits[None, :].to(tl.uint64)) & 1).to(tl.int32) * 2 - 1
    tl.store(out + at, sign.to(tl.float32).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _signs(
    out,
    n: tl.int64,
    row: tl.int64,
    block: tl.uint64,
    index: tl.uint64,
    stride: tl.uint64,
    key0: tl.uint64,
    key1: tl.uint64,
    blocks: tl.constexpr,
):
    place, a, b, c, d = _words(block, index, stride, key0, key1, blocks)
    bits = tl.arange(0, 64)
    out += row * tl.program_id(1)
    _sign(out, n, place * 256, a, bits)
    _sign(out, n, place * 256 + 64, b, bits)
    _sign(out, n, place * 256 + 128, c, bits)
    _sign(out, n, place * 256 + 192, d, bits)


@triton.jit
def _normal(out, quantiles, n, start, word, lanes):
    at = start[:, None] + lanes[None, :]
    which = ((word[:, None] >> (lanes[None, :] * 16).to(tl.uint64)) & 0xFFFF).to(tl.int32)
    tl.store(out + at, tl.load(quantiles + which), mask=at < n)


@triton.jit
def _normals(
    out,
    quantiles,
    n: tl.int64,
    row: tl.int64,
    block: tl.uint64,
    index: tl.uint64,
    stride: tl.uint64,
    key0: tl.uint64,
    key1: tl.uint64,
    blocks: tl.constexpr,
):
    place, a, b, c, d = _words(block, index, stride, key0, key1, blocks)
    lanes = tl.arange(0, 4)
    out += row * tl.program_id(1)
    _normal(out, quantiles, n, place * 16, a, lanes)
    _normal(out, quantiles, n, place * 16 + 4, b, lanes)
    _normal(out, quantiles, n, place * 16 + 8, c, lanes)
    _normal(out, quantiles, n, place * 16 + 12, d, lanes)
