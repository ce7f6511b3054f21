"""A regression by a black box: a frozen forest of trees gives the predictions, and what is trained stands before it.

A sensor delivers mixed and shifted numbers to a model that was fitted on the true ones. A linear map of what the sensor
says is trained by the forest's errors alone: a tree has no gradient.

python -m examples.recalibration                                            # the error before, and with the exact map
zo-lightning study -c examples/benchmark_black_boxes.yaml --data.root data  # by which method how far
"""

import argparse

import torch
from sklearn.datasets import make_friedman1
from sklearn.ensemble import GradientBoostingRegressor
from torch import Tensor, nn
from torch.nn import functional as F

from examples.split_data import Pair, SplitData

INPUTS = 10


def function(examples: int, seed: int) -> Pair:
    """Friedman's first function (1991): inputs [n, 10] uniform in [0, 1]; targets [n, 1] with noise of variance 1."""
    x, y = make_friedman1(examples, INPUTS, noise=1.0, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32).view(-1, 1)


def sensor() -> Pair:
    """What the sensor does, ``x ↦ x Mᵀ + b``: the matrix [10, 10] and the vector [10]."""
    stream = torch.Generator().manual_seed(0)
    mixed = 0.7 * torch.randn(INPUTS, INPUTS, generator=stream) / INPUTS**0.5
    return torch.eye(INPUTS) + mixed, 0.3 * torch.randn(INPUTS, generator=stream)


class Sensor(SplitData):
    """5,000 examples for training and 2,000 for testing, as the sensor says."""

    def load(self) -> tuple[Pair, Pair]:
        """Make the data."""
        matrix, shift = sensor()
        (x, y), (test, targets) = function(5000, 1), function(2000, 2)
        return (x @ matrix.T + shift, y), (test @ matrix.T + shift, targets)


class Recalibrated(nn.Module):
    """A forest that was fitted on true inputs, behind a linear map, at first the identity: 110 weights."""

    def __init__(self) -> None:
        super().__init__()
        x, y = function(5000, 0)
        self.forest = GradientBoostingRegressor(random_state=0).fit(x.numpy(), y.flatten().numpy())
        self.map = nn.Linear(INPUTS, INPUTS)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(INPUTS))
            self.map.bias.zero_()

    def forward(self, readings: Tensor) -> Tensor:
        """The predictions [n, 1] for readings [n, 10]."""
        x = self.map(readings).detach()
        return torch.tensor(self.forest.predict(x.cpu().numpy()), dtype=x.dtype, device=x.device).view(-1, 1)


def main() -> None:
    """Print the test error before, and with the map that undoes what the sensor does."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    data, net, (matrix, shift) = Sensor(), Recalibrated(), sensor()
    data.setup()
    readings, targets = data.test
    for when in ("before", "with the sensor's inverse"):
        print(f"mean squared error on the test set {when}: {F.mse_loss(net(readings), targets):.2f}")
        with torch.no_grad():
            net.map.weight.copy_(matrix.inverse())
            net.map.bias.copy_(-matrix.inverse() @ shift)
    print(f"of always saying the mean: {targets.var(correction=0):.2f}; the targets' noise: 1.00")


if __name__ == "__main__":
    main()
