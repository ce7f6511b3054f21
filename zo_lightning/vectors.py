"""A tensor for each of some weights in one piece of memory, which can be lent and taken back."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from zo_lightning.counter import ALIGNMENT

_users: Any = getattr(torch._C, "_storage_Use_Count", None)
"""How many tensors share a piece of memory, where PyTorch tells."""


class Vector(list[Tensor]):
    """A tensor for each of some weights, or a stack of such; where these are alike, one operation serves all.

    Attributes:
        flat: [..., numbers], what the tensors are parts of, each from a multiple of ``ALIGNMENT`` on; None where the
            weights are not all contiguous and of one real dtype on one device.
    """

    def __init__(self, tensors: Iterable[Tensor], flat: Tensor | None = None) -> None:
        super().__init__(tensors)
        self.flat = flat
        self._own = self._holders()
        self._is_lent = False

    @classmethod
    def like(cls, weights: Sequence[Tensor]) -> Self:
        """New tensors like some weights."""
        if not _are_alike(weights):
            return cls(map(torch.empty_like, weights))
        begins = starts(w.numel() for w in weights)
        flat = weights[0].new_empty(begins[-1])
        parts = (flat.as_strided(w.shape, w.stride(), k) for w, k in zip(weights, begins, strict=False))
        # Some of PyTorch's functions round a view of a view otherwise than a view of a weight: detached, none is one.
        return cls([part.detach() for part in parts], flat)

    @classmethod
    def stack(cls, weights: Sequence[Tensor], rows: int) -> Self:
        """New tensors [rows, ...] like some weights."""
        if not _are_alike(weights):
            return cls(w.new_empty((rows, *w.shape)) for w in weights)
        begins = starts(w.numel() for w in weights)
        flat = weights[0].new_empty(rows, begins[-1])
        parts = (flat[:, k : k + w.numel()].view(rows, *w.shape) for w, k in zip(weights, begins, strict=False))
        return cls(parts, flat)

    def rows(self, of: slice) -> Self:
        """Some rows of a stack."""
        return type(self)([t[of] for t in self], None if self.flat is None else self.flat[of])

    def unstack(self) -> list[Self]:
        """The rows of a stack."""
        rows = zip(*(t.unbind() for t in self), strict=True)
        flat = [None] * len(self[0]) if self.flat is None else self.flat.unbind()
        return [type(self)(row, one) for row, one in zip(rows, flat, strict=True)]

    def copy_(self, other: "Vector") -> Self:
        """Take the numbers of another vector of the same weights."""
        for mine, its in zip(self, other, strict=True):
            mine.copy_(its)
        return self

    def mul_(self, factor: float) -> Self:
        """Multiply all numbers in place."""
        if self.flat is None:
            torch._foreach_mul_(self, factor)
        else:
            self.flat.mul_(factor)
        return self

    def add_(self, other: "Vector", alpha: float) -> None:
        """Add ``alpha`` times another vector of the same weights."""
        if self.flat is None or other.flat is None:
            torch._foreach_add_(self, other, alpha=alpha)
        else:
            self.flat.add_(other.flat, alpha=alpha)

    def lend(self) -> list[Tensor]:
        """The tensors, as others in the same memory: whoever gets them may keep them, or what is made of them."""
        self._is_lent = True
        return [t.data for t in self]

    @property
    def is_free(self) -> bool:
        """Whether what was lent is gone, so that the memory can be written into again; False where nobody knows.

        Of a GPU's memory that is not asked: there it is no dearer when it is new.
        """
        return not self._is_lent or (0, 0) != self._own == self._holders()

    def _holders(self) -> tuple[int, int]:
        """How many hold the memory, in PyTorch and in Python; (0, 0) where that cannot be known."""
        if self.flat is None or self.flat.device.type != "cpu" or _users is None:
            return 0, 0
        storage = self.flat.untyped_storage()
        if storage.is_shared() or not storage.nbytes():  # with other processes; given back
            return 0, 0
        return _users(storage._cdata), getrefcount(storage)


def _are_alike(weights: Sequence[Tensor]) -> bool:
    kinds = {(type(w), w.dtype, w.device, w.is_contiguous()) for w in weights}
    if len(kinds) != 1:
        return False
    kind, dtype, _, contiguous = kinds.pop()
    return contiguous and not dtype.is_complex and kind in (Tensor, nn.Parameter)


def starts(sizes: Iterable[int]) -> list[int]:
    """Where tensors of some sizes start in a stream, and where the last one ends."""
    return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
