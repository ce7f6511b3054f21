"""Where the examples of a batch are in the output of a layer, when they are not its first dimension."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """The dimension of a tensor that holds the examples.

    It may hold more: tokens, windows or heads that were joined with them, as when ``[B, T, E]`` becomes ``[B T, E]``.

    Attributes:
        axis: the dimension.
        inner: whether the examples are the inner part of a joined dimension, as when ``[T, B]`` becomes ``[T B]``.
    """

    axis: int = 0
    inner: bool = False

    def front(self, tensor: Tensor, examples: int) -> Tensor:
        """The tensor as [B, ...], a view."""
        size = tensor.shape[self.axis]
        if size == examples:
            return tensor if self.axis == 0 else tensor.movedim(self.axis, 0)
        sizes = (size // examples, examples) if self.inner else (examples, size // examples)
        return tensor.unflatten(self.axis, sizes).movedim(self.axis + self.inner, 0)

    def rows(self, tensor: Tensor, examples: int) -> Tensor:
        """The numbers of each example, [B, n]."""
        return self.front(tensor, examples).reshape(examples, -1)

    def restore(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``rows``, for a tensor of some shape."""
        if self == FIRST:
            return rows.view(shape)
        examples, size = len(rows), shape[self.axis]
        before, after = shape[: self.axis], shape[self.axis + 1 :]
        if size == examples:
            return rows.view(examples, *before, *after).movedim(0, self.axis)
        others = rows.view(examples, *before, size // examples, *after)
        return others.movedim(0, self.axis + self.inner).flatten(self.axis, self.axis + 1)

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """Whether a tensor of some shape can hold so many examples there."""
        return self.axis < len(shape) and shape[self.axis] > 0 and shape[self.axis] % examples == 0


FIRST = Layout()
"""As nearly all tensors have it."""


def layouts_of(shape: Sequence[int], examples: int) -> Iterator[Layout]:
    """All layouts that a shape allows, the most usual first."""
    yield from (Layout(axis) for axis, size in enumerate(shape) if size == examples)
    joined = [axis for axis, size in enumerate(shape) if size > examples and size % examples == 0]
    yield from (Layout(axis, inner) for axis in joined for inner in (False, True))
