"""Where a run began: its weights, and the settings of what moves them, as plain numbers and names."""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import zo_lightning.estimators as estimators
from zo_lightning.estimators import GradientEstimator
from zo_lightning.estimators.base import resolve_seed
from zo_lightning.perturbed.weights import Weights
from zo_lightning.snapshots import read_tensors, write_tensors

SETTINGS, WEIGHTS = "start.json", "start.safetensors"
_COMPONENTS = ("directions", "low_rank", "centred", "stencils", "shaping", "evaluation", "distributed")


class CannotReplay(ValueError):
    """A run's weights cannot be rebuilt from its log."""


@dataclass(frozen=True)
class Start:
    """The beginning of a run.

    Attributes:
        estimator: with its seed.
        optimizer: the class, ``"torch.optim.adam.Adam"``.
        groups: of the optimizer: settings, and under ``"weights"`` the names of what it moves.
        strides: of each trained weight, by name, in the estimator's order.
        still: rows that no direction moves, by name of the weight.
        aliases: by each name of a trained weight, the one that it has here; a tied weight has several.
        clip: ``gradient_clip_val`` and ``gradient_clip_algorithm``, or None.
        tensors: all of the module's weights and buffers, by name; a tied weight under each of its names.
    """

    estimator: GradientEstimator
    optimizer: str
    groups: Sequence[Mapping[str, Any]]
    strides: Mapping[str, Sequence[int]]
    still: Mapping[str, int]
    aliases: Mapping[str, str]
    clip: tuple[float, str] | None
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        estimator: GradientEstimator,
        optimizer: torch.optim.Optimizer,
        clip: tuple[float, str] | None = None,
    ) -> "Start":
        """The beginning of a run that trains ``module`` from its present weights.

        Raises:
            CannotReplay: slopes do not make the estimate, the optimizer is none of ``torch.optim`` or of this package,
                or it has stepped already.
        """
        name = type(optimizer).__name__
        if not estimator.replays:
            raise CannotReplay(f"{type(estimator).__name__} takes more than slopes")
        if type(optimizer).__module__.split(".")[0] not in ("torch", "zo_lightning"):
            raise CannotReplay(f"{name} is none of torch.optim or zo_lightning")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise CannotReplay("LBFGS asks for the loss several times a step")
        if optimizer.state:
            raise CannotReplay(f"{name} has stepped already")
        weights = Weights.of(module)
        if any(map(is_lazy, weights)):
            raise CannotReplay("some weights get their shapes with the first pass")
        names = {id(p): n for n, p in zip(weights.names, weights, strict=True)}
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "weights": [names[id(p)] for p in group["params"] if id(p) in names],
            }
            for group in optimizer.param_groups
        ]
        try:
            json.dumps(groups)
        except TypeError as error:
            raise CannotReplay(f"a setting of {name} is no plain number: {error}") from error
        return cls(
            dataclasses.replace(estimator, seed=resolve_seed(getattr(estimator, "seed", None))),  # type: ignore[call-arg]
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            groups,
            {n: p.stride() for n, p in zip(weights.names, weights, strict=True)},
            {weights.names[k]: row for k, row in weights.still.items()},
            {n: names[id(p)] for n, p in module.named_parameters(remove_duplicate=False) if id(p) in names},
            clip,
            {n: t.detach().clone() for n, t in module.state_dict().items() if isinstance(t, Tensor)},
        )

    def settings(self) -> dict[str, Any]:
        """All but the tensors, as JSON has it."""
        return {
            "format": 1,
            "estimator": _written(self.estimator),
            "optimizer": self.optimizer,
            "groups": list(self.groups),
            "strides": {name: list(strides) for name, strides in self.strides.items()},
            "still": dict(self.still),
            "aliases": dict(self.aliases),
            "clip": self.clip,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Start":
        """Read what ``settings`` gave; classes of ``torch.optim`` and of this package are all that it can name.

        Raises:
            CannotReplay: it is damaged, or of another format.
        """
        try:
            if settings["format"] != 1:
                raise CannotReplay(f"the log has format {settings['format']!r}, this version reads 1")
            clip = settings["clip"]
            return cls(
                _read(settings["estimator"]),
                str(settings["optimizer"]),
                settings["groups"],
                settings["strides"],
                settings["still"],
                settings["aliases"],
                None if clip is None else (float(clip[0]), str(clip[1])),
                tensors,
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CannotReplay(f"the log's settings are damaged ({type(error).__name__}: {error})") from error

    def write(self, folder: Path) -> None:
        """Write ``start.json`` and ``start.safetensors``, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.settings()
        text = json.dumps({**settings, "checksum": _checksum(settings)}, indent=1)
        whole(folder / WEIGHTS, lambda path: write_tensors(contiguous(self.tensors), path))
        whole(folder / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, folder: Path) -> "Start":
        """Read what ``write`` wrote. Nothing is unpickled.

        Raises:
            CannotReplay: it is not there, or damaged.
        """
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            if settings.pop("checksum") != _checksum(settings):
                raise CannotReplay(f"the start in '{folder}' is damaged: the checksum of {SETTINGS} is wrong")
            return cls.from_settings(settings, read_tensors(folder / WEIGHTS))
        except FileNotFoundError as error:
            raise CannotReplay(f"'{error.filename or folder / WEIGHTS}' does not exist") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CannotReplay):
                raise
            raise CannotReplay(f"the start in '{folder}' is damaged: {error}") from error

    def weights(self) -> Weights:
        """The trained weights at the start, in the places that the run had them in."""
        names, params = list(self.strides), []
        for name in names:
            if name not in self.tensors:
                raise CannotReplay(f"the start lacks the weight {name}")
            stored = self.tensors[name]
            try:
                place = torch.empty_strided(stored.shape, tuple(self.strides[name]), dtype=stored.dtype)
            except RuntimeError as error:
                raise CannotReplay(f"the strides of {name} do not suit its shape {tuple(stored.shape)}") from error
            params.append(nn.Parameter(place.copy_(stored)))
        return Weights(names, params, {names.index(name): row for name, row in self.still.items()})

    def make_optimizer(self, weights: Weights) -> torch.optim.Optimizer:
        """The optimizer at the start.

        Raises:
            CannotReplay: its class is not known here, or refuses its settings.
        """
        module, _, name = self.optimizer.rpartition(".")
        named = dict(zip(weights.names, weights, strict=True))
        if module.split(".")[:2] != ["torch", "optim"] and module.split(".")[:2] != ["zo_lightning", "optim"]:
            raise CannotReplay(f"the log names the optimizer '{self.optimizer}', which is none of torch.optim or ours")
        try:
            found = getattr(import_module(module), name)
            if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
                raise CannotReplay(f"'{self.optimizer}' is no optimizer")
            groups = [as_settings(group) for group in self.groups]
            for group in groups:
                group["params"] = [named[name] for name in group.pop("weights")]
            make: Any = found
            return make(groups)
        except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CannotReplay):
                raise
            raise CannotReplay(f"the optimizer '{self.optimizer}' cannot be made: {error}") from error


def draws_from(estimator: Any) -> tuple[Any, int] | None:
    """What decides the directions of each step, all that a replay takes from an estimator; None where slopes do not."""
    return (estimator.directions, resolve_seed(estimator.seed)) if estimator.replays else None


def as_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an optimizer's group as they were before JSON made lists of tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}


def whole(path: Path, write: Any) -> None:
    """Let a file appear whole or not at all: written beside its place, synced, and moved there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _checksum(settings: Mapping[str, Any]) -> int:
    """CRC-32 of settings as JSON has them, tuples as lists."""
    return zlib.crc32(json.dumps(settings, sort_keys=True).encode())


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors writes them: on the CPU, without gaps, none sharing memory with another."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _written(component: Any) -> Any:
    """A frozen dataclass as its class's name and its fields, as in YAML."""
    if not dataclasses.is_dataclass(component):
        return component
    fields = {field.name: _written(getattr(component, field.name)) for field in dataclasses.fields(component)}
    return {"class_path": type(component).__name__, "init_args": fields}


def _read(written: Any) -> Any:
    if not isinstance(written, Mapping):
        return written
    name = str(written["class_path"])
    homes = [estimators, *(import_module(f"zo_lightning.{home}") for home in _COMPONENTS)]
    found = [vars(home)[name] for home in homes if dataclasses.is_dataclass(vars(home).get(name))]
    if not found:
        raise CannotReplay(f"the log names '{name}', which is none of the estimators' parts")
    return found[0](**{key: _read(value) for key, value in written["init_args"].items()})
