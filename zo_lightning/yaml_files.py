"""Configuration files as they come: text that is read whole, and small enough to be worked with."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from zo_lightning.user_errors import UserError

_OF_CLASSES = {"class_path", "init_args"}

_LARGEST = 100_000
"""Values in one file, aliases written out: a configuration has hundreds."""


def read_text(path: Path) -> str:
    """The text of a YAML file, seen to be YAML of a sensible size without cycles.

    Raises:
        UserError: it is not, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None and _count(root, {}) > _LARGEST:
            raise UserError(f"{path}: its aliases (*name) stand for more than {_LARGEST:,} values")
        check_classes(yaml.safe_load(text), path)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deep, or an alias (*name) stands within what it names") from error
    except (ValueError, OverflowError) as error:  # a date that does not exist, a number of thousands of digits
        raise UserError(f"{path}: {error}") from error
    return text


def check_classes(value: Any, path: Path, place: str = "") -> None:
    """See that each part of a configuration that names a class has a name, options, and nothing else.

    Raises:
        UserError: one has not.
    """
    where = f"{path}: {place}." if place else f"{path}: "
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise UserError(f"{where.rstrip('.: ')}: names of options are text, got {odd[0]!r}")
        if _OF_CLASSES & value.keys():
            if not isinstance(name := value.get("class_path", ""), str):
                raise UserError(f"{where}class_path must be the name of a class, got {name!r}")
            if not isinstance(options := value.get("init_args"), dict | None):
                raise UserError(f"{where}init_args must be options by name, got {options!r}")
            if others := [key for key in value if key not in (*_OF_CLASSES, "dict_kwargs")]:
                hint = get_close_matches(others[0], _OF_CLASSES - value.keys(), n=1, cutoff=0.5)
                hint = f" (did you mean {hint[0]}?)" if hint else ": options of the class stand in init_args"
                raise UserError(f"{where}{others[0]} is unknown beside {', '.join(_OF_CLASSES & value.keys())}{hint}")
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            check_classes(one, path, f"{place}.{key}".lstrip("."))


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values a node stands for; one within itself has no end."""
    if id(node) in known:
        if (size := known[id(node)]) is None:
            raise RecursionError
        return size
    known[id(node)] = None
    inner = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inner = [one for pair in node.value for one in pair]
    size = known[id(node)] = 1 + sum(_count(one, known) for one in inner)
    return size
