"""Random directions that are matrices of low rank, formed as late as possible."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zo_lightning.counter import draw_normals
from zo_lightning.directions import Direction, Directions, number_of
from zo_lightning.objective import tf32

Pair = tuple[Tensor, Tensor]
"""The factors ``A`` [q, m, r] and ``B`` [q, n, r] of q matrices ``A Bᵀ / √r``."""


@dataclass(frozen=True)
class LowRank(Directions):
    """Low-rank directions of every matrix: ``u = A Bᵀ / √r`` with normal factors; vectors get normal numbers.

    The entries are uncorrelated with variance 1, so ``E[u uᵀ] = I`` holds, at ``r (m + n)`` normal numbers for an
    ``m × n`` weight; a convolution counts as the matrix ``out × (in · kernel)``. With ``every`` above 1 the steps of
    an interval share ``B``, and stay in one subspace (LOZO, Chen et al., *Enhancing zeroth-order fine-tuning for
    language models with low-rank structures*, 2024).

    Args:
        rank: ``r`` ≥ 1.
        every: steps ≥ 1 after which ``B`` is drawn anew.

    Raises:
        ValueError: ``rank`` < 1, or ``every`` < 1.
    """

    rank: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("every", self.every)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def _shared(self, directions: Sequence[Direction], own: Tensor, start: int) -> Tensor:
        """Numbers as the directions' own, of the first step of their interval."""
        if self.every == 1:
            return own
        streams = [replace(one.stream, step=one.stream.step - one.stream.step % self.every) for one in directions]
        draw_normals(streams, shared := torch.empty_like(own), start)
        return shared

    def _pair(self, own: Tensor, shared: Tensor, like: Tensor) -> Pair:
        """``A`` from own numbers and ``B`` from those that an interval shares, both [q, r (m + n)]."""
        m = like.shape[0]
        own, shared = (numbers.view(len(own), -1, self.rank) for numbers in (own, shared))
        return own[:, :m], shared[:, m:]

    def _numbers(self, weight: Tensor) -> int:
        if weight.ndim < 2:
            return number_of(weight)
        return self.rank * (len(weight) + math.prod(weight.shape[1:]) * (2 if weight.is_complex() else 1))

    def _fill(self, place: Tensor, direction: Direction, position: int) -> None:
        start = direction.starts[position]
        if direction.weights[position].ndim < 2:
            direction.stream.normals(place.view(-1), start)
            return
        dtype = torch.promote_types(place.dtype, torch.float32)
        numbers = place.new_empty(1, self._numbers(direction.weights[position]), dtype=dtype)
        draw_normals([direction.stream], numbers, start)
        (a,), (b,) = self._pair(numbers, self._shared([direction], numbers, start), place)
        # Products of columns, which are the same in every precision that holds for products of matrices.
        product = a[:, :1] * b[:, 0]
        for k in range(1, self.rank):
            product.addcmul_(a[:, k : k + 1], b[:, k])
        place.copy_(product.div_(math.sqrt(self.rank)).view(place.shape))


class Factors:
    """All that some directions of one step are made of, drawn at once: they are summed up without any being formed.

    Attributes:
        parts: for each weight ``A`` [q, m, r] and ``B`` [q, n, r], or the numbers of a vector, [q, n].
    """

    def __init__(self, distribution: LowRank, directions: Sequence[Direction]) -> None:
        self.rank, self.weights = distribution.rank, directions[0].weights
        self.parts: list[Tensor | Pair] = []
        starts = directions[0].starts
        flat = torch.empty(len(directions), starts[-1], device=self.weights[0].device)
        draw_normals([direction.stream for direction in directions], flat, 0)
        shared = distribution._shared(directions, flat, 0)
        for start, w in zip(starts, self.weights, strict=False):
            numbers = slice(start, start + distribution._numbers(w))
            if w.ndim < 2:
                self.parts.append(flat[:, numbers].view(-1, *w.shape).to(w.dtype))
            else:
                a, b = distribution._pair(flat[:, numbers], shared[:, numbers], w)
                self.parts.append((a.to(w.dtype), b.to(w.dtype)))

    @classmethod
    def of(cls, directions: Sequence[Direction]) -> "Factors | None":
        """Those of some directions; None where they have none, or a weight is complex or has a still row."""
        first = directions[0]
        if not isinstance(first.distribution, LowRank) or first.still or any(w.is_complex() for w in first.weights):
            return None
        return cls(first.distribution, directions)

    def sum(self, coefficients: Sequence[float], position: int) -> Tensor:
        """``Σᵢ cᵢ uᵢ`` of one weight."""
        part, weight = self.parts[position], self.weights[position]
        a, b = part if isinstance(part, tuple) else (part, None)
        c = torch.tensor(coefficients, dtype=a.dtype, device=a.device)
        with torch.autocast(a.device.type, enabled=False), tf32(False):
            if b is None:
                return torch.empty_like(weight).copy_(torch.tensordot(c, a, 1))
            scaled = (a * c.view(-1, 1, 1)).transpose(0, 1).flatten(1)
            product = scaled @ b.transpose(1, 2).flatten(0, 1)
        return torch.empty_like(weight).copy_(product.div_(math.sqrt(self.rank)).view(weight.shape))
