"""Max-pooling on a CPU, several times faster in passes that nobody differentiates."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_DIMENSIONS: dict[Callable[..., Any], int] = {F.max_pool2d: 2, F.max_pool3d: 3}
_FEW = 2**13  # numbers, of which PyTorch finds the maxima faster than its functions are called


def max_pool(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a function returns; if it is a max-pooling, by maxima of whole tensors, first along rows, then columns.

    PyTorch's kernel for a CPU looks for the place of each maximum, one number after the other, which only
    backpropagation wants. The maxima are the same, but for which of 0 and -0 is the larger. Where autograd is on, or
    places are asked for, or PyTorch has a fast kernel, on a GPU or with channels last, its own is taken.
    """
    dimensions = _DIMENSIONS.get(func)
    if dimensions is None or torch.is_grad_enabled():
        return func(*args, **kwargs)
    maxima = _maxima(dimensions, *args, **kwargs)
    return func(*args, **kwargs) if maxima is None else maxima


def may_gain(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether ``max_pool`` may be faster than the function itself."""
    return func in _DIMENSIONS and bool(args) and args[0].device.type == "cpu"


class FastPooling(TorchFunctionMode):
    """Context of a pass in which ``max_pool`` runs PyTorch's functions."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        return max_pool(func, args, kwargs or {})


def _maxima(
    dimensions: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """The largest number of each window; None where that is PyTorch's to say, errors included."""
    given = kernel_size, stride or kernel_size, padding, dilation
    each = [tuple(one) if isinstance(one, tuple | list) else (one,) * dimensions for one in given]
    if (
        ceil_mode
        or return_indices
        or input.device.type != "cpu"
        or not input.is_floating_point()
        or input.numel() < _FEW
        or input.ndim not in (dimensions + 1, dimensions + 2)
        or not input.is_contiguous()
        or any(len(one) != dimensions for one in each)
    ):
        return None
    axes = list(zip(input.shape[-dimensions:], *each, strict=True))
    if any(s < 1 or d < 1 or not 0 <= 2 * p <= k or n + 2 * p < (k - 1) * d + 1 for n, k, s, p, d in axes):
        return None
    for axis, (n, k, s, p, d) in zip(range(-1, -dimensions - 1, -1), reversed(axes), strict=True):
        reach = s * ((n + 2 * p - (k - 1) * d - 1) // s) + 1  # from the first window's beginning to after the last's
        padded = F.pad(input, (0, 0) * (-axis - 1) + (p, p), value=-torch.inf) if p else input
        within = (slice(None),) * (-axis - 1)
        input = reduce(torch.maximum, [padded[(..., slice(i * d, i * d + reach, s), *within)] for i in range(k)])
    return input
