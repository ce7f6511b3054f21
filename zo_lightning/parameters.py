"""What can be trained, beside a module: tensors of one's own, alone, in lists or in dictionaries."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Parameters = nn.Module | Tensor | Iterable[Any] | Mapping[Any, Any]
"""A module; a tensor; or tensors in lists, tuples, generators and dictionaries, nested as one likes."""


class Tensors(nn.Module):
    """Tensors as the parameters of a module: the same objects, which get the ``.grad``, by their names.

    Args:
        tensors: by name, leaves that require a gradient; an ``nn.Parameter`` that does not is frozen.

    Raises:
        TypeError: one is no tensor.
        ValueError: a tensor is no leaf, or a plain one that requires no gradient; or there is none.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        if not tensors:
            raise ValueError("there is nothing to train: the parameters are an empty list, dictionary or generator")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"parameter {name} must be a tensor, got {type(tensor).__name__}: torch.as_tensor makes one"
                )
            if not tensor.is_leaf:
                raise ValueError(f"parameter {name} is computed from other tensors: pass those, or a detached copy")
            if not tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                raise ValueError(f"parameter {name} requires no gradient: call requires_grad_() on it, or leave it out")
        self._parameters.update(tensors)  # type: ignore[arg-type]  # register_parameter takes no plain tensor


def as_module(parameters: Parameters) -> nn.Module:
    """A module as it is, or one that holds the given tensors.

    The names of tensors are their places: ``0``, ``1``, ... in a list, keys in a dictionary, ``encoder.0`` in a list
    within one. What else belongs to a module, such as BatchNorm's statistics or an embedding's padding, is known of
    modules alone.

    Raises:
        TypeError: something in the place of a tensor is none.
        ValueError: a tensor cannot be trained.
    """
    if isinstance(parameters, nn.Module):
        return parameters
    tensors: dict[str, Tensor] = {}
    mapped(tensors.__setitem__, parameters)
    return Tensors(tensors)


def kept(parameters: Parameters) -> Parameters:
    """Parameters that can be gone through many times: a generator as a list."""
    lasting = isinstance(parameters, nn.Module | Sequence | Mapping) or hasattr(parameters, "__array__")
    return parameters if lasting else list(parameters)  # type: ignore[arg-type]


@contextmanager
def as_parameters(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let plain tensors count as instances of ``nn.Parameter``, by PyTorch's own mark, for those who ask by that."""
    plain: list[Any] = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
    for tensor in plain:
        tensor._is_param = True
    try:
        yield
    finally:
        for tensor in plain:
            del tensor._is_param


def submodules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``module.named_modules()`` gives, in a third of the time: torchmetrics' modules are slow to hash."""
    found: list[tuple[str, nn.Module]] = []
    _visit("", module, found, set())
    return found


def _visit(prefix: str, module: nn.Module, found: list[tuple[str, nn.Module]], seen: set[int]) -> None:
    # A function of its own: one within `submodules` would refer to itself, and keep the module until Python looks.
    seen.add(id(module))
    found.append((prefix, module))
    for name, child in module._modules.items():
        if child is not None and id(child) not in seen:
            _visit(f"{prefix}.{name}" if prefix else name, child, found, seen)


def mapped(function: Callable[[str, Any], Any], parameters: Parameters, name: str = "") -> Any:
    """The same lists and dictionaries, with ``function(name, tensor)`` in the place of each tensor or array.

    A module gives a dictionary of its weights that require a gradient, as ``torch.func.functional_call`` takes it.

    Raises:
        TypeError: something in the place of a tensor is none.
    """
    if hasattr(parameters, "__array__"):
        return function(name or "0", parameters)
    if isinstance(parameters, nn.Module) and not name:
        return {key: function(key, p) for key, p in parameters.named_parameters() if p.requires_grad}
    prefix = f"{name}." if name else ""
    if isinstance(parameters, Mapping):
        return {key: mapped(function, one, f"{prefix}{key}") for key, one in parameters.items()}
    items: list[Any]
    if isinstance(parameters, Iterable) and not isinstance(parameters, nn.Module | str | bytes):
        items = list(parameters)
        if items and all(map(_is_named, items)):  # named_parameters()
            return mapped(function, dict(items), name)
        new = [mapped(function, one, f"{prefix}{position}") for position, one in enumerate(items)]
        return tuple(new) if isinstance(parameters, tuple) else new
    where, may_be = (f"parameter {name}", "a tensor") if name else ("the parameters", "an nn.Module, a tensor")
    hint = "; several modules go into an nn.ModuleList" if isinstance(parameters, nn.Module) else ""
    raise TypeError(
        f"{where} must be {may_be}, or tensors in lists and dictionaries, got {type(parameters).__name__}{hint}"
    )


def _is_named(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
