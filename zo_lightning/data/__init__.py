"""Data sets, one LightningDataModule per file."""

from zo_lightning.data.augmentation import crop_and_flip
from zo_lightning.data.batches import ShuffledBatches, TensorBatches
from zo_lightning.data.cifar10 import CIFAR10
from zo_lightning.data.cifar10_images import CIFAR10Images
from zo_lightning.data.digits import Digits
from zo_lightning.data.fashion_mnist import FashionMNIST
from zo_lightning.data.in_memory import InMemoryDataModule
from zo_lightning.data.mnist import MNIST

__all__ = [
    "CIFAR10",
    "MNIST",
    "CIFAR10Images",
    "Digits",
    "FashionMNIST",
    "InMemoryDataModule",
    "ShuffledBatches",
    "TensorBatches",
    "crop_and_flip",
]
