"""CIFAR-10."""

import torch
from torch import Tensor

from zo_lightning.data.augmentation import crop_and_flip
from zo_lightning.data.downloaded import DownloadedDataModule


class CIFAR10(DownloadedDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of ten kinds of objects, 32x32 pixels in three colours.

    Source: Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.

    Args:
        batch_size: Images per batch (over all processes); the last batch of an epoch may be smaller.
        val_size: Images taken from the training set for validation, or the share of them where it is below 1; 0 trains
            on all and validates on the test set.
        seed: Decides the validation split and, together with the epoch, the order of the training images; None takes
            the one given to ``torch.manual_seed`` or ``seed_everything``.
        root: Folder that holds ``cifar-10-batches-py``, laid out as torchvision does.
        download: Download the data where they are absent.
        augment: Move and mirror the training images at random (`crop_and_flip`).
    """

    num_classes = 10
    in_channels = 3
    image_size = 32
    title = "CIFAR10"

    def __init__(
        self,
        batch_size: int = 128,
        val_size: int | float = 5000,
        seed: int | None = None,
        root: str = "data",
        download: bool = True,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, val_size, seed, root, download)
        self.augmentation = crop_and_flip if augment else None

    def files(self) -> list[str]:
        """Return the pickled batches, relative to the root."""
        return list(self._checksums())

    def archives(self) -> list[str]:
        """Return the archive."""
        return [self.dataset_class().filename]

    def urls(self) -> list[str]:
        """Return the archive's address."""
        return [self.dataset_class().url]

    def check_files(self) -> None:
        """Raise ``ValueError`` where a file's checksum is not the published one."""
        from torchvision.datasets.utils import check_integrity

        for name, checksum in self._checksums().items():
            path = self._folder() / name
            if not check_integrity(str(path), checksum):
                raise ValueError(f"'{path}' is damaged: its MD5 checksum is not {checksum}; delete it")

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return the training or the test set, images as uint8."""
        dataset = self.dataset_class()(self._folder(), train=train)
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(dataset.targets)

    def _checksums(self) -> dict[str, str]:
        dataset = self.dataset_class()
        entries = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
        return {f"{dataset.base_folder}/{name}": checksum for name, checksum in entries}
