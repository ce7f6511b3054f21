"""Random directions ``u`` in weight space, drawn by counter so that any tensor of any of them can be drawn again.

Every distribution here obeys ``E[u uᵀ] = I`` (so ``E‖u‖² = d``): an estimator is ``ĝ = (1/q) Σᵢ cᵢ uᵢ`` whatever the
distribution, and no formula outside this file mentions the dimension ``d``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from zo_lightning.counter import Stream, draw_normals, draw_signs
from zo_lightning.vectors import Vector, starts

_FOLD = 1024  # numbers whose squares are summed at once


@dataclass(frozen=True)
class Directions(ABC):
    """A distribution of directions ``u`` with ``E[u uᵀ] = I``; equal arguments draw equal directions, in any order.

    Or a projection in the place of ``I``, for directions that stay in a subspace (``Centred``).

    The numbers of a direction are those of one ``Stream``: the tensors of the weights lie in it one after the other. So
    they are the same on every device, to the last bit for all but ``Sphere``, ``LowRank`` and ``Centred``, whose sums
    may round otherwise there.
    """

    def draw(
        self, weights: Sequence[Tensor], seed: int, step: int, index: int, still: Mapping[int, int] | None = None
    ) -> "Direction":
        """One direction, whose tensors are drawn when they are asked for.

        Args:
            weights: the tensors to perturb: shapes, strides, dtypes and devices are theirs, values are not read.
            seed: of the run.
            step: of the training, so that directions differ from step to step.
            index: of the direction among the ``samples`` of one step.
            still: by position of a weight, a row of it that no direction moves: an embedding's padding.
        """
        return Direction(self, weights, Stream(seed, step, index), still or {})

    @abstractmethod
    def _fill(self, place: Tensor, direction: "Direction", position: int) -> None:
        """Write the numbers of one tensor, up to the direction's scale, into a contiguous real one of its shape."""

    def _fill_all(self, rows: Sequence[Vector], flat: Tensor | None, directions: Sequence["Direction"]) -> None:
        """Write what ``_fill`` writes into all tensors of some directions of one step, zeros where they stand still.

        Args:
            rows: the tensors of each direction.
            flat: [directions, numbers], the memory that they share; None where they do not.
            directions: whose tensors these are.
        """
        for row, direction in zip(rows, directions, strict=True):
            for position, place in enumerate(row):
                direction._raw(position, place)

    def _numbers(self, weight: Tensor) -> int:
        """How many random numbers the tensor of one weight is made of."""
        return number_of(weight)

    def _scale(self, direction: "Direction", norm: Callable[[], float]) -> float | None:
        """What the numbers of a direction are multiplied by, or None; ``norm`` computes the norm of all."""
        return None


class Direction:
    """One direction ``u``: a tensor for each weight, drawn as often as it is asked for, each time the same.

    A tensor has the shape, strides, dtype and device of its weight, and is the caller's to change. Complex weights get
    independent numbers in both parts: their dimension counts twice.

    Args:
        distribution: what it is drawn from.
        weights: as for ``Directions.draw``.
        stream: of its random numbers.
        still: as for ``Directions.draw``.

    Attributes:
        held: the tensors, once ``hold`` has drawn them.
    """

    def __init__(
        self, distribution: Directions, weights: Sequence[Tensor], stream: Stream, still: Mapping[int, int]
    ) -> None:
        self.distribution, self.weights, self.stream, self.still = distribution, weights, stream, still
        self.held: Vector | None = None

    @cached_property
    def d(self) -> int:
        """The numbers in all tensors that are not still."""
        return sum(map(number_of, self.weights)) - sum(self.weights[position][0].numel() for position in self.still)

    @cached_property
    def starts(self) -> list[int]:
        """Where the numbers of each tensor start in the stream."""
        return starts(map(self.distribution._numbers, self.weights))

    @cached_property
    def _scale(self) -> float | None:
        """What the drawn numbers are multiplied by, where they are drawn one tensor at a time."""
        return self.distribution._scale(
            self, lambda: math.hypot(*(_norms([self._raw(k)])[0] for k in range(len(self.weights))))
        )

    def __getitem__(self, position: int) -> Tensor:
        """Draw the tensor of one weight; where a scale depends on all numbers, the first call draws all for that."""
        place = self._raw(position)
        return place if self._scale is None else place.mul_(self._scale)

    def tensors(self, out: Vector | None = None) -> Vector:
        """Draw all tensors at once, each number once: the same as one by one, bit for bit.

        Args:
            out: tensors like the weights to write into and to return, in place of new ones.
        """
        places = Vector.like(self.weights) if out is None else out
        self.distribution._fill_all([places], None if places.flat is None else places.flat.unsqueeze(0), [self])
        return self._scaled(places)

    def _scaled(self, places: Vector) -> Vector:
        """All tensors, once their numbers are drawn."""
        if "_scale" not in vars(self):
            self._scale = self.distribution._scale(self, lambda: math.hypot(*_norms(places)))
        if self._scale is not None:
            places.mul_(self._scale)
        return places

    def hold(self, out: Vector | None = None) -> "Direction":
        """Draw all tensors now and keep them in ``held``, for a direction that is used several times."""
        self.held = self.tensors(out)
        return self

    def _raw(self, position: int, out: Tensor | None = None) -> Tensor:
        place = torch.empty_like(self.weights[position]) if out is None else out
        real = torch.view_as_real(place) if place.is_complex() else place
        if real.is_contiguous():
            self.distribution._fill(real, self, position)
        else:
            numbers = torch.empty_like(real, memory_format=torch.contiguous_format)
            self.distribution._fill(numbers, self, position)
            real.copy_(numbers)
        if position in self.still:
            place[self.still[position]] = 0
        return place


