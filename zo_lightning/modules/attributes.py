"""What a module keeps beside weights, buffers and metrics: attributes, counters, lists, as they were at one moment."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from zo_lightning.parameters import submodules

_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)
_LARGE = 1000
"""A container with more values is not searched for others within it."""


class Attributes:
    """The public attributes of a module and the state of its metrics, to be put back later.

    So are those of the modules within it that are not PyTorch's own. Containers come back with their contents, also
    those within others: a list of outputs, a counter, a running mean; and so do arrays of NumPy. What is callable stays
    as it is: someone may have put a function in a method's place for the time being.

    Args:
        modules: from ``keeping``.
        metrics: within them.
    """

    def __init__(self, modules: list[nn.Module], metrics: list[Metric]) -> None:
        self._values = [(vars(one), _public(vars(one))) for one in modules]
        self._contents: list[tuple[Any, Any]] = []
        known: set[int] = set()
        for _, values in self._values:
            for value in values.values():
                self._keep(value, known)
        self._metrics = [(metric, _state(metric)) for metric in metrics]
        self._wrapped = {id(inner) for m in metrics if isinstance(m, WrapperMetric) for inner in m.modules()}

    def changed(self) -> list[Metric]:
        """The metrics that have been updated since; the others need not be put back. Wrappers do not count updates."""
        self._metrics = [
            (metric, state)
            for metric, state in self._metrics
            if metric._update_count != state["_update_count"] or id(metric) in self._wrapped
        ]
        return [metric for metric, _ in self._metrics]

    def differs(self) -> bool:
        """Whether anything is no longer as it was."""
        for attributes, values in self._values:
            now = _public(attributes)
            if now.keys() != values.keys() or any(now[name] is not value for name, value in values.items()):
                return True
        return any(not _equal(held, content) for held, content in self._contents) or bool(self.changed())

    def restore(self) -> None:
        """Put everything back."""
        for attributes, values in self._values:
            for name in _public(attributes).keys() - values.keys():
                del attributes[name]
            attributes.update(values)
        for container, content in self._contents:
            _refill(container, content)
        for metric, state in self._metrics:
            vars(metric).update({name: _copy(value) for name, value in state.items()})

    def _keep(self, value: Any, known: set[int]) -> None:
        if isinstance(value, np.ndarray) or type(value) in _CONTAINERS:
            if id(value) in known:
                return
            known.add(id(value))
            self._contents.append((value, value.copy()))
            if type(value) in _CONTAINERS and len(value) <= _LARGE:
                for one in value.values() if isinstance(value, dict) else value:
                    self._keep(one, known)


def keeping(module: nn.Module) -> tuple[list[nn.Module], list[Metric]]:
    """A module and those within it that may keep something: not PyTorch's own, nor metrics, which have a state.

    Returns:
        Those, and the metrics.
    """
    modules = [one for _, one in submodules(module)]
    metrics = [one for one in modules if isinstance(one, Metric)]
    within = {id(inner) for metric in metrics for inner in metric.modules()}
    keep = [
        one
        for one in modules
        if one is module
        or not (
            id(one) in within or type(one).__module__.startswith("torch.nn.") or isinstance(one, torch.jit.ScriptModule)
        )
    ]
    return keep, metrics


def tensors_kept(modules: list[nn.Module]) -> Iterator[Tensor]:
    """The tensors among the attributes of modules."""
    for module in modules:
        for value in _public(vars(module)).values():
            if isinstance(value, Tensor):
                yield value


def _public(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name[:1] != "_" and not callable(value)}


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, np.ndarray):
        container[...] = content
        return
    container.clear()
    if isinstance(container, dict):  # a Counter's ``update`` would count
        for key, value in content.items():
            container[key] = value
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


def _equal(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects: what tensors say to ``==`` is no answer."""
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, set):
        return a == b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(value is b[key] for key, value in a.items())
    return len(a) == len(b) and all(one is other for one, other in zip(a, b, strict=True))


def _state(metric: Metric) -> dict[str, Any]:
    """What a metric's updates change: of a wrapper, which may keep numbers of its own, everything."""
    attributes = vars(metric)
    names = attributes if isinstance(metric, WrapperMetric) else (*metric._defaults, "_update_count", "_computed")
    return {name: _copy(attributes[name]) for name in names}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value.copy() if type(value) is list else value
