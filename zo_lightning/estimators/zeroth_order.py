"""Zeroth order: the gradient from loss values alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean

from torch import nn
from typing_extensions import Self

from zo_lightning.counter import mix
from zo_lightning.directions import Direction, Directions, Rademacher
from zo_lightning.distributed import Distributed
from zo_lightning.estimators.base import Estimate, check_samples, resolve_seed, trained
from zo_lightning.estimators.weight_space import Probe, WeightSpace
from zo_lightning.evaluation import Evaluation, OneByOne
from zo_lightning.objective import Objective
from zo_lightning.perturbed.state import State
from zo_lightning.shaping import Shaping
from zo_lightning.stencils import CentralDifference, Stencil


@dataclass(frozen=True)
class ZerothOrder(WeightSpace):
    """Finite differences along random directions of all weights together, ``ĝ = (1/q) Σᵢ cᵢ uᵢ``.

    ``cᵢ`` is the stencil's slope of the loss along ``uᵢ``. No autograd graph is built, and no weight is written: a
    forward pass sees ``x + μ u`` wherever it uses weights. With the sphere, ``q = 1`` and the forward difference it is
    the estimator of ZO-AdaMM (Chen et al., *ZO-AdaMM*, NeurIPS 2019).

    What a batch of ``b`` examples should be: for ``q ≪ d`` the squared error of ``ĝ``, times the examples passed to
    get it, is about ``d (s² + b ‖∇f‖²) (q + 1) / q`` with ``ForwardDifference`` and ``2 d (s² + b ‖∇f‖²)`` with
    ``CentralDifference``, where ``s²`` is the mean squared distance of an example's gradient from their mean. So many
    forward differences on a small batch cost half as much as central ones, and ``b`` below ``s² / ‖∇f‖²`` (hundreds,
    on MNIST) gains no more.

    Args:
        directions: the distribution of ``u``; signs are the cheapest to draw, and as good on nets.
        stencil: the finite difference, and its ``mu``.
        evaluation: how the losses are obtained.
        samples: ``q`` ≥ 1, the directions averaged in one step; ``CentralDifference`` asks 2q forward passes,
            ``ForwardDifference`` q + 1.
        seed: of the directions and of dropout masks; None takes the one given to ``torch.manual_seed`` or
            ``seed_everything``.
        shaping: what the losses of a step become before slopes are taken, such as ``CentredRanks()``; None leaves them.
            Directions are then drawn a second time.
        distributed: how several processes share the work of a step.

    Raises:
        ValueError: ``samples`` < 1, or losses are shaped and there are fewer than two directions; in a step, losses are
            shaped and several processes split the directions.
    """

    directions: Directions = field(default_factory=Rademacher)
    stencil: Stencil = field(default_factory=CentralDifference)
    evaluation: Evaluation = field(default_factory=OneByOne)
    samples: int = 1
    seed: int | None = None
    shaping: Shaping | None = None
    distributed: Distributed = field(default_factory=Distributed)

    def __post_init__(self) -> None:
        check_samples(self.samples)
        if self.shaping is not None and self.samples < 2:
            raise ValueError(
                f"losses are shaped by comparing directions: take samples of 2 or more, got {self.samples}"
            )

    @property
    def mu(self) -> float:
        """The stencil's."""
        return self.stencil.mu

    def with_mu(self, mu: float) -> Self:
        """The same estimator with another ``mu``."""
        return replace(self, stencil=replace(self.stencil, mu=mu))

    def estimate(
        self, objective: Objective, module: nn.Module, step: int, state: State, lean: bool = False
    ) -> Estimate:
        """Probe the loss along ``samples`` directions and sum them up, each weighted by its slope."""
        objective.begin(mix(resolve_seed(self.seed), step))
        weights = trained(objective, module)
        offsets = self.stencil.offsets
        known: list[tuple[float, ...]] = []

        def probes(directions: Iterator[Direction]) -> Iterator[Probe]:
            for direction, losses in self.evaluation.probes(objective, weights, directions, self.stencil, state):
                known.append(losses)
                loss = losses[offsets.index(0.0)] if 0.0 in offsets else fmean(losses)
                yield direction, loss, self.stencil.slope(losses)

        def shaped() -> list[float]:
            assert self.shaping is not None
            return [self.stencil.slope(losses) for losses in self.shaping.shaped(known)]

        lean = lean or self.evaluation.draws
        return self.estimate_along(objective, weights, step, state, lean, probes, shaped if self.shaping else None)
