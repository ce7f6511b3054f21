"""Image classification by any network, trained by any estimator."""

from typing import Any, Literal

from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from zo_lightning.estimators import GradientEstimator
from zo_lightning.modules.configured import configured
from zo_lightning.modules.memory import Memory
from zo_lightning.modules.mixin import EstimatedGradient
from zo_lightning.modules.processes import of_all_ranks
from zo_lightning.modules.training_step import logs_now
from zo_lightning.optim import AdaMM

Batch = tuple[Tensor, Tensor]


class AutomaticClassifier(LightningModule):
    """A classifier as anyone would write it for automatic optimization; ``Classifier`` adds the estimator.

    Logs ``train/loss``, ``train/acc`` (of one batch, every ``log_every_n_steps``), ``train/loss_epoch`` (of all batches
    of the epoch), ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc``.

    Args:
        net: maps images [B, C, H, W] to logits [B, num_classes].
        optimizer: makes the optimizer from the weights.
        lr_scheduler: makes the LR scheduler from the optimizer; None keeps the learning rate. A ``CosineAnnealingLR``
            with ``T_max`` -1 ends with the run.
        lr_interval: ``"epoch"`` or ``"step"``: when the scheduler steps.
        num_classes: ≥ 2.

    Raises:
        ValueError: ``num_classes`` < 2, or ``lr_interval`` is neither; in a step: labels are no class indices [B], or
            the net's outputs are not [B, C] with C ≥ 2.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = AdaMM,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if lr_interval not in ("epoch", "step"):
            raise ValueError(f"lr_interval must be 'epoch' or 'step', got {lr_interval!r}")
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.train_acc, self.val_acc, self.test_acc = (
            MulticlassAccuracy(num_classes, average="micro", validate_args=False) for _ in range(3)
        )
        self._loss_sum: Tensor | float = 0.0
        self._examples: Tensor | int = 0

    def forward(self, images: Tensor) -> Tensor:
        """The logits [B, num_classes] of images [B, C, H, W]."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The mean cross-entropy of a batch, ``loss``, and those of its examples, ``losses`` [B]."""
        images, labels = batch
        logits = _checked(self(images), labels)
        losses = F.cross_entropy(logits, labels, reduction="none")
        loss = losses.mean()
        # A call of self.log costs as much as a small net's forward pass: only where Lightning passes it on.
        if logs_now(self):
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/acc", self.train_acc(logits, labels))
        return {"loss": loss, "losses": losses}

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the epoch's mean loss."""
        loss = outputs["loss"].detach()
        # A skipped step keeps the loss for which it was skipped. To ask whether it is would wait for a GPU.
        # Out of place: what a checkpoint brought may be on the CPU.
        self._loss_sum = self._loss_sum + loss.nan_to_num(0.0, 0.0, 0.0) * len(batch[1])
        self._examples = self._examples + loss.isfinite() * len(batch[1])

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean loss."""
        if self._examples:
            self.log("train/loss_epoch", self._loss_sum / self._examples, **of_all_ranks(int(self._examples)))
        self._loss_sum, self._examples = 0.0, 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sum behind the epoch's mean loss: a run may go on within an epoch."""
        checkpoint["epoch_loss"] = {"sum": self._loss_sum, "examples": self._examples}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load that sum."""
        saved = checkpoint.get("epoch_loss", {"sum": 0.0, "examples": 0})
        self._loss_sum, self._examples = saved["sum"], saved["examples"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy over the validation set."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy over the test set."""
        self._evaluate(batch, "test", self.test_acc)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """The most likely class [B] of each image; labels, where given, are ignored."""
        return self(batch if isinstance(batch, Tensor) else batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        """Make the optimizer and, where asked for, its scheduler."""
        return configured(self, self.optimizer, self.lr_scheduler, self.lr_interval)

    def _evaluate(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = _checked(self(images), labels)
        accuracy.update(logits, labels)
        shown = {"prog_bar": True, **of_all_ranks(len(labels))}
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), **shown)
        self.log(f"{stage}/acc", accuracy, **shown)


def _checked(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy takes real targets for probabilities, and with one output is 0 whatever the net says."""
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
        raise ValueError(
            f"a classifier needs class indices [B], whole numbers, got {labels.dtype} of shape {tuple(labels.shape)}: "
            "for real targets take Regressor"
        )
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"a classifier's net must give [B, C] with C >= 2 classes, got shape {tuple(logits.shape)}")
    return logits


class Classifier(EstimatedGradient, AutomaticClassifier):
    """Image classification, trained by backpropagation or by forward passes alone: the estimator decides.

    Args:
        net: maps images [B, C, H, W] to logits [B, num_classes].
        estimator: fills the gradients.
        optimizer: makes the optimizer from the weights; AdaMM or anything of ``torch.optim``.
        lr_scheduler: makes the LR scheduler from the optimizer; None keeps the learning rate. A ``CosineAnnealingLR``
            with ``T_max`` -1 ends with the run.
        lr_interval: ``"epoch"`` or ``"step"``: when the scheduler steps.
        mu_follows_lr: scale the estimator's ``mu`` with the learning rate, down to a thousandth.
        memory: ``"lean"`` trains in the memory of inference, ``"full"`` faster, ``"auto"`` chooses by size.
        num_classes: ≥ 2; the command line takes it from the data.

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
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, optimizer, lr_scheduler, lr_interval, num_classes)
        self.estimator = estimator
        self.mu_follows_lr = mu_follows_lr
        self.memory = memory
