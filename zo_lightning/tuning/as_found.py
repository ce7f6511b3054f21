"""A module and its data as they were at one moment, to be put back whatever has been done with them since."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from zo_lightning.modules.attributes import Attributes, keeping, tensors_kept
from zo_lightning.parameters import submodules
from zo_lightning.random_states import random_states, set_random_states

_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)


class AsFound:
    """The whole state of a module, of what serves its data, and of the random generators.

    Weights, buffers and tensors among a module's attributes come back as the same objects in the same memory, with
    their numbers, ``.grad`` and ``requires_grad``; so do all other attributes, methods put in an object's place and
    hooks, and the state of metrics.

    Args:
        module: any.
        others: objects of which the attributes are kept, such as a data module.
    """

    def __init__(self, module: nn.Module, *others: Any) -> None:
        modules = [one for _, one in submodules(module)]
        own = keeping(module)
        self._attributes = Attributes(own, [one for one in modules if isinstance(one, Metric)])
        python = [one for one in modules if not isinstance(one, torch.jit.ScriptModule)]
        self._held = [_Held(vars(one)) for one in (*python, *others) if hasattr(one, "__dict__")]
        self._parameters = [(p, p.grad, p.requires_grad) for p in module.parameters()]
        tensors = (*module.parameters(), *module.buffers(), *tensors_kept(own))
        self._tensors = [(t, t.data, t.detach().clone()) for t in tensors]
        self._modes = [(one, one.training) for one in modules]
        self._generators = [(one, one.get_state()) for other in others for one in _generators(other)]
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
        for generator, state in self._generators:
            generator.set_state(state)
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


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """The random generators that a loader and its samplers own."""
    for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
            yield generator
