"""CIFAR-10, with small batches that the test writes itself."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
import torchvision

from zo_lightning.data import CIFAR10
from zo_lightning.nets import SmallCNN


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(seed: int) -> dict[str, object]:
        pixels = torch.randint(0, 256, (6, 3072), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return {"data": pixels.numpy(), "labels": [0, 1, 2, 3, 4, 9]}

    dataset = torchvision.datasets.CIFAR10
    monkeypatch.setattr(dataset, "train_list", [write(f"data_batch_{i}", batch(i)) for i in range(1, 6)])
    monkeypatch.setattr(dataset, "test_list", [write("test_batch", batch(6))])
    name, checksum = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(dataset, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return tmp_path


def test_images_are_channels_first_in_the_unit_interval(root: Path) -> None:
    data = CIFAR10(batch_size=4, val_size=5, root=str(root), download=False)
    data.prepare_data()
    data.setup()
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(loader) for loader in loaders] == [7, 2, 2]
    images, labels = next(iter(data.test_dataloader()))
    assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (4, 3, 32, 32), torch.int64)
    transform = torchvision.transforms.ToTensor()
    reference = torchvision.datasets.CIFAR10(root, train=False, transform=transform)
    assert torch.equal(images[1], reference[1][0])
    assert SmallCNN(data.num_classes, data.in_channels, data.image_size)(images).shape == (4, 10)


def test_damaged_file_is_named(root: Path) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="data_batch_3' is damaged: its MD5 checksum is not"):
        CIFAR10(root=str(root)).setup()


def test_failed_download_is_clear_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(ConnectionError, match="could not download CIFAR10 from 127.0.0.1:9 to root"):
        CIFAR10(root=str(tmp_path / "new")).prepare_data()
    assert list(tmp_path.iterdir()) == []
