"""CIFAR-10 as JPEGs in an archive, with small archives that the test writes itself."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from zo_lightning.data import CIFAR10Images
from zo_lightning.data.cifar10_images import ARCHIVE, CLASSES


def picture(grey: int, size: int = 32) -> bytes:
    """One of one grey, which a JPEG keeps exactly."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (grey,) * 3).save(file, "JPEG")
    return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(root / ARCHIVE, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two training pictures and a test picture of each class, of as many greys."""
    folder = tmp_path / "root"
    folder.mkdir()
    numbered = [("train", k) for k in range(20)] + [("test", k) for k in range(20, 30)]
    return write(
        folder, {f"cifar10_images/{part}/{CLASSES[k % 10]}/{k:04}.jpg": picture(8 * k) for part, k in numbered}
    )


def ready(root: Path, **arguments: Any) -> CIFAR10Images:
    data = CIFAR10Images(**{"batch_size": 8, "val_size": 0, "seed": 0, "root": str(root), **arguments})
    data.prepare_data()
    data.setup()
    return data


def whole(batches: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_pictures_and_labels(root: Path) -> None:
    data = ready(root)
    images, labels = whole(data.test_dataloader())
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.float32
    assert labels.tolist() == list(range(10))
    assert torch.equal(images[:, 0, 0, 0], torch.arange(20, 30) * 8 / 255)
    assert sorted(whole(data.train_dataloader())[1].tolist()) == sorted(2 * list(range(10)))
    assert data._subset("train")[0].dtype == torch.uint8
    assert [path.name for path in root.iterdir()] == [ARCHIVE], "nothing is written beside it"


def test_the_cache_serves_in_place_of_decoding(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ready(root, cache=str(tmp_path / "cache"))
    monkeypatch.setattr("zo_lightning.data.cifar10_images.decoded", lambda archive: pytest.fail("decoded again"))
    again = ready(root, cache=str(tmp_path / "cache"))
    for one, other in zip(whole(first.train_dataloader()), whole(again.train_dataloader()), strict=True):
        assert torch.equal(one, other)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_archive_is_decoded_anew(root: Path, tmp_path: Path) -> None:
    ready(root, cache=str(tmp_path / "cache"))
    write(root, {f"cifar10_images/{part}/cat/0.jpg": picture(16) for part in ("train", "test")})
    assert whole(ready(root, cache=str(tmp_path / "cache")).test_dataloader())[1].tolist() == [3]


def test_training_images_alone_are_changed_and_the_labels_stay(root: Path) -> None:
    plain, changed = ready(root), ready(root, augment=True)
    for name in ("val", "test"):
        loaders = (getattr(data, f"{name}_dataloader")() for data in (plain, changed))
        assert torch.equal(*(whole(loader)[0] for loader in loaders))
    (before, labels), (after, same) = (whole(data.train_dataloader()) for data in (plain, changed))
    assert torch.equal(labels, same) and before.shape == after.shape and not torch.equal(before, after)


DAMAGED: dict[str, tuple[dict[str, bytes], str]] = {
    "other_names": ({"pictures/1.jpg": picture(0)}, "pictures/1.jpg is none of cifar10_images/{train,test}/<class>"),
    "unknown_class": ({"cifar10_images/train/cow/1.jpg": picture(0)}, "cow/1.jpg is none of"),
    "no_picture": ({"cifar10_images/train/cat/1.jpg": b"no"}, "cifar10_images/train/cat/1.jpg is not a JPEG"),
    "other_size": ({"cifar10_images/train/cat/1.jpg": picture(0, 16)}, "has 16x16 pixels, expected 32x32"),
    "half": ({"cifar10_images/train/cat/1.jpg": picture(0)}, "holds no cifar10_images/test"),
}


@pytest.mark.parametrize(("files", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_wrong_with_an_archive_is_said(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(write(tmp_path, files))


def test_an_archive_that_is_absent_or_cut_off_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks cifar10_images.tar.gz; give the folder"):
        ready(tmp_path)
    path = root / ARCHIVE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cifar10_images.tar.gz' cannot be read"):
        ready(root)
