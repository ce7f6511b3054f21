"""What the losses of a step become before slopes are taken of them: evolution strategies' fitness shaping."""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

Losses = Sequence[Sequence[float]]
"""Along each direction of a step, the losses at the stencil's offsets."""


@dataclass(frozen=True)
class Shaping(ABC):
    """A function of all losses of a step, increasing in each; slopes are those of its values.

    The estimate is no longer that of the gradient, but of a direction of descent whose length says little: for
    optimizers that normalise it, such as ``NormalizedSGD`` or ``AdaMM``.
    """

    @abstractmethod
    def shaped(self, losses: Losses) -> list[tuple[float, ...]]:
        """The values in the place of the losses, in their order."""


@dataclass(frozen=True)
class CentredRanks(Shaping):
    """The rank of a loss among all of the step, from −1/2 to 1/2; equal losses share the mean of their ranks.

    So an outlier weighs no more than the next loss, and the estimate is the same for every increasing function of the
    loss. With ``Gaussian`` directions and ``CentralDifference`` it is the evolution strategy of Salimans et al.
    (*Evolution strategies as a scalable alternative to reinforcement learning*, 2017).
    """

    def shaped(self, losses: Losses) -> list[tuple[float, ...]]:
        """Ranks in the place of the losses; all 0 where there is one loss only."""
        known = sorted(loss for along in losses for loss in along)
        first = {loss: index for index, loss in reversed(list(enumerate(known)))}
        last = {loss: index for index, loss in enumerate(known)}
        most = len(known) - 1
        return [tuple((first[loss] + last[loss] - most) / (2 * most or 1) for loss in along) for along in losses]


@dataclass(frozen=True)
class Standardised(Shaping):
    """Losses in units of their standard deviation over the directions of the step.

    Steps are long where the loss is flat, and short where it is steep. With ``Rademacher`` directions and
    ``ForwardDifference``, whose ``f(x)`` is no sample of it, it is FZOO's estimate (*Fast zeroth-order optimizer for
    fine-tuning large language models towards Adam-scale speed*, arXiv 2506.09034, 2025) over ``mu``.
    """

    def shaped(self, losses: Losses) -> list[tuple[float, ...]]:
        """Losses over their spread; as they are where they do not differ."""
        at = range(len(losses[0]))
        moved = [loss for k in at if len({along[k] for along in losses}) > 1 for loss in (along[k] for along in losses)]
        spread = statistics.pstdev(moved) if moved else 0.0
        return [tuple(loss / spread if spread else loss for loss in along) for along in losses]
