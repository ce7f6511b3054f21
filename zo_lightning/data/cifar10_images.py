"""CIFAR-10 as an archive of JPEG pictures."""

import hashlib
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from zo_lightning.data.augmentation import crop_and_flip
from zo_lightning.data.in_memory import InMemoryDataModule

ARCHIVE = "cifar10_images.tar.gz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_Sets = dict[str, tuple[Tensor, Tensor]]


class CIFAR10Images(InMemoryDataModule):
    """CIFAR-10 from ``cifar10_images.tar.gz``, JPEGs named ``cifar10_images/{train,test}/<class>/<number>.jpg``.

    JPEG loses detail: accuracies are not quite comparable with those on the original files, which ``CIFAR10`` reads.
    All pictures are decoded at the start, some seconds for 60,000, and kept as uint8, 184 MB.
    Source: Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.

    `setup` raises ``FileNotFoundError`` where the archive is absent, and ``ValueError`` where it is damaged or holds
    something else.

    Args:
        batch_size: Images per batch (over all processes); the last batch of an epoch may be smaller.
        val_size: Images taken from the training set for validation, or the share of them where it is below 1; 0 trains
            on all and validates on the test set.
        seed: Decides the validation split and, together with the epoch, the order of the training images; None takes
            the one given to ``torch.manual_seed`` or ``seed_everything``.
        root: Folder that holds the archive; nothing is written there.
        cache: Folder to keep the decoded pictures in, for the next start; None: decode them each time.
        augment: Move and mirror the training images at random (`crop_and_flip`).
    """

    num_classes = 10
    in_channels = 3
    image_size = 32

    def __init__(
        self,
        batch_size: int = 128,
        val_size: int | float = 5000,
        seed: int | None = None,
        root: str = "data",
        cache: str | None = None,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, val_size, seed)
        self.root, self.cache = root, cache
        self.augmentation = crop_and_flip if augment else None
        self._sets: _Sets = {}

    def prepare_data(self) -> None:
        """Fill the cache, if there is one."""
        if self.cache is not None and not (file := self._cached()).is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")  # whole or absent, whatever happens
            try:
                torch.save(decoded(self._archive()), part)
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)

    def setup(self, stage: str | None = None) -> None:
        """Decode the pictures, or take them from the cache."""
        if not self._subsets:
            is_there = self.cache is not None and self._cached().is_file()
            self._sets = torch.load(self._cached()) if is_there else decoded(self._archive())
        super().setup(stage)
        self._sets = {}

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return the training or the test set, images as uint8."""
        return self._sets["train" if train else "test"]

    def _archive(self) -> Path:
        path = Path(self.root).expanduser() / ARCHIVE
        if not path.is_file():
            raise FileNotFoundError(f"root {self.root!r} lacks {ARCHIVE}; give the folder that holds it")
        return path

    def _cached(self) -> Path:
        """The cache's file, named by the archive's content."""
        digest = hashlib.blake2b(self._archive().read_bytes(), digest_size=8).hexdigest()
        return Path(str(self.cache)).expanduser() / f"cifar10_images-{digest}.pt"


def decoded(archive: Path) -> _Sets:
    """Return images ``(N, 3, 32, 32)`` of uint8 and labels ``(N,)`` of the training and the test set, in their order.

    Raises ``ValueError``, naming the archive and the picture, where it cannot be read.
    """
    try:
        with tarfile.open(archive) as tar:
            pictures = [(one.name, cast(Any, tar.extractfile(one)).read()) for one in tar if one.isfile()]
        places = [_place(name) for name, _ in pictures]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # libjpeg works without Python's lock
            images = torch.stack(list(pool.map(_decoded, pictures))).permute(0, 3, 1, 2).contiguous()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"'{archive}' cannot be read: {error}") from error
    sets = {}
    for part in ("train", "test"):
        chosen = torch.tensor([k for k, (of, _) in enumerate(places) if of == part], dtype=torch.int64)
        if not len(chosen):
            raise ValueError(f"'{archive}' holds no cifar10_images/{part}/<class>/<number>.jpg")
        sets[part] = images[chosen], torch.tensor([label for _, label in places])[chosen]
    return sets


def _decoded(picture: tuple[str, bytes]) -> Tensor:
    name, content = picture
    try:
        image = Image.open(BytesIO(content), formats=["JPEG"]).convert("RGB")
    except OSError as error:
        raise ValueError(f"{name} is not a JPEG picture") from error
    if image.size != (32, 32):
        raise ValueError(f"{name} has {image.width}x{image.height} pixels, expected 32x32")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3)


def _place(name: str) -> tuple[str, int]:
    match name.removeprefix("./").split("/"):
        case ["cifar10_images", ("train" | "test") as part, kind, _] if kind in CLASSES:
            return part, CLASSES.index(kind)
    raise ValueError(f"{name} is none of cifar10_images/{{train,test}}/<class>/<number>.jpg")
