"""The base of every data set here: images in memory, a validation split decided by a seed, batches sliced."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from zo_lightning.data.batches import Augmentation, ShuffledBatches, TensorBatches, random_stream


class InMemoryDataModule(LightningDataModule, ABC):
    """Images for classification, held in memory. A subclass states three constants and how to `load`.

    Batches are ``(images, labels)``: float32 ``(n, in_channels, image_size, image_size)`` in [0, 1], int64 ``(n,)``.
    ``val_size`` images of the training set, or that share of them, chosen by the seed, are for validation; the test set
    is for testing and prediction. Raises ``ValueError`` for arguments out of range, and in `setup` for data that are
    not as stated.

    Args:
        batch_size: Images per batch (over all processes); the last batch of an epoch may be smaller.
        val_size: Images taken from the training set for validation, or the share of them where it is below 1; 0 trains
            on all and validates on the test set.
        seed: Decides the validation split and, together with the epoch, the order of the training images; None takes
            the one given to ``torch.manual_seed`` or ``seed_everything``.
    """

    num_classes: ClassVar[int]
    in_channels: ClassVar[int]
    image_size: ClassVar[int]
    """Height and width of an image, in pixels."""
    augmentation: Augmentation | None = None
    """Of training images; a subclass that has one sets it."""

    def __init__(self, batch_size: int = 128, val_size: int | float = 0, seed: int | None = None) -> None:
        super().__init__()
        whole = 0 if isinstance(val_size, float) and 0 < val_size < 1 else val_size
        for name, value, least in (("batch_size", batch_size, 1), ("val_size", whole, 0), ("seed", seed or 0, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        self.batch_size = batch_size
        self.val_size = val_size
        self.seed = torch.initial_seed() if seed is None else seed
        self._subsets: dict[str, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return the training or the test set.

        Images are uint8 (0 to 255) or float32 (0 to 1), ``(N, in_channels, image_size, image_size)``;
        labels are int64, ``(N,)``.
        """

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once, whatever the stage."""
        if self._subsets:
            return
        images, labels = self._load_checked(train=True)
        test = self._load_checked(train=False)
        val_size = self._held_out(len(images))
        if val_size >= len(images):
            raise ValueError(
                f"val_size={val_size} must be below the number of training images, {len(images)}: "
                "none would be left to train on"
            )
        if val_size == 0:
            self._subsets = {"train": (images, labels), "val": test, "test": test}
            return
        shuffled = torch.randperm(len(images), generator=random_stream("split", self.seed))
        val, train = shuffled[:val_size], shuffled[val_size:]
        self._subsets = {"train": (images[train], labels[train]), "val": (images[val], labels[val]), "test": test}

    def train_dataloader(self) -> TensorBatches:
        """Return the training batches, in a new order every epoch (in a fixed one under ``overfit_batches``)."""
        # Lightning sets this attribute dynamically.
        if getattr(self.trainer, "overfit_batches", 0) > 0:
            return self._sequential("train")
        rank, world_size = self._rank_and_world_size()
        return ShuffledBatches(
            *self._subset("train"),
            self.batch_size,
            self.seed,
            rank=rank,
            world_size=world_size,
            progress=self._training_progress,
            augmentation=self.augmentation,
        )

    def val_dataloader(self) -> TensorBatches:
        """Return the validation batches, in a fixed order."""
        return self._sequential("val")

    def test_dataloader(self) -> TensorBatches:
        """Return the test batches, in a fixed order."""
        return self._sequential("test")

    def predict_dataloader(self) -> TensorBatches:
        """Return the test batches, in a fixed order."""
        return self._sequential("test")

    def _held_out(self, images: int) -> int:
        """How many images of so many are for validation."""
        return self.val_size if isinstance(self.val_size, int) else max(1, round(self.val_size * images))

    def _training_progress(self) -> tuple[int, int] | None:
        """Return the trainer's epoch and the index of the batch that it asks for next, or None while it does not train.

        Its own counts, since they survive what a loader's saved state does not: a step that was interrupted after its
        batch was handed out, ``trainer.estimated_stepping_batches`` (which drops the loader's state), and a checkpoint
        at the end of an epoch with ``max_steps`` (after which the epoch announced to samplers is one too many).
        """
        if self.trainer is None or not self.trainer.training:
            return None
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _sequential(self, name: str) -> TensorBatches:
        rank, world_size = self._rank_and_world_size()
        return TensorBatches(*self._subset(name), self.batch_size, rank=rank, world_size=world_size)

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        trained_by = self.trainer.lightning_module, *self.trainer.callbacks  # type: ignore[attr-defined]
        if not all(getattr(one, "splits_data", True) for one in trained_by):
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _subset(self, name: str) -> tuple[Tensor, Tensor]:
        if not self._subsets:
            raise RuntimeError(f"{type(self).__name__}.setup() must be called before its data are asked for")
        return self._subsets[name]

    def _load_checked(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = self.load(train)
        what = f"{type(self).__name__} {'training' if train else 'test'} set"
        expected = (self.in_channels, self.image_size, self.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"{what}: an image has shape {tuple(images.shape[1:])}, expected {expected}")
        if len(images) != len(labels) or len(images) == 0:
            raise ValueError(f"{what}: {len(images)} images and {len(labels)} labels, expected as many, and at least 1")
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong) > 0:
            raise ValueError(f"{what}: label {int(wrong[0])} is outside the classes 0 to {self.num_classes - 1}")
        return images, labels
