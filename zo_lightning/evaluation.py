"""How the losses along the directions of a step are obtained."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from zo_lightning.black_box import BlackBoxLoss
from zo_lightning.directions import Direction
from zo_lightning.objective import Objective, check_loss
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Recent, Value, Weights
from zo_lightning.stencils import Stencil

Probe = tuple[Direction, tuple[float, ...]]
"""A direction, and the losses at the stencil's offsets along it."""


@dataclass(frozen=True)
class Evaluation(ABC):
    """A way to ask an objective for its losses along several directions."""

    @abstractmethod
    def probes(
        self, objective: Objective, weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
    ) -> Iterator[Probe]:
        """Yield each direction with its losses at the stencil's offsets. Weights are displaced where they are used.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite.
        """


@dataclass(frozen=True)
class OneByOne(Evaluation):
    """One forward pass after the other; the loss at the weights themselves is asked once and shared.

    A black box that takes many candidates (``BlackBox.after``) then gets the outputs of all passes of the step at once.
    """

    def probes(
        self, objective: Objective, weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
    ) -> Iterator[Probe]:
        """Yield one direction after the other, each drawn when it is its turn."""
        loss = objective.loss
        if isinstance(loss, BlackBoxLoss) and loss.takes_many:
            yield from _together(loss, objective, weights, directions, stencil, state)
            return
        centre = state.loss_at(objective, weights, _here(weights)) if 0.0 in stencil.offsets else None
        for direction in directions:
            losses = []
            for offset in stencil.offsets:
                if offset == 0.0 and centre is not None:
                    losses.append(centre)
                else:
                    losses.append(state.loss_along(objective, weights, direction, offset * stencil.mu))
            yield direction, tuple(losses)


@dataclass(frozen=True)
class Told(Evaluation):
    """Losses that someone else has found at the points of a step.

    Args:
        losses: at the weights themselves, if the stencil asks there, then along one direction after the other.
    """

    losses: Sequence[float]

    def probes(
        self, objective: Objective, weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
    ) -> Iterator[Probe]:
        """Yield each direction with its losses among those told; nothing is asked."""
        told = iter(self.losses)
        centre = next(told) if 0.0 in stencil.offsets else 0.0
        for direction in directions:
            yield direction, tuple(next(told) if offset else centre for offset in stencil.offsets)


def points(
    weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
) -> Iterator[tuple[Direction | None, Value]]:
    """The points of a step in the order of ``Told``, each until the next, with its direction."""
    if 0.0 in stencil.offsets:
        yield None, _here(weights)
    for direction in directions:
        for offset in stencil.offsets:
            if offset:
                yield direction, state.along(weights, direction, offset * stencil.mu)


def _together(
    loss: BlackBoxLoss,
    objective: Objective,
    weights: Weights,
    directions: Iterable[Direction],
    stencil: Stencil,
    state: State,
) -> Iterator[Probe]:
    """Run the part in PyTorch at one point after the other, then let the black box find all losses."""
    candidates: list[Any] = []
    drawn: dict[int, Direction] = {}
    for direction, value in points(weights, directions, stencil, state):
        candidates.append(state.run(objective, weights, value, partial(objective.ask, loss.front)))
        if direction is not None:
            drawn.setdefault(id(direction), direction)
    losses = [check_loss(one) for one in objective.ask(lambda: loss.box.evaluate(candidates), cost=0)]
    objective.values += losses
    # The next direction was drawn into the memory of the one before.
    again = (u if u.held is None else u.hold(u.held) for u in drawn.values())
    yield from Told(losses).probes(objective, weights, again, stencil, state)


def _here(weights: Weights) -> Value:
    """The weights themselves, watched as other points are: some of PyTorch's functions then round differently."""
    return Recent(weights, lambda k: weights[k].detach().clone().requires_grad_())  # a loss may write into it
