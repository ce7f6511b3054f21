"""Random directions ``u`` in weight space, drawn by counter so that any of them can be drawn again.

Every distribution here obeys ``E[u uᵀ] = I`` (so ``E‖u‖² = d``): an estimator is ``ĝ = (1/q) Σᵢ cᵢ uᵢ`` whatever the
distribution, and no formula outside this file mentions the dimension ``d``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_PIECE = 1 << 18


def mix(*words: int) -> int:
    """Hash integers to one of 64 bits: the seed of a random stream that belongs to these words alone.

    Each word is absorbed by the finaliser of SplitMix64 (Steele, Lea & Flood, *Fast splittable pseudorandom number
    generators*, 2014), so neighbouring seeds, steps and indices give unrelated streams.
    """
    state = 0
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

    draw_on: Literal["cpu", "device"] = "cpu"

    def __post_init__(self) -> None:
        if self.draw_on not in ("cpu", "device"):
            raise ValueError(f"draw_on must be 'cpu' or 'device', got {self.draw_on!r}")

    def stream(self, params: Sequence[Tensor], seed: int, step: int, index: int) -> Iterator[Tensor]:
        """Yield one direction a tensor at a time, in the order of ``params``, so that only one need be in memory.

        Args:
            params: the tensors to perturb: shapes, dtypes and devices are theirs, values are not read.
            seed: of the run.
            step: of the training, so that directions differ from step to step.
            index: of the direction among the ``samples`` of one step.
        """
        places = (torch.empty_like(p, memory_format=torch.contiguous_format) for p in params)
        return self._draw(places, _dimension(params), seed, step, index)

    def sample(
        self, params: Sequence[Tensor], seed: int, step: int, index: int, out: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Draw all tensors of one direction at once: the same numbers as ``stream``, bit for bit.

        Args:
            params: as for ``stream``, like ``seed``, ``step`` and ``index``.
            seed: of the run.
            step: of the training.
            index: of the direction.
            out: contiguous tensors like ``params`` to write into and to return, in place of new ones.
        """
        return list(
            self.stream(params, seed, step, index)
            if out is None
            else self._draw(out, _dimension(params), seed, step, index)
        )

    @abstractmethod
    def _draw(self, places: Iterable[Tensor], d: int, seed: int, step: int, index: int) -> Iterator[Tensor]:
        """Write one direction of ``d`` numbers into the tensors of ``places``, and yield each as soon as it is done."""

    def _generator(self, device: torch.device, *key: int) -> torch.Generator:
        # torch's CPU generator keeps 32 bits of its seed: two of many streams may coincide, at unrelated steps only.
        return torch.Generator("cpu" if self.draw_on == "cpu" else device).manual_seed(mix(*key))

    def _normal(self, place: Tensor, *key: int) -> Tensor:
        """Fill a tensor with standard normal numbers, drawn in float32 whatever its dtype."""
        device = torch.device("cpu") if self.draw_on == "cpu" else place.device
        direct = place.device == device and place.dtype == torch.float32
        numbers = place if direct else torch.empty(place.shape, device=device)
        # Drawing is serial in PyTorch and long tensors take long: their pieces have a stream each, so that all threads
        # can draw, and the numbers do not depend on how many there are.
        pieces = numbers.view(-1).split(_PIECE)
        if len(pieces) == 1:
            numbers.normal_(generator=self._generator(device, *key))
        else:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                draw = enumerate(pieces)
                list(pool.map(lambda one: one[1].normal_(generator=self._generator(device, *key, one[0])), draw))
        return place if direct else place.copy_(numbers)


def _dimension(params: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in params)


@dataclass(frozen=True)
class Gaussian(Directions):
    """Standard normal directions, ``u ~ N(0, I)`` (Nesterov & Spokoiny, *Random gradient-free minimization*, 2017)."""

    def _draw(self, places: Iterable[Tensor], d: int, seed: int, step: int, index: int) -> Iterator[Tensor]:
        for position, place in enumerate(places):
            yield self._normal(place, seed, step, index, position)


@dataclass(frozen=True)
class Sphere(Gaussian):
    """Directions uniform on the sphere of radius √d: ``u = √d z / ‖z‖`` with ``z ~ N(0, I)``.

    The distribution of ZO-AdaMM (Chen et al. 2019), whose estimate ``d (f(x + μ′v) − f(x)) v / μ′`` with ``‖v‖ = 1`` is
    ours with ``u = √d v`` and ``μ′ = √d μ``: here ``mu`` is the typical displacement of one weight, at every size.
    """

    def stream(self, params: Sequence[Tensor], seed: int, step: int, index: int) -> Iterator[Tensor]:
        """Draw twice, for the norm and for the values: the price of holding one tensor at a time."""
        scale = self._scale(params, [_norm([z]) for z in super().stream(params, seed, step, index)])
        for z in super().stream(params, seed, step, index):
            yield z.mul_(scale)

    def sample(
        self, params: Sequence[Tensor], seed: int, step: int, index: int, out: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Draw once and normalise in place."""
        z = list(super().stream(params, seed, step, index) if out is None else super()._draw(out, 0, seed, step, index))
        torch._foreach_mul_(z, self._scale(params, [_norm(z)]))
        return z

    @staticmethod
    def _scale(params: Sequence[Tensor], norms: list[Tensor]) -> float:
        return math.sqrt(_dimension(params)) / float(torch.linalg.vector_norm(torch.cat(norms)))


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor, in float32."""
    return torch.stack(list(torch._foreach_norm([t.float() for t in tensors]))).cpu()


@dataclass(frozen=True)
class Rademacher(Directions):
    """Random signs, ``uⱼ = ±1`` with equal probability (SPSA, Spall 1992): four times cheaper to draw than normals."""

    def _draw(self, places: Iterable[Tensor], d: int, seed: int, step: int, index: int) -> Iterator[Tensor]:
        for position, place in enumerate(places):
            generator = self._generator(place.device, seed, step, index, position)
            words = torch.empty(place.numel() // 64 + 1, dtype=torch.int64, device=generator.device)
            words.random_(-(1 << 63), None, generator=generator)
            bits = np.unpackbits(words.cpu().numpy().view(np.uint8), count=place.numel())
            yield place.copy_(torch.from_numpy(bits).view(place.shape)).mul_(2).sub_(1)


@dataclass(frozen=True)
class Coordinate(Directions):
    """One weight at a time: ``u = √d eⱼ`` with ``j`` uniform over all weights (Lian et al. 2016)."""

    def _draw(self, places: Iterable[Tensor], d: int, seed: int, step: int, index: int) -> Iterator[Tensor]:
        j = int(torch.randint(d, (), generator=torch.Generator().manual_seed(mix(seed, step, index))))
        for place in places:
            place.zero_()
            if 0 <= j < place.numel():
                place.view(-1)[j] = math.sqrt(d)
            j -= place.numel()
            yield place


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

    def _draw(self, places: Iterable[Tensor], d: int, seed: int, step: int, index: int) -> Iterator[Tensor]:
        for position, place in enumerate(places):
            key = (seed, step, index, position)
            if place.ndim < 2:
                yield self._normal(place, *key)
                continue
            m, n = place.shape[0], place[0].numel()
            factors = self._normal(torch.empty(m + n, self.rank, device=place.device), *key)
            yield place.copy_((factors[:m] @ factors[m:].T).div_(math.sqrt(self.rank)).view(place.shape))
