"""Batches sliced from tensors in memory: no Python work per image, and an order that can be resumed exactly."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""From images ``(N, C, H, W)``, as they are stored, to changed ones; the generator decides how."""


class TensorBatches:
    """Batches ``(images, labels)`` of tensors in memory, in the order in which they are stored.

    Images of uint8 come out as float32 in [0, 1], others as they are, always as copies; the last batch may be smaller.
    With several processes, rank r of w gets the images r, r + w, ... of every batch: together they see what one process
    would. Raises ``ValueError`` for sizes that do not fit, and where a rank would get an empty batch.

    Args:
        images: All images, ``(N, C, H, W)``.
        labels: Their labels, ``(N,)``.
        batch_size: Images per batch, over all ranks.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie between 0 and world_size - 1 = {world_size - 1}")
        smallest = len(images) % batch_size or batch_size
        if smallest < world_size and len(images) > 0:
            raise ValueError(
                f"batch_size={batch_size} gives a batch of {smallest} images, too few for {world_size} processes; "
                "choose another batch_size"
            )
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass."""
        order = torch.arange(len(self.images))
        for index in range(len(self)):
            yield self._batch(order, index)

    def _batch(self, order: Tensor, index: int) -> Batch:
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size][self.rank :: self.world_size]
        # index_select takes a third of the time of images[chosen] here.
        images = self._changed(self.images.index_select(0, chosen), index)
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(255)
        return images, self.labels.index_select(0, chosen)

    def _changed(self, images: Tensor, index: int) -> Tensor:
        return images


class ShuffledBatches(TensorBatches):
    """`TensorBatches` in an order that is a pure function of (seed, epoch), and that can be resumed anywhere.

    By itself, each complete pass moves on to the next epoch, `state_dict` says where a pass stands, and the first pass
    after `load_state_dict` goes on from there. With ``progress`` it follows somebody else's count instead.

    Args:
        images: All images, ``(N, C, H, W)``.
        labels: Their labels, ``(N,)``.
        batch_size: Images per batch, over all ranks.
        seed: At least 0; decides the order together with the epoch.
        rank: This process.
        world_size: Number of processes.
        progress: Called when a pass begins: returns its (epoch, index of its first batch), or None for its own count.
        augmentation: Changes the images of each batch; (seed, epoch, batch, rank) decide how.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[], tuple[int, int] | None] = lambda: None,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(images, labels, batch_size, rank=rank, world_size=world_size)
        self.seed = seed
        self.epoch = 0
        self._start = 0
        self._position = 0
        self._progress = progress
        self._augmentation = augmentation

    @property
    def sampler(self) -> "ShuffledBatches":
        """Return this object: Lightning calls ``loader.sampler.set_epoch`` before every epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass has; it begins with its first batch if the epoch changes."""
        if epoch != self.epoch:
            self.load_state_dict({"epoch": epoch, "position": 0})

    def order(self) -> Tensor:
        """Return this epoch's order, a permutation ``(N,)`` of int64."""
        return torch.randperm(len(self.images), generator=random_stream("order", self.seed, self.epoch))

    # A generator on purpose: Lightning calls iter() before it knows the epoch; this body runs at the first next().
    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass, or of its rest."""
        progress = self._progress()
        if progress is not None:
            self.epoch, self._start = progress
        start, self._start = self._start, 0
        epoch, order = self.epoch, self.order()
        for index in range(start, len(self)):
            self._position = index + 1
            yield self._batch(order, index)
        self.set_epoch(epoch + 1)

    def _changed(self, images: Tensor, index: int) -> Tensor:
        if self._augmentation is None:
            return images
        return self._augmentation(images, random_stream("augment", self.seed, self.epoch, index, self.rank))

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were handed out."""
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next pass go on from where ``state_dict`` stands."""
        self.epoch = state_dict["epoch"]
        self._start = self._position = state_dict["position"]


def random_stream(purpose: str, *key: int) -> torch.Generator:
    """Return a generator that depends on ``purpose`` and on each number of ``key`` (at least 0), on nothing else.

    The key is hashed (`numpy.random.SeedSequence`): a sum such as seed + epoch would give two runs the same order one
    epoch apart, and torch's CPU generator looks only at the lowest 32 bits of its seed.
    """
    # The length comes first, since trailing zeros alone would not count.
    words = np.random.SeedSequence([len(key), *purpose.encode(), *key]).generate_state(1)
    return torch.Generator().manual_seed(int(words[0]))
