"""Random directions whose rows sum to zero."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from zo_lightning.directions import Direction, Directions, Independent, Rademacher
from zo_lightning.vectors import Vector


@dataclass(frozen=True)
class Centred(Directions):
    """Directions of another distribution less the mean of each row: no unit's weights grow or shrink together.

    ``u = z − (z 1/n) 1ᵀ`` for an ``m × n`` weight, and ``u = z`` for biases; a convolution counts as the matrix
    ``out × (in · kernel)``. So ``E[u uᵀ] = P``, the projection on weights whose rows keep their sums, and estimates
    tend to ``P ∇f``, the centralised gradient (Yong et al., *Gradient centralization*, 2020), in place of ``∇f``. A row
    of a single number stays as it is.

    What flows into a layer behind a ReLU, or as pixels, is not negative: the loss is steepest where all weights of a
    unit move together, and what is to be gained there a bias gains too. On MNIST's smallest net these few directions
    hold about half of the noise ``E‖gᵢ‖²`` of single examples and of the trace of the curvature ``H``; a training
    that does not wander along them stays where both are smaller, and an estimate's best step gains
    ``½ (gᵀPg)² / (E[gᵢᵀPgᵢ] tr PH)`` per example (docs/black_box_results.md).

    Args:
        of: the distribution of ``z``; with ``Sphere``, ``‖u‖ = √d`` as ever, and ``E[u uᵀ] = (d / tr P) P``.
    """

    of: Directions = field(default_factory=Rademacher)

    def _numbers(self, weight: Tensor) -> int:
        return self.of._numbers(weight)

    def _scale(self, direction: Direction, norm: Callable[[], float]) -> float | None:
        return self.of._scale(direction, norm)

    def _fill(self, place: Tensor, direction: Direction, position: int) -> None:
        self.of._fill(place, direction, position)
        weight = direction.weights[position]
        if weight.ndim > 1:
            parts = 2 if weight.is_complex() else 1
            _centre(place.view(1, len(weight), math.prod(weight.shape[1:]), parts))

    def _fill_all(self, rows: Sequence[Vector], flat: Tensor | None, directions: Sequence[Direction]) -> None:
        if flat is None or not isinstance(self.of, Independent):
            super()._fill_all(rows, flat, directions)
            return
        self.of._fill_all(rows, flat, directions)
        for start, weight in zip(directions[0].starts, directions[0].weights, strict=False):
            if weight.ndim > 1:
                shape = len(flat), len(weight), math.prod(weight.shape[1:]), 1
                _centre(flat[:, start : start + weight.numel()].view(shape))


def _centre(matrices: Tensor) -> None:
    """Subtract the means of the rows of matrices [directions, m, n, parts of a number]."""
    matrices.sub_(matrices.mean(2, keepdim=True))
