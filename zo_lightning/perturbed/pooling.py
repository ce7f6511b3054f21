"""Max-pooling on a CPU, several times faster in passes that nobody differentiates."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

POOLINGS: dict[Callable[..., Any], int] = {F.max_pool2d: 2, F.max_pool3d: 3}
"""The functions that ``maxima`` may stand for, and in how many dimensions."""

_FEW = 2**13  # numbers, of which PyTorch finds the maxima faster than its functions are called
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class FastPooling(TorchFunctionMode):
    """Context of a pass in which ``maxima`` stands for max-poolings."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of PyTorch."""
        pooled = maxima(func, args, kwargs or {}) if func in POOLINGS else None
        return func(*args, **(kwargs or {})) if pooled is None else pooled


def maxima(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """What a max-pooling gives, by maxima of whole tensors, first along rows, then columns.

    PyTorch's kernel for a CPU looks for the place of each maximum, one number after the other, which only
    backpropagation wants. The maxima are the same, but for which of 0 and -0 is the larger.

    Returns:
        None where PyTorch's own kernel is to be taken: where autograd is on, of either mode, on a GPU, with channels
        last or few numbers, where places are asked for, and where the arguments are not what they should be.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return None
    try:
        asked = _Asked(*args, **kwargs)
    except TypeError:
        return None
    axes = asked.axes(POOLINGS[func]) if asked.is_common else None
    if axes is None:
        return None
    pooled = asked.input
    for axis, (size, kernel, stride, padding, dilation) in zip(range(-1, -len(axes) - 1, -1), axes[::-1], strict=True):
        reach = size + 2 * padding - (kernel - 1) * dilation  # where windows may begin
        within = (slice(None),) * (-axis - 1)
        padded = F.pad(pooled, (0, 0) * len(within) + (padding, padding), value=-torch.inf) if padding else pooled
        places = (slice(k * dilation, k * dilation + reach, stride) for k in range(kernel))
        pooled = reduce(torch.maximum, [padded[(..., place, *within)] for place in places])
    return pooled


class _Asked(NamedTuple):
    """The arguments of a max-pooling."""

    input: Tensor
    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False
    return_indices: bool = False

    @property
    def is_common(self) -> bool:
        """Whether it is one of those for which PyTorch has no fast kernel."""
        x = self.input
        return (
            type(x) in (Tensor, nn.Parameter)
            and not (self.ceil_mode or self.return_indices)
            and x.device.type == "cpu"
            and x.layout == torch.strided
            and x.dtype in _DTYPES
            and x.numel() >= _FEW
            and x.is_contiguous()
        )

    def axes(self, dimensions: int) -> list[tuple[int, ...]] | None:
        """Of each axis its size, kernel, stride, padding and dilation; None where one is wrong, or has one window."""
        given = self.kernel_size, self.stride or self.kernel_size, self.padding, self.dilation
        each = [tuple(one) if isinstance(one, tuple | list) else (one,) * dimensions for one in given]
        if self.stride == 0 or self.input.ndim not in (dimensions + 1, dimensions + 2):
            return None
        if not all(len(one) == dimensions and {*map(type, one)} == {int} for one in each):
            return None
        axes = list(zip(self.input.shape[-dimensions:], *each, strict=True))
        right = all(k > 1 and s > 0 and d > 0 and 0 <= 2 * p <= k for _, k, s, p, d in axes)
        return axes if right and all(n + 2 * p - (k - 1) * d > s for n, k, s, p, d in axes) else None
