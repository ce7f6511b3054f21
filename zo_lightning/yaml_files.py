"""Configuration files as they come: text that is read whole, and small enough to be worked with."""

from pathlib import Path

import yaml

from zo_lightning.cli_errors import UserError

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
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deep, or an alias (*name) stands within what it names") from error
    except (ValueError, OverflowError) as error:  # a date that does not exist, a number of thousands of digits
        raise UserError(f"{path}: {error}") from error
    return text


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
