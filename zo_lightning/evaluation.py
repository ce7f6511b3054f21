"""How the losses along the directions of a step are obtained."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from zo_lightning.directions import Direction
from zo_lightning.objective import Objective
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Recent, Weights
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
    """One forward pass after the other; the loss at the weights themselves is asked once and shared."""

    def probes(
        self, objective: Objective, weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
    ) -> Iterator[Probe]:
        """Yield one direction after the other, each drawn when it is its turn."""
        centre = None
        if 0.0 in stencil.offsets:  # watched as the others are: some of PyTorch's functions then round differently
            here = Recent(weights, lambda k: weights[k].detach().clone().requires_grad_())  # a loss may write into it
            centre = state.loss_at(objective, weights, here)
        for direction in directions:
            losses = []
            for offset in stencil.offsets:
                if offset == 0.0 and centre is not None:
                    losses.append(centre)
                else:
                    losses.append(state.loss_along(objective, weights, direction, offset * stencil.mu))
            yield direction, tuple(losses)
