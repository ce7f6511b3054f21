"""The tensors in what a module returns: a tensor, or a container of them."""

import copy
from collections.abc import Callable
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

_OBJECTS = (SimpleNamespace, Distribution)


def replaced(value: Any, by: Callable[[Tensor], Tensor]) -> Any:
    """A value with each of its tensors of numbers replaced, in order; the value itself stays as it is.

    Tuples, lists, dictionaries, dataclasses, namespaces and distributions are looked into, also where they are of
    classes of their own, as the outputs of transformers' models.
    """
    if isinstance(value, Tensor):
        return by(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        items = {key: replaced(one, by) for key, one in value.items()}
        if type(value) is dict:
            return items
        found = copy.copy(value)
        for key, one in items.items():
            found[key] = one
        return found
    if isinstance(value, tuple | list):
        items = [replaced(one, by) for one in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, _OBJECTS) or (is_dataclass(value) and not isinstance(value, type)):
        found = copy.copy(value)
        for name, one in vars(value).items():
            object.__setattr__(found, name, replaced(one, by))
        return found
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of numbers in a value, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    replaced(value, note)
    return found
