"""Regression by any network, trained by any estimator."""

from typing import Any, Literal

from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning.estimators import GradientEstimator
from zo_lightning.modules.configured import configured
from zo_lightning.modules.memory import Memory
from zo_lightning.modules.mixin import EstimatedGradient
from zo_lightning.modules.processes import of_all_ranks
from zo_lightning.modules.training_step import logs_now
from zo_lightning.optim import AdaMM

Batch = tuple[Tensor, Tensor]


class AutomaticRegressor(LightningModule):
    """A regression by least squares, as anyone would write it for automatic optimization; see ``Regressor``.

    Logs ``train/loss`` (of one batch, every ``log_every_n_steps``), ``val/loss``, ``val/mae``, ``test/loss`` and
    ``test/mae``: mean squared and mean absolute errors, in the targets' units squared and in their units.

    Args:
        net: maps inputs [B, ...] to predictions, in the shape of the targets or in that with a last dimension of 1.
        optimizer: makes the optimizer from the weights.
        lr_scheduler: makes the LR scheduler from the optimizer; None keeps the learning rate. A ``CosineAnnealingLR``
            with ``T_max`` -1 ends with the run.
        lr_interval: ``"epoch"`` or ``"step"``: when the scheduler steps.

    Raises:
        ValueError: ``lr_interval`` is neither; in a step: shapes of predictions and targets differ.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = AdaMM,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        if lr_interval not in ("epoch", "step"):
            raise ValueError(f"lr_interval must be 'epoch' or 'step', got {lr_interval!r}")
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval

    def forward(self, inputs: Tensor) -> Tensor:
        """The predictions for inputs [B, ...]."""
        return self.net(inputs)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The mean squared error of a batch, ``loss``, and those of its examples, ``losses`` [B]."""
        predictions, targets = self._pair(batch)
        losses = F.mse_loss(predictions, targets, reduction="none").mean(1)
        loss = losses.mean()
        if logs_now(self):
            self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss, "losses": losses}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the errors over the validation set."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the errors over the test set."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """The predictions; targets, where given, are ignored."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> Any:
        """Make the optimizer and, where asked for, its scheduler."""
        return configured(self, self.optimizer, self.lr_scheduler, self.lr_interval)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        predictions, targets = self._pair(batch)
        shown = {"prog_bar": True, **of_all_ranks(len(targets))}
        self.log(f"{stage}/loss", F.mse_loss(predictions, targets), **shown)
        self.log(f"{stage}/mae", F.l1_loss(predictions, targets), **shown)

    def _pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions and targets [B, k]: of unlike shapes, the loss would pair every example with every other."""
        inputs, targets = batch
        predictions = self(inputs)
        if predictions.ndim == targets.ndim + 1 and predictions.shape[-1] == 1:
            predictions = predictions[..., 0]
        if targets.ndim == predictions.ndim + 1 and targets.shape[-1] == 1:
            targets = targets[..., 0]
        if predictions.shape != targets.shape:
            raise ValueError(
                f"a regressor's net must give the shape of the targets, {tuple(targets.shape)}, "
                f"got {tuple(predictions.shape)}"
            )
        size = len(targets)
        return predictions.reshape(size, -1), targets.reshape(size, -1).to(predictions.dtype)


class Regressor(EstimatedGradient, AutomaticRegressor):
    """Regression by least squares, trained by backpropagation or by forward passes alone: the estimator decides.

    Args:
        net: maps inputs [B, ...] to predictions, in the shape of the targets or in that with a last dimension of 1.
        estimator: fills the gradients.
        optimizer: makes the optimizer from the weights; AdaMM or anything of ``torch.optim``.
        lr_scheduler: makes the LR scheduler from the optimizer; None keeps the learning rate.
        lr_interval: ``"epoch"`` or ``"step"``: when the scheduler steps.
        mu_follows_lr: scale the estimator's ``mu`` with the learning rate, down to a thousandth.
        memory: ``"lean"`` trains in the memory of inference, ``"full"`` faster, ``"auto"`` chooses by size.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        net: nn.Module,
        estimator: GradientEstimator,
        optimizer: OptimizerCallable = AdaMM,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        mu_follows_lr: bool = False,
        memory: Memory = "auto",
    ) -> None:
        super().__init__(net, optimizer, lr_scheduler, lr_interval)
        self.estimator = estimator
        self.mu_follows_lr = mu_follows_lr
        self.memory = memory
