"""A study as declared in YAML: which cells there are, and the configuration of each."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from zo_lightning.presets import find
from zo_lightning.user_errors import UserError
from zo_lightning.yaml_files import read_text

Overlay = dict[str, Any]

_KEYS = ("name", "base", "common", "methods", "nets", "seeds", "reference", "snapshots")
_SECTIONS = ("model", "data", "trainer", "checkpoint", "last_checkpoint", "progress_bar")
_LONGEST = 80
_METHOD_KEYS = ("base", "by_scale", *_SECTIONS)


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        method: the method's name.
        net: the net's class and, where it has one, its scale, such as ``"ScalableCNN 12.33"``.
        scale: the net's ``scale``, or None.
        seed: decides initialisation, split, order of the batches and directions.
        overlays: configurations as ``fit`` takes them, of which later ones override earlier ones.
    """

    method: str
    net: str
    scale: float | None
    seed: int
    overlays: tuple[Overlay, ...] = field(hash=False)

    @property
    def folder(self) -> Path:
        """Where the run lies, relative to the study's folder."""
        return Path(slug(self.method), slug(self.net), f"seed_{self.seed}")

    def __str__(self) -> str:
        return f"{self.method}, {self.net}, seed {self.seed}"


@dataclass(frozen=True)
class Method:
    """What a method adds to the configuration: everywhere, and at single scales."""

    overlays: tuple[Overlay, ...]
    by_scale: Mapping[float, Overlay]

    def at(self, scale: float | None) -> tuple[Overlay, ...]:
        """The overlays at a scale."""
        exception = None if scale is None else self.by_scale.get(scale)
        return self.overlays if exception is None else (*self.overlays, exception)


@dataclass(frozen=True)
class Study:
    """A grid of methods × nets × seeds.

    Args:
        name: of the study's folder.
        common: overlays that every cell begins with.
        methods: by name.
        nets: scales by net class; None for a net without ``scale``.
        seeds: one run each.
        reference: the method that the others are compared with.
        snapshots: epochs from one snapshot of the weights to the next, or None for no snapshots.
        options: words of the command line that every cell's ``fit`` is given.

    Raises:
        UserError: the declaration has no cells, or is otherwise not as described.
    """

    name: str
    common: tuple[Overlay, ...]
    methods: Mapping[str, Method]
    nets: Mapping[str, tuple[float, ...] | None]
    seeds: tuple[int, ...]
    reference: str
    snapshots: int | None = 1
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.methods, *self.nets):
            if len(name) > _LONGEST or not name.isprintable() or "$" in name or not name.strip():
                raise UserError(
                    f"'{name[:_LONGEST]}' cannot stand in a figure: take at most {_LONGEST} characters, and no '$'"
                )

    def cells(self) -> list[Cell]:
        """All cells; seeds vary slowest, so that an unfinished study is a whole one with fewer seeds."""
        return [
            Cell(method, net_label(net, scale), scale, seed, (*self.common, *self._net(net, scale), *spec.at(scale)))
            for seed in self.seeds
            for net, scale in self._net_scales()
            for method, spec in self.methods.items()
        ]

    def declaration(self) -> dict[str, Any]:
        """All of it in YAML's types, with the contents of files in place of their names: `from_declaration`'s input."""
        return {
            "name": self.name,
            "reference": self.reference,
            "snapshots": self.snapshots,
            "seeds": list(self.seeds),
            "nets": {net: None if scales is None else list(scales) for net, scales in self.nets.items()},
            "methods": {
                name: {"overlays": list(method.overlays), "by_scale": dict(method.by_scale)}
                for name, method in self.methods.items()
            },
            "common": list(self.common),
            "options": list(self.options),
        }

    @classmethod
    def from_declaration(cls, declaration: Mapping[str, Any]) -> "Study":
        """The study of which `declaration` was asked."""
        methods = {name: Method(tuple(m["overlays"]), m["by_scale"]) for name, m in declaration["methods"].items()}
        nets = {net: None if scales is None else tuple(scales) for net, scales in declaration["nets"].items()}
        return cls(
            declaration["name"],
            tuple(declaration["common"]),
            methods,
            nets,
            tuple(declaration["seeds"]),
            declaration["reference"],
            declaration["snapshots"],
            tuple(declaration["options"]),
        )

    def _net_scales(self) -> Iterator[tuple[str, float | None]]:
        for net, scales in self.nets.items():
            yield from ((net, scale) for scale in ([None] if scales is None else scales))

    @staticmethod
    def _net(net: str, scale: float | None) -> Iterator[Overlay]:
        arguments = {} if scale is None else {"init_args": {"scale": scale}}
        yield {"model": {"net": {"class_path": net, **arguments}}}


