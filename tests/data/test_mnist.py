"""MNIST and Fashion-MNIST: reading, downloading, clear refusals; without the network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from tests.data.idx_files import compress, idx_bytes, tiny_set, write_mnist
from zo_lightning.data import MNIST, FashionMNIST
from zo_lightning.data.downloaded import DownloadedDataModule

SHARED = Path(__file__).parents[3] / "shared" / "data"
UNREACHABLE = "http://127.0.0.1:9/"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_mnist(tmp_path / "MNIST" / "raw")
    return tmp_path


@pytest.mark.parametrize("data_class", [MNIST, FashionMNIST])
def test_files_are_read_as_torchvision_reads_them(tmp_path: Path, data_class: type[MNIST]) -> None:
    write_mnist(tmp_path / data_class.title / "raw")
    data = data_class(batch_size=4, val_size=5, root=str(tmp_path), download=False)
    data.prepare_data()
    data.setup()
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(loader) for loader in loaders] == [4, 2, 3]
    images, labels = tiny_set(1, 10)
    batches = list(data.test_dataloader())
    assert torch.equal(torch.cat([x for x, _ in batches]), images.unsqueeze(1) / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), labels.long())


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs MNIST itself in ../shared/data")
def test_mnist_itself() -> None:
    data = MNIST(root=str(SHARED), download=False)
    data.setup()
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(loader) for loader in loaders] == [430, 40, 79]
    images, labels = next(iter(data.train_dataloader()))
    assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (128, 1, 28, 28), torch.int64)
    assert (images.min(), images.max()) == (0, 1)
    reference = torchvision.datasets.MNIST(SHARED, train=False, transform=torchvision.transforms.ToTensor())
    images, labels = next(iter(data.test_dataloader()))
    for index in range(3):
        assert torch.equal(images[index], reference[index][0])
        assert labels[index] == reference[index][1]
    everything = MNIST(root=str(SHARED), download=False, val_size=0)
    everything.setup()
    assert (len(everything.train_dataloader()), len(everything.val_dataloader())) == (469, 79)


def test_absent_data_are_refused_unless_to_be_downloaded(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root '.*nowhere' does not exist; give the folder that holds MNIST"):
        MNIST(root=str(root / "nowhere"), download=False).prepare_data()
    (root / "MNIST/raw/train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="lacks MNIST/raw/train-labels-idx1-ubyte"):
        MNIST(root=str(root), download=False).setup()
    file = root / "file"
    file.touch()
    for download in (False, True):
        with pytest.raises(NotADirectoryError, match="root '.*file' is a file; MNIST needs a folder"):
            MNIST(root=str(file), download=download).prepare_data()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], r"is truncated: 15,695 bytes, but its header \(20x28x28\) asks"),
        ("t10k-labels-idx1-ubyte", lambda b: b + b"x", r"is too long: 19 bytes, but its header \(10\) asks for 18"),
        ("t10k-images-idx3-ubyte", lambda b: b[:10], "is truncated: 10 bytes do not hold its header"),
        ("t10k-images-idx3-ubyte", lambda b: b"", "is not the IDX file expected: it starts with"),
        ("train-labels-idx1-ubyte", lambda b: b"\x1f\x8b" + b[2:], "it starts with 1f8b0801, not 00000801"),
        ("train-images-idx3-ubyte", lambda _: idx_bytes(torch.zeros(20, 8, 8)), "images of 8x8 pixels, expected 28x28"),
    ],
)
def test_damaged_files_are_named(root: Path, name: str, damage: Callable[[bytes], bytes], message: str) -> None:
    path = root / "MNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{name}' .*{message}|{name}' {message}"):
        MNIST(root=str(root), val_size=5).setup()


def test_labels_outside_the_classes_and_missing_labels_are_named(root: Path) -> None:
    path = root / "MNIST/raw/t10k-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(torch.full((10,), 11)))
    with pytest.raises(ValueError, match="MNIST test set: label 11 is outside the classes 0 to 9"):
        MNIST(root=str(root), val_size=5).setup()
    path.write_bytes(idx_bytes(torch.zeros(9)))
    with pytest.raises(ValueError, match="MNIST test set: 10 images and 9 labels"):
        MNIST(root=str(root), val_size=5).setup()


@pytest.mark.parametrize("bad_root", ["/proc/mnist", "{tmp}/file/data"])
def test_root_that_cannot_be_written_is_refused_before_downloading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_root: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(DownloadedDataModule, "dataset_class", lambda self: pytest.fail("tried to download"))
    bad_root = bad_root.format(tmp=tmp_path)
    with pytest.raises(PermissionError, match=f"cannot write MNIST to root '{bad_root}': .*can be written"):
        MNIST(root=bad_root).prepare_data()


def test_failed_download_is_clear_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [UNREACHABLE])
    root = tmp_path / "new" / "folder"
    with pytest.raises(ConnectionError, match=f"could not download MNIST from 127.0.0.1:9 to root '{root}': .*refused"):
        MNIST(root=str(root)).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_download_that_stops_half_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, resources = serve(tmp_path, monkeypatch)
    (server / resources[2][0]).write_bytes(b"half")
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(ConnectionError, match="could not download MNIST"):
        MNIST(root=str(root)).prepare_data()
    assert list(root.iterdir()) == []


def test_download_brings_what_is_absent_and_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, resources = serve(tmp_path, monkeypatch)
    data = MNIST(root=str(tmp_path / "root"), val_size=5)
    data.prepare_data()
    data.setup()
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["MNIST"]

    for name, _ in resources:  # The archives beside the files are enough to get a lost file again.
        (server / name).unlink()
    lost = tmp_path / "root" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    before = lost.read_bytes()
    lost.unlink()
    data.prepare_data()
    assert lost.read_bytes() == before
    monkeypatch.setattr(DownloadedDataModule, "dataset_class", lambda self: pytest.fail("tried to download"))
    data.prepare_data()


def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[tuple[str, str]]]:
    """Let torchvision download a small MNIST, from a folder in place of a host."""
    server = tmp_path / "server"
    write_mnist(server)
    resources = compress(server)
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://localhost/"])

    def retrieve(url: str, path: str) -> None:
        Path(path).write_bytes((server / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, max_hops: url)
    return server, resources
