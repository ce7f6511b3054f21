"""Tensors in memory, some of them held out: what examples whose data are no images need."""

from abc import ABC, abstractmethod

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from zo_lightning.data.batches import ShuffledBatches, TensorBatches

Pair = tuple[Tensor, Tensor]


class SplitData(LightningDataModule, ABC):
    """Inputs [n, ...] and targets [n, ...]; a subclass says how to `load` them.

    Args:
        batch_size: examples per batch.
        val_size: the number of training examples that are held out, or their share; 0 validates on the test set.
        seed: decides the split and the order of the batches; None takes PyTorch's own.
        root: folder of files, for those who read some.
    """

    def __init__(
        self, batch_size: int = 128, val_size: int | float = 0, seed: int | None = None, root: str = "data"
    ) -> None:
        super().__init__()
        self.batch_size, self.val_size, self.root = batch_size, val_size, root
        self.seed = torch.initial_seed() if seed is None else seed

    @abstractmethod
    def load(self) -> tuple[Pair, Pair]:
        """The training and the test set."""

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data."""
        (x, y), self.test = self.load()
        if self.val_size < 0:
            raise ValueError(f"val_size={self.val_size} must be at least 0")
        held_out = max(1, round(self.val_size * len(x))) if 0 < self.val_size < 1 else int(self.val_size)
        if held_out >= len(x):
            raise ValueError(f"val_size={self.val_size} must leave some of the {len(x)} training examples")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed % 2**63))
        self.train = x[order[held_out:]], y[order[held_out:]]
        self.val = (x[order[:held_out]], y[order[:held_out]]) if held_out else self.test

    def train_dataloader(self) -> ShuffledBatches:
        """In a new order every epoch."""
        return ShuffledBatches(*self.train, self.batch_size, self.seed)

    def val_dataloader(self) -> TensorBatches:
        """What was held out, or else the test set."""
        return TensorBatches(*self.val, self.batch_size)

    def test_dataloader(self) -> TensorBatches:
        """The test set."""
        return TensorBatches(*self.test, self.batch_size)
