"""How the losses along the directions of a step are obtained."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from zo_lightning.directions import Directions
from zo_lightning.stencils import Stencil


@dataclass(frozen=True)
class Evaluation(ABC):
    """A way to ask an objective for its losses along several directions."""

    @abstractmethod
    def slopes(
        self,
        objective: Callable[[], float],
        params: Sequence[Tensor],
        directions: Directions,
        stencil: Stencil,
        samples: int,
        seed: int,
        step: int,
    ) -> Iterator[tuple[tuple[float, ...], Iterable[Tensor]]]:
        """Yield for each of ``samples`` directions its losses at the stencil's offsets, and its tensors.

        Whenever this yields, returns, raises or is closed, the weights are those from before. The tensors of a
        direction are the caller's to change in place, until the next is asked for; those of the first also to keep as
        ``.grad``, and they may be drawn into the memory of the present ``.grad``, which is thereby lost.
        """


@dataclass(frozen=True)
class InPlace(Evaluation):
    """Perturb the weights themselves, one point after the other, and put them back.

    Args:
        restore: ``"exact"`` keeps a copy of the weights, and they come back bit for bit. ``"replay"`` keeps nothing and
            subtracts what it added, drawing the direction again one tensor at a time (MeZO, Malladi et al. 2023);
            beside ``.grad`` its memory is one tensor of noise, but it is *inexact*: each step leaves a rounding error
            in the weights (in float32 about 2e-6 after 1,000 steps; in bfloat16 percents).

    Raises:
        ValueError: ``restore`` is neither.
    """

    restore: Literal["exact", "replay"] = "exact"

    def __post_init__(self) -> None:
        if self.restore not in ("exact", "replay"):
            raise ValueError(f"restore must be 'exact' or 'replay', got {self.restore!r}")

    @cached_property
    def _copies(self) -> "_Memory":
        return _Memory()

    @cached_property
    def _drawn(self) -> "_Memory":
        return _Memory()

    def slopes(
        self,
        objective: Callable[[], float],
        params: Sequence[Tensor],
        directions: Directions,
        stencil: Stencil,
        samples: int,
        seed: int,
        step: int,
    ) -> Iterator[tuple[tuple[float, ...], Iterable[Tensor]]]:
        """Yield losses and tensors direction after direction; the loss at offset 0 is asked once and shared."""
        centre = objective() if 0.0 in stencil.offsets else None
        saved = self._copies.like(params) if self.restore == "exact" else None
        if saved is not None:
            torch._foreach_copy_(saved, [p.detach() for p in params])
        for index in range(samples):
            if saved is not None:
                out = [_gradient(p) for p in params] if index == 0 else self._drawn.like(params)
                u = directions.sample(params, seed, step, index, out)
                walk = _Exact(params, saved, u, stencil.mu)
                direction: Iterable[Tensor] = u
            else:
                walk = _Replayed(params, lambda i=index: directions.stream(params, seed, step, i), stencil.mu)
                direction = directions.stream(params, seed, step, index)
            losses = []
            try:
                for offset in stencil.offsets:
                    if offset == 0.0 and centre is not None:
                        losses.append(centre)
                    else:
                        walk.to(offset)
                        losses.append(objective())
            finally:
                walk.to(0.0)
            yield tuple(losses), direction


class _Exact:
    """Moves the weights along one direction, each time from a saved copy."""

    def __init__(self, params: Sequence[Tensor], saved: list[Tensor], u: list[Tensor], mu: float) -> None:
        self.params, self.saved, self.u, self.mu = list(params), saved, u, mu
        self.away = False

    @torch.no_grad()
    def to(self, offset: float) -> None:
        if self.away:
            torch._foreach_copy_(self.params, self.saved)
        self.away = offset != 0.0
        if self.away:
            torch._foreach_add_(self.params, self.u, alpha=offset * self.mu)


class _Replayed:
    """Moves the weights along one direction by adding what separates the present point from the next."""

    def __init__(self, params: Sequence[Tensor], stream: Callable[[], Iterator[Tensor]], mu: float) -> None:
        self.params, self.stream, self.mu = params, stream, mu
        self.offset = 0.0

    @torch.no_grad()
    def to(self, offset: float) -> None:
        if offset != self.offset:
            for p, u in zip(self.params, self.stream(), strict=True):
                p.add_(u, alpha=(offset - self.offset) * self.mu)
        self.offset = offset


class _Memory:
    """Tensors like the weights, whose memory is kept from one step to the next.

    Memory that is given back and asked for again comes as new pages, each at the price of a page fault: on a net of
    2.8 million weights those took longer than the arithmetic of the whole step.
    """

    def __init__(self) -> None:
        self._kept = WeakIdKeyDictionary()

    def like(self, params: Sequence[Tensor]) -> list[Tensor]:
        return [self._one(p) for p in params]

    def _one(self, p: Tensor) -> Tensor:
        kept = self._kept.get(p)
        if kept is None or not _alike(kept, p):
            kept = self._kept[p] = torch.empty_like(p, memory_format=torch.contiguous_format)
        return kept

    def __reduce__(self) -> tuple[type["_Memory"], tuple[()]]:
        return type(self), ()


def _gradient(p: Tensor) -> Tensor:
    """Memory for a direction: that of the last step's gradient, where there is one."""
    if p.grad is not None and _alike(p.grad, p) and p.grad.is_contiguous():
        return p.grad.detach()
    return torch.empty_like(p, memory_format=torch.contiguous_format)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device, a.layout) == (b.shape, b.dtype, b.device, b.layout)
