"""Small data sets in MNIST's format, written by the tests themselves."""

import gzip
import hashlib
import struct
from pathlib import Path

import torch
from torch import Tensor


def idx_bytes(values: Tensor) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def tiny_set(seed: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 28, 28), generator=generator, dtype=torch.uint8)
    return images, torch.arange(size, dtype=torch.uint8) % 10


def write_mnist(folder: Path) -> None:
    """Write 20 training and 10 test images into ``folder``."""
    folder.mkdir(parents=True)
    for part, (images, labels) in (("train", tiny_set(0, 20)), ("t10k", tiny_set(1, 10))):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def compress(folder: Path) -> list[tuple[str, str]]:
    """Replace the files of ``folder`` by .gz archives; return (name, MD5) of each, as torchvision lists them."""
    resources = []
    for path in sorted(folder.iterdir()):
        archive = path.with_name(f"{path.name}.gz")
        archive.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
        path.unlink()
    return resources
