"""Random directions ``u`` in weight space, drawn by counter so that any tensor of any of them can be drawn again.

Every distribution here obeys ``E[u uᵀ] = I`` (so ``E‖u‖² = d``): an estimator is ``ĝ = (1/q) Σᵢ cᵢ uᵢ`` whatever the
distribution, and no formula outside this file mentions the dimension ``d``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_PIECE = 1 << 18
_SIGNS = 1 << 20


def mix(*words: int) -> int:
    """Hash integers to one of 64 bits: the seed of a random stream that belongs to these words alone.

    Each word is absorbed by the finaliser of SplitMix64 (Steele, Lea & Flood, *Fast splittable pseudorandom number
    generators*, 2014), so neighbouring seeds, steps and indices give unrelated streams.
    """
    return _absorbed(0, words)


def _absorbed(state: int, words: Iterable[int]) -> int:
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class Directions(ABC):
    """A distribution of directions ``u`` with ``E[u uᵀ] = I``; equal arguments draw equal directions, in any order.

    Args:
        draw_on: ``"cpu"`` draws every number on the CPU and copies it, so that a run is the same on every device;
            ``"device"`` uses the parameters' own device: faster on a GPU, but the streams of GPU models differ.

    Raises:
        ValueError: ``draw_on`` is neither.
    """

    _: KW_ONLY
    draw_on: Literal["cpu", "device"] = "cpu"

    def __post_init__(self) -> None:
        if self.draw_on not in ("cpu", "device"):
            raise ValueError(f"draw_on must be 'cpu' or 'device', got {self.draw_on!r}")

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
        return Direction(self, weights, (seed, step, index), still or {})

    @abstractmethod
    def _fill(self, place: Tensor, direction: "Direction", position: int) -> None:
        """Write the numbers of one tensor, up to the direction's scale, into a contiguous real one of its shape."""

    def _scale(self, d: int, norm: Callable[[], float]) -> float | None:
        """What the ``d`` numbers of all tensors are multiplied by, or None; ``norm`` computes their norm."""
        return None

    def _normal(self, place: Tensor, direction: "Direction", position: int) -> None:
        """Fill a tensor with standard normal numbers, drawn in float32 whatever its dtype."""
        device = torch.device("cpu") if self.draw_on == "cpu" else place.device
        direct = place.device == device and place.dtype == torch.float32
        numbers = place if direct else torch.empty(place.shape, device=device)
        # Drawing is serial in PyTorch and long tensors take long: their pieces have a stream each, so that all threads
        # can draw, and the numbers do not depend on how many there are.
        pieces = numbers.view(-1).split(_PIECE)
        if len(pieces) == 1:
            numbers.normal_(generator=direction.stream(device, position))
        else:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                draw = enumerate(pieces)
                list(
                    pool.map(lambda one: one[1].normal_(generator=direction.own_stream(device, position, one[0])), draw)
                )
        if not direct:
            place.copy_(numbers)


