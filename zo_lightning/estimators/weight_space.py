"""What estimators along random directions of all weights share: ``ĝ = (1/q) Σᵢ cᵢ uᵢ``."""

import math
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from zo_lightning.directions import Coordinate, Direction, Directions
from zo_lightning.distributed import Distributed, Probed, world_size
from zo_lightning.estimators.base import Estimate, GradientEstimator, resolve_seed
from zo_lightning.objective import NonFiniteLoss, Objective
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights
from zo_lightning.vectors import Vector

Probe = tuple[Direction, float, float]
"""A direction ``uᵢ``, the loss and the slope ``cᵢ`` along it."""


class WeightSpace(GradientEstimator, ABC):
    """What an estimator along random directions of all weights is made of: seeds and slopes are the whole of it.

    Attributes:
        directions: the distribution of ``u``.
        samples: ``q`` ≥ 1.
        seed: of the directions; None takes the one given to ``torch.manual_seed`` or ``seed_everything``.
        distributed: how several processes share the work of a step.
    """

    directions: Directions
    samples: int
    seed: int | None
    distributed: Distributed

    can_be_lean = True
    replays = True

    def expected_cosine(self, d: float, share: float = 1.0, examples: int = 1, spread: float = 1.0) -> float:
        """The expected cosine of ``(1/q) Σᵢ <g, uᵢ> uᵢ`` with ``E[u uᵀ] = I``, for a part of ``d`` weights.

        It is ``√(q / (d + q − 1))`` for all weights together, close to ``√(q/d)`` for q ≪ d, and exactly the root mean
        square of the cosine for q = 1 and ``‖u‖² = d``. One layer of ``d`` weights also gets the noise of all others:
        with its share ``s = ‖g_l‖² / ‖g‖²`` it is ``√s / √(d/q + s(1 − 1/q))``; NaN for ``Coordinate``, whose layers
        never meet. Examples and their spread do not enter.
        """
        if share != 1.0 and isinstance(self.directions, Coordinate):
            return math.nan
        return math.sqrt(share / (d / self.samples + share * (1 - 1 / self.samples)))

    def draw(
        self, weights: Weights, step: int, state: State, lean: bool, indices: Iterable[int]
    ) -> Iterator[Direction]:
        """Directions of a step by index, each drawn in its turn: at once, or lean, tensor by tensor on demand.

        All but the first, whose tensors become the estimate, are drawn into the same memory.
        """
        return self._drawn(resolve_seed(self.seed), weights, step, state, lean, indices)

    def _drawn(
        self, seed: int, weights: Weights, step: int, state: State, lean: bool, indices: Iterable[int]
    ) -> Iterator[Direction]:
        for index in indices:
            direction = self.directions.draw(weights, seed, step, index, weights.still)
            yield direction if lean else direction.hold(state.scratch("direction" if index else "estimate", weights))

    def estimate_along(
        self,
        objective: Objective,
        weights: Weights,
        step: int,
        state: State,
        lean: bool,
        probes: Callable[[Iterator[Direction]], Iterator[Probe]],
        shaped: Callable[[], Sequence[float]] | None = None,
    ) -> Estimate:
        """Probe the ``samples`` directions of a step, with the help of other processes where there are any; average.

        This process probes its part; then all directions are drawn again, and come with the losses and slopes of all.

        Args:
            objective: the loss.
            weights: of this process.
            step: the number of this training step.
            state: of the module.
            lean: as for ``estimate``.
            probes: asks for the losses and slopes along directions.
            shaped: the slopes to take in the place of those, once all directions of this process are probed.

        Raises:
            NonFiniteLoss: a loss of any process is NaN or infinite.
            ValueError: slopes are shaped, and processes split the directions.
        """
        seed = resolve_seed(self.seed)  # that of PyTorch is another one from the first probe on
        drawn = partial(self._drawn, seed, weights, step, state, lean)
        with objective.guard():
            if world_size() == 1 and shaped is None:
                return average(weights, probes(drawn(range(self.samples))), self.samples)
            own = self.distributed.own(self.samples)
            if shaped is not None and len(own) < self.samples:
                raise ValueError("shaped losses are compared within one process: split the data, not the directions")
            probed: list[Probed] = []
            try:
                probed.extend((loss, slope) for _, loss, slope in probes(drawn(own)))
                if shaped is not None:
                    probed = [(loss, slope) for (loss, _), slope in zip(probed, shaped(), strict=True)]
            except NonFiniteLoss as error:
                if world_size() == 1:
                    raise
                # The others learn of it with the losses.
                probed = [(error.value, error.value)] * len(own)
            if world_size() > 1:
                probed = self.distributed.exchange(probed, self.samples, weights, seed, step)
            pairs = zip(drawn(range(self.samples)), probed, strict=True)
            return average(weights, ((direction, *pair) for direction, pair in pairs), self.samples)

    def replay(
        self, weights: Weights, step: int, loss: float, slopes: Sequence[float], state: State, lean: bool = False
    ) -> Estimate:
        """Draw the directions of the step again, and sum them up weighted by its slopes."""
        directions = self.draw(weights, step, state, lean, range(len(slopes)))
        with torch.no_grad():
            probes = ((direction, loss, slope) for direction, slope in zip(directions, slopes, strict=True))
            estimate = average(weights, probes, len(slopes))
        return estimate._replace(loss=torch.tensor(loss, device=weights[0].device))


def average(weights: Weights, probes: Iterable[Probe], samples: int) -> Estimate:
    """``(1/q) Σᵢ cᵢ uᵢ`` and the mean loss, from ``q`` triples (``uᵢ``, loss, ``cᵢ``); held tensors are used up."""
    total, slopes = 0.0, []
    gradients: Vector | None = None
    lean: list[tuple[Direction, float]] = []
    for direction, loss, slope in probes:
        total += loss
        slopes.append(slope)
        if direction.held is None:
            lean.append((direction, slope / samples))
        elif gradients is None:
            gradients = direction.held.mul_(slope / samples)
        else:
            gradients.add_(direction.held, alpha=slope / samples)
    loss = torch.full((), total / samples, device=weights[0].device)  # without a wait for a GPU
    found = zip(weights, gradients.lend(), strict=True) if gradients else _one_by_one(weights, lean)
    return Estimate(loss, found, tuple(slopes))


def _one_by_one(weights: Weights, lean: list[tuple[Direction, float]]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    groups = [(together, [*members]) for together, members in groupby(lean, lambda pair: pair[0].together)]
    for position, p in enumerate(weights):
        gradient: Tensor | None = None
        for together, members in groups:
            if together is not None:
                part = together.sum([c for _, c in members], position)
                gradient = part if gradient is None else gradient.add_(part)
                continue
            for direction, c in members:
                u = direction[position]
                gradient = u.mul_(c) if gradient is None else gradient.add_(u, alpha=c)
                del u  # or it would still be there while the next one is drawn
        assert gradient is not None
        yield p, gradient
        del gradient
