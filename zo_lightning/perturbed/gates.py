"""What hides a layer's output from the loss: a ReLU, a max-pooling, or both, if nothing else reads the output."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
MAX_POOL = {F.max_pool1d, F.max_pool2d, F.max_pool3d}


class Gate(NamedTuple):
    """What alone reads an output.

    Attributes:
        rectified: a ReLU, before or after the pooling.
        pooled: a max-pooling whose windows do not overlap.
    """

    rectified: bool = False
    pooled: bool = False


class Tracked:
    """A tensor of a pass and what has read it.

    Attributes:
        reads: each reader, a function or something else; with what came out, if that was a ReLU or a pooling.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # kept, so that its id stays its own
        self.reads: list[tuple[Any, Tracked | None]] = []

    @property
    def only_reader(self) -> Any:
        """What alone has read it, or None."""
        return self.reads[0][0] if len(self.reads) == 1 else None

    def gate(self) -> Gate:
        """What hides it."""
        return self._end()[0]

    def visible(self) -> int:
        """How many of its numbers, in all examples together, what hides it lets through."""
        gate, end = self._end()
        return int((end.tensor > 0).sum()) if gate.rectified else end.tensor.numel()

    def _end(self) -> "tuple[Gate, Tracked]":
        rectified = pooled = False
        at = self
        while not (rectified and pooled) and len(at.reads) == 1:
            reader, then = at.reads[0]
            if then is None or (pooled and reader in MAX_POOL):
                break
            rectified, pooled, at = rectified or reader in RELU, pooled or reader in MAX_POOL, then
        return Gate(rectified, pooled), at


def are_separate(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, *rest: Any, **options: Any
) -> bool:
    """Whether the windows of a max-pooling, called with these arguments, do not overlap."""
    n = input.ndim - 2
    kernel, step, gaps = (value if isinstance(value, tuple | list) else (value,) * n for value in
                          (kernel_size, stride or kernel_size, dilation))  # fmt: skip
    return all(s >= (k - 1) * d + 1 for k, s, d in zip(kernel, step, gaps, strict=False))
