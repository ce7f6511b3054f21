"""Which step a finite difference should take: where slopes at neighbouring steps agree best."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

RATIO = math.sqrt(10)
"""From one step of the grid to the next."""
GRID = tuple(float(f"{10 ** (k / 2):.2g}") for k in range(-12, 2))
"""From 1e-6 to 3.2."""

_GOOD = 0.1
"""A relative error of slopes that no training notices: that of the few directions of an estimate is far larger."""
_AGREE = 0.5


@dataclass
class StepScan:
    """The relative error of slopes at each of a grid of steps, from how slopes change from one step to the next.

    A slope at step ``μ`` has a rounding error ``ε / μ`` and a truncation error ``τ μ`` (``τ μ²`` for a central
    difference of a smooth function), and the best step balances them (Moré & Wild, *Estimating derivatives of noisy
    functions*, 2012). Here both are read off the slopes themselves. With steps in the ratio ``r``, rounding makes the
    change from the step below ``√(r² + 1)`` times as large as the error at ``μ``, and truncation makes the change to
    the step above at least ``r − 1`` times as large:

    ``error² = (change from below)² / (r² + 1) + (change to above)² / (r − 1)²``,

    in mean squares over directions and batches, as a share of the slopes'. Nothing is assumed of where noise comes
    from: float arithmetic, a device that never answers twice alike, or jumps of a loss that is constant between them.
    Steps so small that a piecewise constant loss does not change have no slopes at all, and an infinite error.

    Args:
        grid: the steps, ascending, in the ratio ``RATIO``.

    Attributes:
        squares: of the slopes at each step, summed up.
        changes: squares of the changes from each step to the next, summed up; infinite where a loss was.
    """

    grid: Sequence[float] = GRID
    squares: list[float] = field(init=False)
    changes: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.squares = [0.0] * len(self.grid)
        self.changes = [0.0] * (len(self.grid) - 1)

    def add(self, slopes: Iterable[Tensor | None]) -> None:
        """Add the slopes along some directions, or anything linear in them, such as an estimate of the gradient.

        Args:
            slopes: at each step of the grid in its order, along the same directions; None where a loss was not finite.
        """
        below: Tensor | None = None
        for k, here in enumerate(slopes):
            self.squares[k] += math.inf if here is None else float(here.double().square().sum())
            if k:
                lost = here is None or below is None
                self.changes[k - 1] += math.inf if lost else float((here - below).double().square().sum())  # type: ignore[operator]
            below = here

    @property
    def errors(self) -> tuple[float, ...]:
        """The relative error at each step, a root mean square; infinite at both ends, which lack a neighbour."""
        shares = [self._share(k) for k in range(len(self.changes))]
        inner = [
            math.sqrt(below / (RATIO**2 + 1) + above / (RATIO - 1) ** 2)
            for below, above in zip(shares, shares[1:], strict=False)
        ]
        return (math.inf, *inner, math.inf)

    @property
    def best(self) -> float | None:
        """One of the steps whose error is at most 10 %, or else that of the smallest; None where all are infinite.

        Three quarters up: slopes get smaller while a net is trained, and rounding does not.
        """
        errors = self.errors
        if not math.isfinite(least := min(errors)):
            return None
        good = [step for step, error in zip(self.grid, errors, strict=True) if error <= max(_GOOD, least)]
        return good[3 * len(good) // 4]

    @property
    def agrees(self) -> bool:
        """Whether there is a step at which slopes are mostly slope, not error."""
        return min(self.errors) <= _AGREE

    def _share(self, k: int) -> float:
        """The squared change from step ``k`` to the next, as a share of the smaller slopes' squares."""
        smaller = min(self.squares[k], self.squares[k + 1])
        return self.changes[k] / smaller if smaller > 0 and math.isfinite(smaller) else math.inf
