"""Schedulers that are made of others, as a configuration can name them."""

import torch
from pytorch_lightning.cli import LRSchedulerCallable
from torch.optim import Optimizer


class SequentialLR(torch.optim.lr_scheduler.SequentialLR):
    """PyTorch's ``SequentialLR``: one scheduler after the other.

    Args:
        optimizer: whose learning rate is scheduled.
        schedulers: each makes one scheduler from the optimizer.
        milestones: the epochs, or steps, at which the next one takes over.

    Raises:
        ValueError: there is not one milestone less than there are schedulers.
    """

    def __init__(self, optimizer: Optimizer, schedulers: list[LRSchedulerCallable], milestones: list[int]) -> None:
        made = [make(optimizer) for make in schedulers]
        super().__init__(optimizer, made, milestones)  # type: ignore[arg-type]  # Lightning's plateau is one of torch's


class ChainedScheduler(torch.optim.lr_scheduler.ChainedScheduler):
    """PyTorch's ``ChainedScheduler``: several schedulers at once, whose factors multiply.

    Args:
        optimizer: whose learning rate is scheduled.
        schedulers: each makes one scheduler from the optimizer.
    """

    def __init__(self, optimizer: Optimizer, schedulers: list[LRSchedulerCallable]) -> None:
        made = [make(optimizer) for make in schedulers]
        super().__init__(made, optimizer)  # type: ignore[arg-type]
