"""What an epoch costs."""

from math import isfinite
from time import perf_counter

from pytorch_lightning import Callback, LightningModule, Trainer


class EpochCost(Callback):
    """Log after every epoch what training has cost.

    ``epoch/seconds``: wall time of this epoch's training steps, without validation. ``epoch/forward_passes``: forward
    passes of a batch since training began, and ``epoch/flops``: floating-point operations, where the module counts them
    (``EstimatedGradient`` does).
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._validation = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began, self._validation = perf_counter(), 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to leave out validation."""
        self._validation -= perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is over."""
        self._validation += perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        pl_module.log("epoch/seconds", perf_counter() - self._began - self._validation)
        for what in ("forward_passes", "flops"):
            spent = getattr(pl_module, what, None)
            if isinstance(spent, int | float) and isfinite(spent):
                pl_module.log(f"epoch/{what}", float(spent))
