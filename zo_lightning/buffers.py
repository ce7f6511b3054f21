"""A module's buffers, such as the statistics of BatchNorm, as they were at one moment."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from zo_lightning.parameters import submodules


class Buffers:
    """The values of a module's buffers, to be put back later: by name, so that a replaced buffer comes back too."""

    def __init__(self, module: nn.Module) -> None:
        self._saved = [
            (owner._buffers, name, buffer, buffer.detach().clone())
            for _, owner in submodules(module)
            for name, buffer in owner._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]

    def __bool__(self) -> bool:
        return bool(self._saved)

    def equals(self, other: "Buffers") -> bool:
        """Whether the same buffers had the same values."""
        return len(self._saved) == len(other._saved) and all(
            mine[2] is theirs[2] and torch.equal(mine[3], theirs[3])
            for mine, theirs in zip(self._saved, other._saved, strict=True)
        )

    def restore(self) -> None:
        """Put them back."""
        with torch.no_grad():
            for owner, name, buffer, value in self._saved:
                owner[name] = buffer
                if not _overlaps(buffer):  # which nothing in PyTorch can write into
                    buffer.copy_(value)


def _overlaps(tensor: Tensor) -> bool:
    """Whether numbers of a tensor share their place in memory, as in an expanded view."""
    if tensor.layout != torch.strided:
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