def hold_all(directions: Sequence[Direction], out: Vector) -> None:
    """Let each direction of one step hold its tensors, as rows of a stack of as many."""
    rows = out.unstack()
    directions[0].distribution._fill_all(rows, out.flat, directions)
    for direction, row in zip(directions, rows, strict=True):
        direction.held = direction._scaled(row)


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """The norm of each tensor, in float32 at least."""
    norms = torch._foreach_norm([_folded(t if t.dtype.itemsize > 2 else t.float()) for t in tensors])
    return torch.stack([norm.to(norms[0]) for norm in norms]).tolist()


def _folded(t: Tensor) -> Tensor:
    """At most some thousand numbers of the same norm: one sum over 17 million in float32 is off by 8e-4 on a CPU."""
    if t.numel() <= _FOLD:
        return t.reshape(-1)  # in one order, whatever its strides
    t = (torch.view_as_real(t) if t.is_complex() else t).reshape(-1)
    whole = len(t) // _FOLD * _FOLD
    return _folded(torch.cat([torch.linalg.vector_norm(t[:whole].view(-1, _FOLD), dim=1), t[whole:]]))


def number_of(weight: Tensor) -> int:
    """The real numbers in a tensor."""
    return weight.numel() * (2 if weight.is_complex() else 1)


@dataclass(frozen=True)
class Independent(Directions):
    """A distribution whose numbers are independent of each other, one for each weight."""

    @abstractmethod
    def _draw(self, out: Tensor, streams: Sequence[Stream], start: int) -> None:
        """Write the numbers of each stream from ``start`` on into a row of ``out`` [streams, n]."""

    def _fill(self, place: Tensor, direction: Direction, position: int) -> None:
        self._draw(place.view(1, -1), [direction.stream], direction.starts[position])

    def _fill_all(self, rows: Sequence[Vector], flat: Tensor | None, directions: Sequence[Direction]) -> None:
        if flat is None:
            super()._fill_all(rows, flat, directions)
            return
        self._draw(flat, [direction.stream for direction in directions], 0)
        for row, direction in zip(rows, directions, strict=True):
            for position, still in direction.still.items():
                row[position][still] = 0


@dataclass(frozen=True)
class Gaussian(Independent):
    """Standard normal directions, ``u ~ N(0, I)`` (Nesterov & Spokoiny, *Random gradient-free minimization*, 2017).

    Each number takes one of 65,536 equally likely values up to ±4.3.
    """

    def _draw(self, out: Tensor, streams: Sequence[Stream], start: int) -> None:
        draw_normals(streams, out, start)


@dataclass(frozen=True)
class Sphere(Gaussian):
    """Directions uniform on the sphere of radius √d: ``u = √d z / ‖z‖`` with ``z ~ N(0, I)``.

    The distribution of ZO-AdaMM (Chen et al. 2019), whose estimate ``d (f(x + μ′v) − f(x)) v / μ′`` with ``‖v‖ = 1`` is
    ours with ``u = √d v`` and ``μ′ = √d μ``: here ``mu`` is the typical displacement of one weight, at every size.
    """

    def _scale(self, direction: Direction, norm: Callable[[], float]) -> float:
        return math.sqrt(direction.d) / norm()


@dataclass(frozen=True)
class Rademacher(Independent):
    """Random signs, ``uⱼ = ±1`` with equal probability (SPSA, Spall 1992): a bit for each, the cheapest to draw."""

    def _draw(self, out: Tensor, streams: Sequence[Stream], start: int) -> None:
        draw_signs(streams, out, start)


@dataclass(frozen=True)
class Coordinate(Directions):
    """One weight at a time: ``u = √d eⱼ`` with ``j`` uniform over all weights (Lian et al. 2016)."""

    def _fill(self, place: Tensor, direction: Direction, position: int) -> None:
        sizes = list(map(number_of, direction.weights))
        word = int(direction.stream.words(0, 1, torch.device("cpu")))
        j = ((word + (1 << 63)) * sum(sizes) >> 64) - sum(sizes[:position])
        place.zero_()
        if 0 <= j < place.numel():
            place.view(-1)[j] = math.sqrt(sum(sizes))
