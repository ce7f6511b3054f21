"""What a run costs, and its curves against that."""

import resource
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from math import isfinite, nan
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning.modules.driver import driver_of, say_if_unused
from zo_lightning.callbacks.reporting import log_scalars, tensorboards
from zo_lightning.costs import FlopMeter
from zo_lightning.modules.training_step import logs_now

AXES = "flops", "forward_passes", "seconds"
_UNIT = {"flops": 1e6}  # TensorBoard's axis knows whole numbers up to 9e18 only


class Budget(Callback):
    """Counts what a run costs, in any module, and draws every curve against that too.

    Logs, whenever the trainer logs, ``budget/flops`` (floating-point operations of all training steps, as
    ``FlopMeter`` counts them, on this process), ``budget/forward_passes`` (of a batch; a step of backpropagation counts
    three), ``budget/examples``, ``budget/seconds`` (since the start, validation included), ``budget/peak_memory_mb`` (of
    the GPU, or of the process) and ``budget/steps_per_second``.

    In TensorBoard each scalar of the run, whoever logs it, appears a second time as ``vs_flops/<tag>``, whose horizontal
    axis is what the run has spent, so that methods are compared at equal cost; other loggers have the columns for that.

    Args:
        axis: what that axis shows: ``"flops"``, in millions; ``"forward_passes"``, where the loss is no net of PyTorch
            and calls of it are what is scarce; or ``"seconds"``. The tag is ``vs_<axis>``.
        measure_flops: False leaves a module in automatic optimization unwatched, should watching harm it; an
            ``EstimatedGradient`` and ``GradientFree`` count by themselves.

    Raises:
        ValueError: there is no such axis.
    """

    def __init__(
        self, axis: Literal["flops", "forward_passes", "seconds"] = "flops", measure_flops: bool = True
    ) -> None:
        if axis not in AXES:
            raise ValueError(f"axis must be one of {', '.join(AXES)}, got {axis!r}")
        self.axis = axis
        self.measure_flops = measure_flops
        self.forward_passes = 0
        self.flops = 0.0
        self.examples = 0
        self._seconds = 0.0
        self._meter = FlopMeter()
        self._measured = ExitStack()
        self._since = self._logged_at = time.perf_counter()
        self._logged_step = 0

    @property
    def seconds(self) -> float:
        """Since the start of training."""
        return self._seconds + time.perf_counter() - self._since

    @property
    def state_key(self) -> str:
        """One budget per run."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What was spent so far."""
        counts = {"forward_passes": self.forward_passes, "examples": self.examples, "seconds": self.seconds}
        return {**counts, "flops": self._meter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.forward_passes, self.examples = state_dict["forward_passes"], state_dict["examples"]
        self._seconds = state_dict["seconds"]
        self._meter.load_state_dict(state_dict["flops"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add the logger that draws against the cost; say so where a module's estimator is not used."""
        if stage == "fit":
            say_if_unused(trainer, pl_module)
        if stage == "fit" and trainer.loggers:
            self.teardown(trainer, pl_module, stage)  # a run that failed has left its own
            trainer.loggers = [*trainer.loggers, _AgainstCost(self, trainer)]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove that logger."""
        trainer.loggers = [logger for logger in trainer.loggers if not isinstance(logger, _AgainstCost)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        if trainer.global_step == 0:
            self.forward_passes, self.examples, self._seconds, self._meter = 0, 0, 0.0, FlopMeter()
        self._since = self._logged_at = time.perf_counter()
        self._logged_step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to count the step, where the module does not."""
        if self.measure_flops and driver_of(trainer, pl_module) is None:
            self._measured.enter_context(self._meter.step(pl_module, batch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log whenever the trainer does."""
        self._measured.close()
        if (driver := driver_of(trainer, pl_module)) is not None:
            self.forward_passes, self.flops = driver.forward_passes, driver.flops
        else:
            self.forward_passes += 3
            self.flops = self._meter.total if self.measure_flops else nan
        self.examples += _size(batch) * trainer.world_size
        if not logs_now(pl_module):
            return
        now = time.perf_counter()
        speed = (trainer.global_step - self._logged_step) / (now - self._logged_at)
        self._logged_at, self._logged_step = now, trainer.global_step
        values = {
            "budget/examples": self.examples,
            "budget/seconds": self.seconds,
            "budget/peak_memory_mb": peak_memory(pl_module.device) / 2**20,
            "budget/steps_per_second": speed,
        }
        if driver is None:  # which logs these by itself
            values |= {"budget/forward_passes": self.forward_passes, "budget/flops": self.flops}
        log_scalars(trainer, values)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the count of a step that was begun and called off."""
        self._measured.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the count of the step that failed."""
        self._measured.close()


class _AgainstCost(Logger):
    """Draws what the trainer logs in TensorBoard a second time, at what was spent in place of the step."""

    def __init__(self, budget: Budget, trainer: Trainer) -> None:
        super().__init__()
        self._budget = budget
        self._trainer = trainer

    @property
    def name(self) -> str | None:
        return None

    @property
    def version(self) -> int | str | None:
        return None

    @property
    def experiment(self) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        axis = self._budget.axis
        spent = getattr(self._budget, axis) / _UNIT.get(axis, 1)
        if not self._trainer.is_global_zero or not isfinite(spent):
            return
        for writer in tensorboards(self._trainer):
            for tag, value in metrics.items():
                if tag not in ("epoch", f"budget/{axis}"):
                    writer.add_scalar(f"vs_{axis}/{tag}", value, round(spent))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: allocated on a GPU, or resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def _size(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:  # nothing in it has a size
        return 0
