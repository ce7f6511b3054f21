"""Tensors of a pass that no example enters: weights, buffers, and what is computed from them or from numbers alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning.perturbed.rules import tensors_in
from zo_lightning.perturbed.weights import writes

_NUMBERS = ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "tril_indices", "triu_indices", "zeros")
_LIKE = ("empty_like", "full_like", "ones_like", "zeros_like")
_NEW = ("new_empty", "new_full", "new_ones", "new_zeros")
FROM_NUMBERS: set[Any] = {getattr(torch, name) for name in (*_NUMBERS, *_LIKE)} | {getattr(Tensor, n) for n in _NEW}
"""Functions whose result does not depend on the numbers of the tensors that they are given."""

_RANDOM = {
    *("alpha_dropout", "bernoulli", "bernoulli_", "cauchy_", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("dropout_", "exponential_", "feature_alpha_dropout", "feature_dropout", "geometric_", "gumbel_softmax"),
    *("log_normal_", "multinomial", "normal", "normal_", "poisson", "rand_like", "randint_like", "randn_like"),
    *("random_", "rrelu", "uniform_"),
}
DROPOUTS: set[Any] = {torch.dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
"""Functions that multiply by random numbers."""


def _is_random(func: Callable[..., Any]) -> bool:
    """Whether a function draws random numbers, which may differ from example to example."""
    return getattr(func, "__name__", "") in _RANDOM


class Constants:
    """The ids of such tensors, which are kept alive.

    Args:
        module: whose weights and buffers they are.
        buffers: whether buffers are; a whole batch may be in one.
    """

    def __init__(self, module: nn.Module, buffers: bool = True) -> None:
        self._module, self._buffers = module, buffers
        self._of: dict[int, Tensor] | None = None

    @property
    def ids(self) -> dict[int, Tensor]:
        """By id, the tensors."""
        if self._of is None:
            self._of = {id(t): t for t in self._module.parameters()}
            self._of |= {id(t): t for t in self._module.buffers() if self._buffers}
        return self._of

    def hold(self, func: Callable[..., Any], given: Sequence[Tensor]) -> bool:
        """Whether no example enters a call's result."""
        ids = self.ids
        for tensor in given:
            if id(tensor) not in ids:
                return func in FROM_NUMBERS
        return (bool(given) or func in FROM_NUMBERS) and not _is_random(func)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is one."""
        return id(tensor) in self.ids

    def note(self, func: Callable[..., Any], args: Sequence[Any], output: Any, constant: bool) -> None:
        """Take in what a call gave, if no example enters it; or let go of what it wrote into.

        Args:
            func: the function.
            args: of the call.
            output: of the call.
            constant: from ``hold``, before the call.
        """
        if constant:
            for tensor in tensors_in((output,)):
                self.add(tensor)
        elif args and id(args[0]) in self.ids and writes(func):
            self.drop(args[0])

    def add(self, tensor: Tensor) -> None:
        """Take in a tensor."""
        self.ids[id(tensor)] = tensor

    def drop(self, tensor: Tensor) -> None:
        """Something of the examples was written into a tensor: it is out, and so is what shares its memory."""
        memory = tensor.untyped_storage().data_ptr()
        for key, kept in list(self.ids.items()):
            if kept.untyped_storage().data_ptr() == memory:
                del self.ids[key]
