"""Scikit-learn's digits."""

import torch

from zo_lightning.data import Digits
from zo_lightning.nets import SmallCNN


def test_digits_have_a_fixed_stratified_test_set() -> None:
    images, labels = Digits(seed=1).load(train=False)
    again, _ = Digits(seed=2).load(train=False)
    train_images, train_labels = Digits().load(train=True)
    assert torch.equal(images, again)
    assert (len(images), len(train_images)) == (364, 1433)
    share = labels.bincount(minlength=10) / (labels.bincount(minlength=10) + train_labels.bincount(minlength=10))
    assert ((share > 0.195) & (share < 0.21)).all()


def test_digits_are_images_in_the_unit_interval_for_the_networks() -> None:
    data = Digits()
    data.prepare_data()
    data.setup()
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(loader) for loader in loaders] == [10, 2, 3]
    images, labels = next(iter(data.train_dataloader()))
    assert (images.dtype, labels.dtype, images.shape) == (torch.float32, torch.int64, (128, 1, 28, 28))
    assert 0 <= images.min() < 0.01 and 0.9 < images.max() <= 1
    assert SmallCNN(data.num_classes, data.in_channels, data.image_size)(images).shape == (128, 10)
