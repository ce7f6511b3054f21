"""A forward pass with a graph that ends at every layer: no derivative leads from a layer's output to its input."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from zo_lightning.perturbed import affine  # noqa: F401  # it registers rules
from zo_lightning.perturbed.constants import Constants
from zo_lightning.perturbed.rules import RULES, tensors_in
from zo_lightning.perturbed.weights import ASKS, DisplacedWeights, Weights

_LOCAL: set[Any] = {F.instance_norm, F.prelu, torch.prelu, Tensor.prelu}
"""Functions that act number by number, or channel by channel, and have no rule that says so."""


class Cut(NamedTuple):
    """Where the graph was cut.

    Attributes:
        position: of the layer's first weight.
        use: how many uses of that weight were cut before.
        tensor: what the layer was given, with the graph of what made it; the layer itself saw it without.
    """

    position: int
    use: int
    tensor: Tensor


class CutAtLayers(DisplacedWeights):
    """Context of one pass with a graph, in which every layer sees its inputs without one.

    A layer is a call of one of PyTorch's functions with trainable weights that mix numbers: a linear layer, a
    convolution, all of an LSTM. Normalisations, gains and shifts, whose weights act on one channel each, are no layers:
    like all functions without weights they are differentiated as ever, and belong to the layer before. What is computed
    from weights alone stands for them.

    Args:
        module: owns the weights.
        weights: of the module.
        before_write: as for ``DisplacedWeights``.

    Attributes:
        cuts: in the order of the pass; the first layer is given the examples, which have no graph to be cut.
        outputs: of all layers.
    """

    def __init__(
        self, module: nn.Module, weights: Weights, before_write: Callable[[Tensor], None] | None = None
    ) -> None:
        super().__init__(weights, weights.__getitem__, before_write=before_write)
        self.cuts: list[Cut] = []
        self.outputs: list[GradientEdge] = []
        self._constants = Constants(module)
        self._of = {id(p): position for position, p in enumerate(weights)}  # also what is made of them
        self._counts: dict[int, int] = {}

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function of PyTorch, cut off from what made its inputs if it is a layer."""
        if func in ASKS:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        constant = self._constants.hold(func, given)
        position = next((self._of[id(t)] for t in given if id(t) in self._of and t.requires_grad), -1)
        is_layer = position >= 0 and not constant and not _is_local(func)
        if is_layer:
            args, kwargs = self._cut(position, given, args, kwargs)
        output = super().run(func, args, kwargs)
        self._constants.note(func, args, output, constant)
        if is_layer:
            self.outputs += [get_gradient_edge(t) for t in tensors_in((output,)) if t.requires_grad]
        elif constant and position >= 0:
            self._of |= {id(t): position for t in tensors_in((output,)) if id(t) not in self._of}
        return output

    def _cut(
        self, position: int, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moving = {id(t): t for t in given if t.requires_grad and not self._constants.has(t)}
        if not moving:
            return args, kwargs
        for tensor in moving.values():
            use = self._counts[position] = self._counts.get(position, -1) + 1
            self.cuts.append(Cut(position, use, tensor))
        return pytree.tree_map(lambda leaf: leaf.detach() if id(leaf) in moving else leaf, (args, kwargs))


def _is_local(func: Callable[..., Any]) -> bool:
    return func in _LOCAL or (func in RULES and RULES[func].few_weights)
