"""The base of the data sets that torchvision downloads and reads."""

import shutil
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from urllib.parse import urlsplit

from zo_lightning.data.in_memory import InMemoryDataModule


class DownloadedDataModule(InMemoryDataModule):
    """A data set of torchvision, downloaded where it is absent, all of it or nothing.

    `prepare_data` and `setup` raise ``FileNotFoundError`` or ``NotADirectoryError`` where the data are absent and not
    to be downloaded, ``PermissionError`` where they could not be stored, ``ConnectionError`` where the download fails,
    and ``ValueError`` where a file is damaged.

    Args:
        batch_size: Images per batch (over all processes); the last batch of an epoch may be smaller.
        val_size: Images taken from the training set for validation, or the share of them where it is below 1; 0 trains
            on all and validates on the test set.
        seed: Decides the validation split and, together with the epoch, the order of the training images; None takes
            the one given to ``torch.manual_seed`` or ``seed_everything``.
        root: Folder of the data, laid out as torchvision does.
        download: Download the data where they are absent.
    """

    title: ClassVar[str]
    """The data set's name, as torchvision has it."""

    def __init__(
        self,
        batch_size: int = 128,
        val_size: int | float = 5000,
        seed: int | None = None,
        root: str = "data",
        download: bool = True,
    ) -> None:
        super().__init__(batch_size, val_size, seed)
        self.root = root
        self.download = download

    @abstractmethod
    def files(self) -> list[str]:
        """Return the files that must be there, relative to the root."""

    @abstractmethod
    def archives(self) -> list[str]:
        """Return the archives and folders that a download uses again where they are there, relative to the root."""

    @abstractmethod
    def urls(self) -> list[str]:
        """Return the addresses, one of which a download needs."""

    @abstractmethod
    def check_files(self) -> None:
        """Raise ``ValueError``, naming the file, where one is damaged."""

    def dataset_class(self) -> Any:
        """Return torchvision's class for this data set."""
        from torchvision import datasets

        return getattr(datasets, self.title)

    def prepare_data(self) -> None:
        """Download what is absent."""
        if not self._missing():
            return
        if not self.download:
            self._raise_missing()
        with _staging_folder(self._folder(), self.title) as staging:
            self._reuse_archives(staging)
            try:
                self.dataset_class()(staging, download=True)
            except Exception as error:
                hosts = ", ".join(urlsplit(url).netloc or url for url in self.urls())
                raise ConnectionError(
                    f"could not download {self.title} from {hosts} to root {self.root!r}: {_last_line(error)}. "
                    "Where there is no network, give a root that holds the data"
                ) from error

    def setup(self, stage: str | None = None) -> None:
        """Check the files, load and split the data."""
        if not self._subsets:
            if self._missing():
                self._raise_missing()
            self.check_files()
        super().setup(stage)

    def _folder(self) -> Path:
        return Path(self.root).expanduser()

    def _missing(self) -> list[str]:
        return [name for name in self.files() if not (self._folder() / name).is_file()]

    def _raise_missing(self) -> None:
        if self._folder().is_dir():
            problem = f"root {self.root!r} lacks {self._missing()[0]}"
        elif self._folder().exists():
            raise NotADirectoryError(f"root {self.root!r} is a file; {self.title} needs a folder")
        else:
            problem = f"root {self.root!r} does not exist"
        raise FileNotFoundError(f"{problem}; give the folder that holds {self.title}, or set download to true")

    def _reuse_archives(self, staging: Path) -> None:
        for name in self.archives():
            source, target = self._folder() / name, staging / name
            if source.is_dir():
                shutil.copytree(source, target, copy_function=shutil.copyfile)
            elif source.is_file():
                shutil.copyfile(source, target)


@contextmanager
def _staging_folder(root: Path, title: str) -> Iterator[Path]:
    """Give a folder inside ``root`` whose files move to ``root`` at the end, or vanish where an exception ends it.

    So an interrupted download leaves nothing that looks like data, and several processes may download at once.
    """
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"root '{root}' is a file; {title} needs a folder")
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        try:
            root.mkdir(parents=True, exist_ok=True)
            staging = TemporaryDirectory(prefix=".download-", dir=root)
        except OSError as error:
            raise PermissionError(
                f"cannot write {title} to root '{root}': {error.strerror}. Give a folder that can be written"
            ) from error
        with staging as name:
            yield Path(name)
            _move_files(Path(name), root)
    except BaseException:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        raise


def _move_files(source: Path, target: Path) -> None:
    for file in [path for path in source.rglob("*") if path.is_file()]:
        destination = target / file.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        file.replace(destination)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
