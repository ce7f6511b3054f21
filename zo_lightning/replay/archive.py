"""A run in one file: its start and its log; where the start is a seed, a few kilobytes and the scalars."""

import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from pytorch_lightning import seed_everything
from torch import Tensor, nn

from zo_lightning.distributed import fingerprint
from zo_lightning.replay.rebuild import STEPS, trajectory_folder
from zo_lightning.replay.start import SETTINGS, WEIGHTS, CannotReplay, Start, contiguous, whole
from zo_lightning.snapshots import write_tensors

SEED = "seed.json"
_KNOWN = ("zo_lightning", "torch", "torchvision")


def export(run: Path, out: Path, weights: bool = False) -> int:
    """Write a run's start and log as one file; return its size in bytes.

    The start's weights are left out where the seed and the net in the run's ``config.yaml`` make the same, bit for bit.

    Args:
        run: its folder.
        out: the file.
        weights: whether the start's weights are written in any case.

    Raises:
        CannotReplay: the run has no log, or its start is damaged.
        OSError: a file cannot be read or written; ``out`` appears whole or not at all.
    """
    folder = trajectory_folder(run)
    start = Start.read(folder)
    seeded = None if weights else _seeded(run, start.tensors)

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.write(folder / SETTINGS, SETTINGS)
            file.write(folder / STEPS, STEPS)
            if seeded is None:
                file.write(folder / WEIGHTS, WEIGHTS)
            else:
                file.writestr(SEED, json.dumps(seeded))

    whole(out, write)
    return out.stat().st_size


class Opened(tempfile.TemporaryDirectory[str]):
    """The folder of a run's start and log, from its folder or from what ``export`` wrote, for a ``with`` statement.

    Args:
        run: a folder or a file.
        trust: whether classes may be imported that a file names, beside those of PyTorch and this package.

    Raises:
        CannotReplay: on entering, where the file is none of ``export``, or names such a class.
    """

    def __init__(self, run: Path, trust: bool = False) -> None:
        super().__init__()
        self._run, self._trust = run, trust

    def __enter__(self) -> Path:  # type: ignore[override]
        """The folder."""
        if self._run.is_dir():
            return self._run
        folder = Path(super().__enter__())
        try:
            with zipfile.ZipFile(self._run) as file:
                for name in {SETTINGS, STEPS, WEIGHTS, SEED} & set(file.namelist()):
                    (folder / name).write_bytes(file.read(name))
        except FileNotFoundError as error:
            raise CannotReplay(f"'{self._run}' does not exist") from error
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, ValueError) as error:
            raise CannotReplay(f"'{self._run}' is damaged, or not a run that was exported: {error}") from error
        if (folder / SEED).exists():
            seeded = json.loads((folder / SEED).read_text(encoding="utf-8"))
            tensors = _made(seeded, self._trust)
            if _digest(tensors) != seeded["digest"]:
                raise CannotReplay(
                    f"seed {seeded['seed']} does not make the weights here that the run began with: other versions of "
                    "PyTorch or of the net; export again where it began, with --weights"
                )
            write_tensors(tensors, folder / WEIGHTS)
        return folder


def _seeded(run: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The seed and the net that make a run's start, or None where the run's configuration does not say so."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        seeded = {"seed": int(config["seed_everything"]), "net": config["model"]["net"], "digest": _digest(tensors)}
        return seeded if _digest(_made(seeded, trust=True)) == seeded["digest"] else None
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError, CannotReplay):
        return None


def _made(seeded: Mapping[str, Any], trust: bool) -> dict[str, Tensor]:
    """The weights that a seed makes of a net, under the names that a ``Classifier`` or ``Regressor`` gives them."""
    name = str(seeded["net"]["class_path"])
    foreign = [path for path in _dotted(seeded["net"]) if path.split(".")[0] not in _KNOWN]
    if foreign and not trust:
        raise CannotReplay(f"the start is made by '{foreign[0]}', which would be imported: allow it with --trust")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    try:
        parsed = parser.parse_object({"net": seeded["net"]})
        seed_everything(int(seeded["seed"]), verbose=False)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its newer name
        made: Any = instantiate(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        raise CannotReplay(f"the net '{name}' cannot be made here: {error}") from error
    return contiguous({f"net.{key}": value for key, value in made.net.state_dict().items()})


def _dotted(value: Any) -> Iterator[str]:
    """All that might be the path of a class in a configuration."""
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _dotted(one)
    elif isinstance(value, list):
        for one in value:
            yield from _dotted(one)
    elif isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.\w+)+", value):
        yield value


def _digest(tensors: Mapping[str, Tensor]) -> int:
    return fingerprint([tensors[name] for name in sorted(tensors)])
