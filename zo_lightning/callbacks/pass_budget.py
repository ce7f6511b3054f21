"""A run that ends when its forward passes are spent."""

import math
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning.modules.driver import driver_of

Schedule = Literal["cosine", "linear", "constant"]

_FACTORS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
}
_ROUNDING = 1e-6


class PassBudget(Callback):
    """Ends a run when its forward passes are spent, and lets the learning rate decay to 0 on the way there.

    Methods ask for different numbers of passes per step, on batches of different sizes; at equal budgets they have seen
    equal numbers of examples pass. What a step costs is taken from the estimator's own count, so that nothing has to be
    said about the method: ``spent = Σ passes · examples / batch_size``, where a step of backpropagation counts three
    passes. Before each step of the optimizer the learning rate is set to ``lr · f(spent / passes)``, with ``f(t) = (1 + cos πt) / 2``
    (cosine; Loshchilov and Hutter 2017) or ``1 − t`` (linear). The run ends before the step that could exceed the
    budget, and takes one step at least. Give the trainer ``max_epochs: -1``; validation may be off.

    Args:
        passes: the budget, in forward passes of ``batch_size`` examples.
        batch_size: the examples of the passes in which the budget is counted, whatever the run's own batches are.
        schedule: how the learning rate decays; ``"constant"`` leaves it, and the run's own scheduler, alone.

    Attributes:
        spent: of the budget, so far.
        seconds: of training, so far, validation included.

    Raises:
        ValueError: ``passes`` is no positive number, ``batch_size`` < 1, or there is no such schedule.
        MisconfigurationException: the run has a scheduler of its own beside that of the budget.
    """

    def __init__(self, passes: float, batch_size: int = 128, schedule: Schedule = "cosine") -> None:
        if not (passes > 0 and math.isfinite(passes)):
            raise ValueError(f"passes must be a positive number, got {passes}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if schedule not in _FACTORS:
            raise ValueError(f"schedule must be one of {', '.join(_FACTORS)}, got {schedule!r}")
        self.passes = passes
        self.batch_size = batch_size
        self.schedule = schedule
        self.spent = 0.0
        self._begun = 0.0  # what was spent where the present step of the optimizer began
        self._largest = 0.0  # of the steps so far
        self._counted = 0  # of the estimator's forward passes, those that are in ``spent`` or from before this budget
        self._seconds = 0.0  # of earlier parts of the run
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Of training, so far."""
        return self._seconds + (0.0 if self._since is None else perf_counter() - self._since)

    def state_dict(self) -> dict[str, Any]:
        """What was spent so far."""
        return {"spent": self.spent, "begun": self._begun, "largest": self._largest, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on spending."""
        self.spent, self._begun, self._largest, self._seconds = (
            state_dict[name] for name in ("spent", "begun", "largest", "seconds")
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a run that has spent its budget is over."""
        if trainer.lr_scheduler_configs and self.schedule != "constant":
            raise MisconfigurationException(
                f"the learning rate follows PassBudget's schedule, {self.schedule}: leave lr_scheduler out (null), or "
                "give PassBudget the schedule 'constant'"
            )
        if trainer.global_step == 0:
            self.spent = self._begun = self._largest = self._seconds = 0.0
        driver = driver_of(trainer, pl_module)
        self._counted = 0 if driver is None else driver.forward_passes  # the module may have been trained before
        for group in _groups(trainer):
            group.setdefault("initial_lr", group["lr"])
        self._stop_at_end(trainer)
        self._since = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate."""
        if self.schedule == "constant":
            return
        factor = _FACTORS[self.schedule](min(1.0, self._begun / self.passes))
        for group in _groups(trainer):
            group["lr"] = group["initial_lr"] * factor

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and end the run where there is nothing left for another."""
        driver = driver_of(trainer, pl_module)
        counted = self._counted + 3 if driver is None else driver.forward_passes
        examples = extract_batch_size(batch) * trainer.world_size
        self.spent += (counted - self._counted) * examples / self.batch_size
        self._counted = counted
        if not trainer.fit_loop._should_accumulate():
            self._largest = max(self._largest, self.spent - self._begun)
            self._begun = self.spent
            self._stop_at_end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, once a GPU has done all that it was asked for."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._seconds, self._since = self.seconds, None

    def _stop_at_end(self, trainer: Trainer) -> None:
        if self.spent > 0 and self.spent + self._largest > self.passes * (1 + _ROUNDING):
            trainer.should_stop = True


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
