"""The device, in simulation: a chip whose weights are not what was written, and whose sums are clipped."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES = ((32, 64), (10, 32))  # of the weights
LIMIT = 2.0  # a sum of currents is clipped at ±2, and read in steps of 1/4


class Device:
    """A crossbar chip, to be replaced by a real one: weights are written into its cells, and its outputs are read."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.gain = [torch.exp(0.5 * torch.randn(shape, generator=self.random)) for shape in SHAPES]  # of each cell
        self.fading = [0.1 * torch.rand(shape, generator=self.random) for shape in SHAPES]
        self.shift = [0.2 * torch.randn(shape[0], generator=self.random) for shape in SHAPES]  # of each column's reader
        self.reads = 0

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """What one read of a batch gives for each layer; the last are the logits."""
        self.reads += 1
        outputs = []
        for weight, gain, fading, shift in zip(weights, self.gain, self.fading, self.shift, strict=True):
            noise = 1 + 0.1 * torch.randn(weight.shape, generator=self.random)
            cells = weight.clamp(-1, 1) * gain * noise * (1 + self.reads / 1000) ** -fading
            outputs.append((F.linear(x, cells, shift).clamp(-LIMIT, LIMIT) * 4).round() / 4)
            x = outputs[-1].relu()
        return outputs
