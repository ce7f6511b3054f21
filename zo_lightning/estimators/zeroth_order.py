"""Zeroth order: the gradient from loss values alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn

from zo_lightning.directions import Directions, Sphere, mix
from zo_lightning.estimators.base import GradientEstimator, check_samples, estimate, resolve_seed, trainable
from zo_lightning.evaluation import Evaluation, InPlace
from zo_lightning.objective import Objective
from zo_lightning.stencils import CentralDifference, Stencil


@dataclass(frozen=True)
class ZerothOrder(GradientEstimator):
    """Finite differences along random directions of all weights together, ``ĝ = (1/q) Σᵢ cᵢ uᵢ``.

    ``cᵢ`` is the stencil's slope of the loss along ``uᵢ``. No autograd graph is built. With the sphere, ``q = 1`` and
    the forward difference it is the estimator of ZO-AdaMM (Chen et al., *ZO-AdaMM*, NeurIPS 2019).

    What a batch of ``b`` examples should be: for ``q ≪ d`` the squared error of ``ĝ``, times the examples passed to
    get it, is about ``d (s² + b ‖∇f‖²) (q + 1) / q`` with ``ForwardDifference`` and ``2 d (s² + b ‖∇f‖²)`` with
    ``CentralDifference``, where ``s²`` is the mean squared distance of an example's gradient from their mean. So many
    forward differences on a small batch cost half as much as central ones, and ``b`` below ``s² / ‖∇f‖²`` (hundreds,
    on MNIST) gains no more.

    Args:
        directions: the distribution of ``u``.
        stencil: the finite difference, and its ``mu``.
        evaluation: how the losses are obtained.
        samples: ``q`` ≥ 1, the directions averaged in one step; ``CentralDifference`` asks 2q forward passes,
            ``ForwardDifference`` q + 1.
        seed: of the directions and of dropout masks; None takes the one given to ``torch.manual_seed`` or
            ``seed_everything``.

    Raises:
        ValueError: ``samples`` < 1.
    """

    directions: Directions = field(default_factory=Sphere)
    stencil: Stencil = field(default_factory=CentralDifference)
    evaluation: Evaluation = field(default_factory=InPlace)
    samples: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @torch.no_grad()
    def backward(self, loss: Callable[[], Tensor] | Objective, module: nn.Module, step: int) -> Tensor:
        """Probe the loss along ``samples`` directions and sum them up, each weighted by its slope."""
        seed = resolve_seed(self.seed)
        objective = Objective.of(loss, module, seed=mix(seed, step))
        params = trainable(module)
        probes = self.evaluation.slopes(objective, params, self.directions, self.stencil, self.samples, seed, step)
        centred = 0.0 in self.stencil.offsets
        return estimate(
            params,
            (
                (losses[self.stencil.offsets.index(0.0)] if centred else fmean(losses), self.stencil.slope(losses), u)
                for losses, u in probes
            ),
            self.samples,
        )
