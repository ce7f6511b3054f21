"""What a run costs, and its curves against that."""

import resource
import sys
import time
from argparse import Namespace
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning.callbacks.reporting import log_scalars, tensorboards
from zo_lightning.modules import EstimatedGradient
from zo_lightning.modules.mixin import logs_now

PREFIX = "by_forward_passes/"


class Budget(Callback):
    """Counts forward passes, examples, seconds, memory and speed, and draws every curve against forward passes too.

    Logs ``budget/forward_passes`` (of a batch; a step of backpropagation counts three), ``budget/examples``,
    ``budget/seconds`` (since the start, validation included), ``budget/peak_memory_mb`` (of the GPU, or of the process)
    and ``budget/steps_per_second``, whenever the trainer logs. In TensorBoard each scalar of the run, whoever logs it,
    appears a second time as ``by_forward_passes/<tag>``, whose horizontal axis is the number of forward passes, so that
    first and zeroth order are compared at equal cost; other loggers have the column ``budget/forward_passes`` for that.
    """

    def __init__(self) -> None:
        self.forward_passes = 0
        self.examples = 0
        self.seconds = 0.0
        self._since = self._logged_at = time.perf_counter()
        self._logged_step = 0

    @property
    def state_key(self) -> str:
        """One budget per run."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What was spent so far."""
        seconds = self.seconds + time.perf_counter() - self._since
        return {"forward_passes": self.forward_passes, "examples": self.examples, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.forward_passes, self.examples = state_dict["forward_passes"], state_dict["examples"]
        self.seconds = state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add the logger that draws against forward passes."""
        if stage == "fit" and trainer.loggers:
            self.teardown(trainer, pl_module, stage)  # a run that failed has left its own
            trainer.loggers = [*trainer.loggers, _AgainstForwardPasses(self, trainer)]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove that logger."""
        trainer.loggers = [logger for logger in trainer.loggers if not isinstance(logger, _AgainstForwardPasses)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        if trainer.global_step == 0:
            self.forward_passes, self.examples, self.seconds = 0, 0, 0.0
        self._since = self._logged_at = time.perf_counter()
        self._logged_step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log whenever the trainer does."""
        estimated = isinstance(pl_module, EstimatedGradient)
        self.forward_passes = pl_module.forward_passes if estimated else self.forward_passes + 3
        self.examples += _size(batch) * trainer.world_size
        if not logs_now(pl_module):
            return
        now = time.perf_counter()
        speed = (trainer.global_step - self._logged_step) / (now - self._logged_at)
        self._logged_at, self._logged_step = now, trainer.global_step
        values = {
            "budget/examples": self.examples,
            "budget/seconds": self.seconds + now - self._since,
            "budget/peak_memory_mb": peak_memory(pl_module.device) / 2**20,
            "budget/steps_per_second": speed,
        }
        if not estimated:  # which logs it by itself
            values["budget/forward_passes"] = self.forward_passes
        log_scalars(trainer, values)


class _AgainstForwardPasses(Logger):
    """Draws what the trainer logs in TensorBoard a second time, at the forward passes in place of the step."""

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
        if not self._trainer.is_global_zero:
            return
        for writer in tensorboards(self._trainer):
            for tag, value in metrics.items():
                if tag not in ("epoch", "budget/forward_passes"):
                    writer.add_scalar(PREFIX + tag, value, self._budget.forward_passes)

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