class Direction:
    """One direction ``u``: a tensor for each weight, drawn as often as it is asked for, each time the same.

    A tensor has the shape, strides, dtype and device of its weight, and is the caller's to change. Complex weights get
    independent numbers in both parts: their dimension counts twice.

    Args:
        distribution: what it is drawn from.
        weights: as for ``Directions.draw``.
        key: seed, step and index.
        still: as for ``Directions.draw``.

    Attributes:
        held: the tensors, once ``hold`` has drawn them.
    """

    def __init__(
        self, distribution: Directions, weights: Sequence[Tensor], key: tuple[int, ...], still: Mapping[int, int]
    ) -> None:
        self.distribution, self.weights, self.key, self.still = distribution, weights, key, still
        self._state = mix(*key)
        self._generators: dict[torch.device, torch.Generator] = {}
        self.held: list[Tensor] | None = None

    @cached_property
    def d(self) -> int:
        """The numbers in all tensors that are not still."""
        real = sum(w.numel() * (2 if w.is_complex() else 1) for w in self.weights)
        return real - sum(self.weights[position][0].numel() for position in self.still)

    @cached_property
    def _scale(self) -> float | None:
        """What the drawn numbers are multiplied by, where they are drawn one tensor at a time."""
        return self.distribution._scale(
            self.d, lambda: math.hypot(*(_norms([self._raw(k)])[0] for k in range(len(self.weights))))
        )

    def __getitem__(self, position: int) -> Tensor:
        """Draw the tensor of one weight; where a scale depends on all numbers, the first call draws all for that."""
        place = self._raw(position)
        return place if self._scale is None else place.mul_(self._scale)

    def tensors(self, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Draw all tensors at once, each number once: the same as one by one, bit for bit.

        Args:
            out: tensors like the weights to write into and to return, in place of new ones.
        """
        places = [self._raw(k, None if out is None else out[k]) for k in range(len(self.weights))]
        if "_scale" not in vars(self):
            self._scale = self.distribution._scale(self.d, lambda: math.hypot(*_norms(places)))
        if self._scale is not None:
            torch._foreach_mul_(places, self._scale)
        return places

    def hold(self, out: Sequence[Tensor] | None = None) -> "Direction":
        """Draw all tensors now and keep them in ``held``, for a direction that is used several times."""
        self.held = self.tensors(out)
        return self

    def stream(self, device: torch.device, position: int) -> torch.Generator:
        """The random numbers of one tensor, until those of another are asked for."""
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        return generator.manual_seed(_absorbed(self._state, (position,)))

    def own_stream(self, device: torch.device, position: int, piece: int) -> torch.Generator:
        """The random numbers of one piece of a tensor, for a thread of its own."""
        # torch's CPU generator keeps 32 bits of its seed: two of many streams may coincide, at unrelated steps only.
        return torch.Generator(device).manual_seed(_absorbed(self._state, (position, piece)))

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


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """The norm of each tensor, in float32 at least."""
    norms = torch._foreach_norm([t if t.dtype.itemsize > 2 else t.float() for t in tensors])
    return torch.stack([norm.to(norms[0]) for norm in norms]).tolist()


@dataclass(frozen=True)
class Gaussian(Directions):
    """Standard normal directions, ``u ~ N(0, I)`` (Nesterov & Spokoiny, *Random gradient-free minimization*, 2017)."""

    def _fill(self, place: Tensor, direction: Direction, position: int) -> None:
        self._normal(place, direction, position)


@dataclass(frozen=True)
class Sphere(Gaussian):
    """Directions uniform on the sphere of radius √d: ``u = √d z / ‖z‖`` with ``z ~ N(0, I)``.

    The distribution of ZO-AdaMM (Chen et al. 2019), whose estimate ``d (f(x + μ′v) − f(x)) v / μ′`` with ``‖v‖ = 1`` is
    ours with ``u = √d v`` and ``μ′ = √d μ``: here ``mu`` is the typical displacement of one weight, at every size.
    """

    def _scale(self, d: int, norm: Callable[[], float]) -> float:
        return math.sqrt(d) / norm()


@dataclass(frozen=True)
class Rademacher(Directions):
    """Random signs, ``uⱼ = ±1`` with equal probability (SPSA, Spall 1992): four times cheaper to draw than normals."""

    def _fill(self, place: Tensor, direction: Direction, position: int) -> None:
        generator = direction.stream(torch.device("cpu") if self.draw_on == "cpu" else place.device, position)
        flat = place.view(-1)
        # In pieces, so that what is beside the numbers takes little memory.
        for piece in flat.split(_SIGNS) if place.numel() > _SIGNS else (flat,):
            words = torch.empty(piece.numel() // 64 + 1, dtype=torch.int64, device=generator.device)
            words.random_(-(1 << 63), None, generator=generator)
            signs = np.unpackbits(words.cpu().numpy().view(np.uint8), count=piece.numel()).view(np.int8)
            signs += signs
            signs -= 1
            piece.copy_(torch.from_numpy(signs))


@dataclass(frozen=True)
class Coordinate(Directions):
    """One weight at a time: ``u = √d eⱼ`` with ``j`` uniform over all weights (Lian et al. 2016)."""

    def _fill(self, place: Tensor, direction: Direction, position: int) -> None:
        sizes = [w.numel() * (2 if w.is_complex() else 1) for w in direction.weights]
        generator = torch.Generator().manual_seed(mix(*direction.key))
        j = int(torch.randint(sum(sizes), (), generator=generator)) - sum(sizes[:position])
        place.zero_()
        if 0 <= j < place.numel():
            place.view(-1)[j] = math.sqrt(sum(sizes))


@dataclass(frozen=True)
class LowRank(Directions):
    """Low-rank directions of every matrix: ``u = A Bᵀ / √r`` with normal factors; vectors get normal numbers.

    The entries are uncorrelated with variance 1, so ``E[u uᵀ] = I`` holds, at ``r (m + n)`` normal numbers for an
    ``m × n`` weight; a convolution counts as the matrix ``out × (in · kernel)`` (LOZO, Chen et al. 2024).

    Args:
        rank: ``r`` ≥ 1.

    Raises:
        ValueError: ``rank`` < 1.
    """

    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def _fill(self, place: Tensor, direction: Direction, position: int) -> None:
        if direction.weights[position].ndim < 2:
            self._normal(place, direction, position)
            return
        m, n = place.shape[0], math.prod(place.shape[1:])
        factors = torch.empty(m + n, self.rank, device=place.device)
        self._normal(factors, direction, position)
        place.copy_((factors[:m] @ factors[m:].T).div_(math.sqrt(self.rank)).view(place.shape))
