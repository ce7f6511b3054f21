"""Scikit-learn's digits: a data set that needs no network."""

import torch
from torch import Tensor

from zo_lightning.data.in_memory import InMemoryDataModule


class Digits(InMemoryDataModule):
    """Scikit-learn's 1,797 handwritten digits (8x8 pixels, here enlarged to 28x28), installed with the library.

    In each class every fifth image, in stored order, is for testing: 364 test images that depend on no seed.
    Source: Alpaydin and Kaynak, *Optical recognition of handwritten digits*, UCI Machine Learning Repository, 1998.

    Args:
        batch_size: Images per batch (over all processes); the last batch of an epoch may be smaller.
        val_size: Images taken from the 1,433 training images for validation, or a share of them below 1; 0
            validates on the test set.
        seed: Decides the validation split and, together with the epoch, the order of the training images; None takes
            the one given to ``torch.manual_seed`` or ``seed_everything``.
    """

    num_classes = 10
    in_channels = 1
    image_size = 28

    def __init__(self, batch_size: int = 128, val_size: int | float = 200, seed: int | None = None) -> None:
        super().__init__(batch_size, val_size, seed)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return the training or the test set, images as float32."""
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)
        small = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        labels = torch.as_tensor(targets, dtype=torch.int64)
        chosen = _every_fifth_of_its_class(labels) != train
        images = torch.nn.functional.interpolate(small[chosen], size=self.image_size, mode="bilinear")
        return images, labels[chosen]


def _every_fifth_of_its_class(labels: Tensor) -> Tensor:
    """Return a mask ``(N,)`` that is true for the first, sixth, ... image of each class."""
    one_hot = torch.nn.functional.one_hot(labels)
    rank_in_class = one_hot.cumsum(0).gather(1, labels[:, None])[:, 0] - 1
    return rank_in_class % 5 == 0
