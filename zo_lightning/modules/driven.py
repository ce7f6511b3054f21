"""What can be asked of whoever has a driver: how far it is, and what it spent."""

from zo_lightning.estimators import GradientEstimator
from zo_lightning.modules.driver import Driver
from zo_lightning.modules.processes import splits_data
from zo_lightning.objective import Objective
from zo_lightning.perturbed.state import State


class Driven:
    """Trains by an estimator: what ``EstimatedGradient`` and ``GradientFree`` share."""

    estimator: GradientEstimator
    _driver: Driver

    @property
    def splits_data(self) -> bool:
        """Whether each of several processes must be given a batch of its own."""
        return splits_data(self.estimator)

    @property
    def estimator_state(self) -> State:
        """What the estimator has learned about the module; saved with checkpoints."""
        return self._driver.state

    @property
    def forward_passes(self) -> int:
        """Forward passes of a batch spent so far; backpropagation counts three per batch."""
        return self._driver.forward_passes

    @property
    def skipped_steps(self) -> int:
        """Batches skipped so far."""
        return self._driver.skipped_steps

    @property
    def flops(self) -> float:
        """Floating-point operations spent so far; NaN where they cannot be counted."""
        return self._driver.flops

    @property
    def mu_in_use(self) -> float | None:
        """The finite-difference step in use, or None where the estimator has none."""
        return self._driver.mu_in_use

    @property
    def estimated_objective(self) -> Objective | None:
        """The loss whose gradient was estimated last, until the end of its batch, for callbacks that ask it again."""
        return self._driver.estimated_objective
