"""What ``configure_optimizers`` returns for an optimizer and a scheduler that were given from outside."""

from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.exceptions import MisconfigurationException


def configured(
    module: LightningModule,
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None = None,
    lr_interval: str = "epoch",
) -> Any:
    """Make the optimizer of a module's trainable weights, and its scheduler, in the form that Lightning expects.

    A ``CosineAnnealingLR`` with ``T_max`` -1 ends with the run: at ``max_epochs`` of the trainer.

    Args:
        module: owns the weights.
        optimizer: makes the optimizer from the weights.
        lr_scheduler: makes the LR scheduler from the optimizer; None keeps the learning rate.
        lr_interval: ``"epoch"`` or ``"step"``: when the scheduler steps.

    Raises:
        MisconfigurationException: ``T_max`` is -1 and the scheduler counts steps, or the run has no last epoch.
    """
    made = optimizer(p for p in module.parameters() if p.requires_grad)
    if lr_scheduler is None:
        return made
    scheduler = lr_scheduler(made)
    if isinstance(scheduler, torch.optim.lr_scheduler.CosineAnnealingLR) and scheduler.T_max == -1:
        scheduler.T_max = _last_epoch(module, lr_interval)
    config = {"scheduler": scheduler, "interval": lr_interval, "monitor": getattr(scheduler, "monitor", None)}
    return {"optimizer": made, "lr_scheduler": config}


def _last_epoch(module: LightningModule, lr_interval: str) -> int:
    if lr_interval != "epoch":
        raise MisconfigurationException("T_max: -1 stands for max_epochs: with lr_interval 'step' give the steps")
    trainer: Any = module._trainer  # None before a trainer is there: then nothing is trained yet
    last = 1 if trainer is None else trainer.max_epochs
    if last is None or last < 0:
        raise MisconfigurationException(f"T_max: -1 stands for max_epochs, which is {last}: give the epochs")
    return max(1, last)
