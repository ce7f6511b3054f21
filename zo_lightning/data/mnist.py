"""MNIST."""

from torch import Tensor

from zo_lightning.data.downloaded import DownloadedDataModule
from zo_lightning.data.idx import check_idx_file


class MNIST(DownloadedDataModule):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28x28 grey-scale pixels.

    Source: LeCun, Bottou, Bengio and Haffner, *Gradient-based learning applied to document recognition*, 1998.

    Args:
        batch_size: Images per batch (over all processes); the last batch of an epoch may be smaller.
        val_size: Images taken from the training set for validation, or the share of them where it is below 1; 0 trains
            on all and validates on the test set.
        seed: Decides the validation split and, together with the epoch, the order of the training images; None takes
            the one given to ``torch.manual_seed`` or ``seed_everything``.
        root: Folder that holds ``MNIST/raw``, laid out as torchvision does.
        download: Download the data where they are absent.
    """

    num_classes = 10
    in_channels = 1
    image_size = 28
    title = "MNIST"

    def files(self) -> list[str]:
        """Return the four IDX files, relative to the root."""
        kinds = ("images-idx3", "labels-idx1")
        return [f"{self.title}/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in kinds]

    def archives(self) -> list[str]:
        """Return the folder in which archives may be."""
        return [self.title]

    def urls(self) -> list[str]:
        """Return the mirrors."""
        return self.dataset_class().mirrors

    def check_files(self) -> None:
        """Raise ``ValueError`` where an IDX file is damaged or has other images than it should."""
        for name in self.files():
            path = self._folder() / name
            is_images = "idx3" in name
            shape = check_idx_file(path, ndim=3 if is_images else 1)
            if is_images and shape[1:] != (self.image_size, self.image_size):
                raise ValueError(f"'{path}' has images of {shape[1]}x{shape[2]} pixels, expected 28x28")

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return the training or the test set, images as uint8."""
        dataset = self.dataset_class()(self._folder(), train=train)
        return dataset.data.unsqueeze(1), dataset.targets
