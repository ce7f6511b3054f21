"""A module and its data as they were at one moment, to be put back whatever has been done with them since."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from zo_lightning.modules.attributes import Attributes, keeping, tensors_kept
from zo_lightning.parameters import submodules
from zo_lightning.random_states import random_states, set_random_states

_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_OWNERS = (*_GENERATORS, DataLoader, Dataset, Sampler, LightningDataModule)
_FEW = 100
"""A container with more values is not searched for loaders: it holds data."""


class AsFound:
    """The whole state of a module, of what serves its data, and of the random generators.

    Weights, buffers and tensors among a module's attributes come back as the same objects in the same memory, with
    their numbers, ``.grad`` and ``requires_grad``; so do all other attributes, methods put in an object's place and
    hooks, and the state of metrics.

    Args:
        module: any.
        others: objects of which the attributes are kept, such as a data module, or lists and dictionaries of loaders.
    """

    def __init__(self, module: nn.Module, *others: Any) -> None:
        modules = [one for _, one in submodules(module)]
        own, metrics = keeping(module)
        self._attributes = Attributes(own, metrics)
        python = [one for one in modules if not isinstance(one, torch.jit.ScriptModule)]
        self._held = [_Held(vars(one)) for one in (*python, *others) if hasattr(one, "__dict__")]
        self._parameters = [(p, p.grad, p.requires_grad) for p in module.parameters()]
        tensors = (*module.parameters(), *module.buffers(), *tensors_kept(own))
        self._tensors = [(t, t.data, t.detach().clone()) for t in tensors]
        self._modes = [(one, one.training) for one in modules]
        self._generators = [_setter(one) for one in _generators([*python, *others])]
        self._random = random_states()

    def restore(self) -> None:
        """Put everything back."""
        for held in self._held:
            held.restore()
        self._attributes.restore()
        with torch.no_grad():
            for tensor, memory, numbers in self._tensors:
                tensor.data = memory
                if not torch.equal(memory, numbers):  # else it may be an expanded one, which cannot be written into
                    memory.copy_(numbers)
        for p, grad, requires_grad in self._parameters:
            p.grad = grad
            p.requires_grad_(requires_grad)
        for one, training in self._modes:
            one.training = training
        for set_state in self._generators:
            set_state()
        set_random_states(self._random)


class _Held:
    """The attributes of one object, with the contents of their containers."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes, self._values = attributes, dict(attributes)
        self._contents = [(one, one.copy()) for one in attributes.values() if type(one) in _CONTAINERS]

    def restore(self) -> None:
        self._attributes.clear()
        self._attributes.update(self._values)
        for container, content in self._contents:
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(content)


class OptimizerAsFound:
    """An optimizer with its groups and state: a module may give the same one each time, instead of a new one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._held = _Held(vars(optimizer))
        self._groups = [(group, dict(group)) for group in optimizer.param_groups]
        self._state = [(p, own, {k: _copy(v) for k, v in own.items()}) for p, own in optimizer.state.items()]

    def restore(self) -> None:
        """Put everything back."""
        self._held.restore()
        for group, content in self._groups:
            group.clear()
            group.update(content)
        for _, own, content in self._state:
            own.clear()
            own.update(content)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _generators(owners: Iterable[Any], known: set[int] | None = None) -> Iterator[Any]:
    """The random generators that modules and data own, with their loaders, samplers and data sets."""
    known = set() if known is None else known
    for owner in owners:
        if id(owner) in known:
            continue
        known.add(id(owner))
        if isinstance(owner, _GENERATORS):
            yield owner
        elif isinstance(owner, list | tuple | Mapping):
            inner = owner.values() if isinstance(owner, Mapping) else owner
            yield from _generators([one for one in inner if isinstance(one, _OWNERS)], known)
        elif hasattr(owner, "__dict__"):
            values = vars(owner).values()
            few = [one for one in values if isinstance(one, list | tuple | Mapping) and len(one) <= _FEW]
            yield from _generators([*few, *(one for one in values if isinstance(one, _OWNERS))], known)


def _setter(generator: Any) -> Callable[[], None]:
    """Puts a generator back to where it is now."""
    if isinstance(generator, np.random.Generator):
        bits, state = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())
