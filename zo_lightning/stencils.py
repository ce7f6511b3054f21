"""Finite differences as data: where the loss is asked along a direction, and with which coefficients."""

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stencil(ABC):
    """A finite-difference formula for the slope of ``f`` at ``x`` along ``u``: ``c = Σₖ aₖ f(x + oₖ μ u) / μ``.

    Args:
        mu: the step ``μ`` > 0 along a direction of norm about √d, so the typical displacement of one weight.

    Raises:
        ValueError: ``mu`` is not a positive finite number.
    """

    mu: float = 1e-3
    offsets: ClassVar[tuple[float, ...]]
    coefficients: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mu) and self.mu > 0):
            raise ValueError(f"mu must be a positive finite number such as 1e-3, got {self.mu}")

    def slope(self, losses: Sequence[float]) -> float:
        """The directional derivative ``c`` from the losses at ``offsets``, in their order."""
        return math.fsum(a * loss for a, loss in zip(self.coefficients, losses, strict=True)) / self.mu

    def quotient(self, values: Sequence[Tensor]) -> Tensor:
        """The same of tensors, number by number, in float32 at least."""
        total = torch.zeros_like(values[0], dtype=torch.promote_types(values[0].dtype, torch.float32))
        for a, value in zip(self.coefficients, values, strict=True):
            total.add_(value, alpha=a / self.mu)
        return total


@dataclass(frozen=True)
class ForwardDifference(Stencil):
    """Forward difference ``(f(x + μu) − f(x)) / μ``: error O(μ); ``f(x)`` is shared by all directions of a step."""

    offsets = (0.0, 1.0)
    coefficients = (-1.0, 1.0)


@dataclass(frozen=True)
class CentralDifference(Stencil):
    """Central difference ``(f(x + μu) − f(x − μu)) / 2μ``: error O(μ²), two forward passes per direction."""

    offsets = (1.0, -1.0)
    coefficients = (0.5, -0.5)