def read_study(path: str | Path, options: tuple[str, ...] = ()) -> Study:
    """Read a study's YAML file. It has the keys

    - ``name``: of the study's folder; the file's own name where it is left out;
    - ``base``: configuration files that every cell begins with, relative to the study's file;
    - ``common``: more configuration for every cell;
    - ``methods``: by name, configuration (``model``, ``trainer``, ...), files with more of it (``base``), and
      exceptions at single scales (``by_scale``);
    - ``nets``: scales by net class, or null for a net that has none;
    - ``seeds``;
    - ``reference``: the method that the others are compared with, by default the first;
    - ``snapshots``: epochs from one snapshot of all weights to the next, by default 1, or null for none.

    Raises:
        UserError: the file cannot be read, or has unknown keys, no cells or the same cell twice.
    """
    path = Path(path)
    text = read_yaml(path)
    _check_keys(text, _KEYS, f"{path}")
    methods = _mapping(text, "methods", path)
    nets = _mapping(text, "nets", path)
    seeds = text.get("seeds") or []
    if not methods or not nets or not seeds or any(scales == [] for scales in nets.values()):
        empty = next((key for key in ("methods", "nets", "seeds") if not text.get(key)), "nets")
        raise UserError(f"{path}: '{empty}' is empty: a study needs a method, a net and a seed at least")
    for seed in seeds if isinstance(seeds, list) else [seeds]:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise UserError(f"{path}: seeds must be a list of whole numbers of at least 0, got {seed!r}")
    reference = str(text.get("reference", next(iter(methods))))
    if reference not in map(str, methods):
        raise UserError(f"{path}: reference '{reference}' is none of the methods {', '.join(map(str, methods))}")
    if not isinstance(seeds, list):
        raise UserError(f"{path}: seeds must be a list of whole numbers, got {seeds!r}")
    every = text.get("snapshots", 1)
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise UserError(f"{path}: snapshots must be a whole number of epochs of at least 1, or null, got {every!r}")
    name = text.get("name", path.stem)
    if name is None or slug(str(name)) != str(name):
        raise UserError(f"{path}: name {name!r} is to be a folder's name: letters, digits, '.', '_' and '-'")
    study = Study(
        name=str(name),
        common=(*_files(text, path), *([_overlay(text["common"], f"{path}: common")] if text.get("common") else [])),
        methods={str(name): _method(spec or {}, path, str(name)) for name, spec in methods.items()},
        nets={str(net): _scales(scales, path, str(net)) for net, scales in nets.items()},
        seeds=tuple(seeds),
        reference=reference,
        snapshots=every,
        options=options,
    )
    _check_scales(study, path)
    twice = [str(folder) for folder, count in Counter(cell.folder for cell in study.cells()).items() if count > 1]
    if twice:
        raise UserError(
            f"{path}: two cells would share the folder '{twice[0]}': a name, a scale or a seed stands twice"
        )
    return study


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: there is none.
    """
    content = yaml.load(read_text(path), _Loader)  # a SafeLoader
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, got {type(content).__name__}")
    return content


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """Say in which key two configurations differ first, and how; None where they do not."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            if found := first_difference(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{key}.{name}".lstrip(".")):
                return found
        return None
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        return next(filter(None, (first_difference(*pair, key) for pair in zip(old, new, strict=True))), None)
    return None if old == new else f"{key} is {old!r} there and {new!r} here"


def net_label(net: str, scale: float | None) -> str:
    """A net's name in tables and figures."""
    name = net.rpartition(".")[2]
    return name if scale is None else f"{name} {scale:.6g}"


def slug(name: str) -> str:
    """A name with nothing in it that a file system or a shell could take amiss."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_.") or "_"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is one, as it is for ``fit``."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


class _Absent:
    """What stands where a configuration lacks a key, which is not the same as null."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _mapping(text: Mapping[str, Any], key: str, path: Path) -> dict[Any, Any]:
    value = text.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} must be names and what they stand for, got {value!r}")
    return value


def _method(spec: Any, path: Path, name: str) -> Method:
    where = f"{path}: methods.{name}"
    if not isinstance(spec, dict):
        raise UserError(f"{where}: expected configuration, got {spec!r}")
    _check_keys(spec, _METHOD_KEYS, where)
    own = {key: value for key, value in spec.items() if key in _SECTIONS}
    exceptions = {}
    for scale, overlay in _mapping(spec, "by_scale", path).items():
        exceptions[_number(scale, f"{where}.by_scale")] = _overlay(overlay, f"{where}.by_scale.{scale}")
    return Method((*_files(spec, path), *([own] if own else [])), exceptions)


def _scales(scales: Any, path: Path, net: str) -> tuple[float, ...] | None:
    if scales is None:
        return None
    values = scales if isinstance(scales, list) else [scales]
    return tuple(_number(value, f"{path}: nets.{net}") for value in values)


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a scale must be a number, got {value!r}") from error


def _check_scales(study: Study, path: Path) -> None:
    known = {scale for scales in study.nets.values() for scale in scales or ()}
    for name, method in study.methods.items():
        for scale in method.by_scale:
            if scale not in known:
                raise UserError(f"{path}: methods.{name}.by_scale: {scale} is none of the scales of the nets")


def _files(spec: Mapping[str, Any], path: Path) -> list[Overlay]:
    names = spec.get("base") or []
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{path}: base must be a file's name or a list of them, got {name!r}")
    beside = [path.parent / name for name in names]
    files = [file if file.exists() else find(name) for file, name in zip(beside, names, strict=True)]
    return [_overlay(read_yaml(file), str(file)) for file in files]


def _overlay(value: Any, where: str) -> Overlay:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected configuration, got {value!r}")
    if "seed_everything" in value:
        raise UserError(f"{where}: seed_everything is the study's to set: see 'seeds'")
    _check_keys(value, _SECTIONS, where)
    return value


def _check_keys(text: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in text:
        if key not in known:
            nearest = get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise UserError(f"{where}: unknown key '{key}'{hint}; there are {', '.join(known)}")
