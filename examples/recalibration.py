"""A regression by a black box: a frozen forest of trees gives the predictions, and what is trained stands before it.

A sensor delivers mixed and shifted numbers to a model that was fitted on the true ones. A linear map of what the sensor
says is trained by the forest's errors alone: a tree has no gradient.

python -m examples.recalibration                                            # the error before, and with the exact map
zo-lightning study -c examples/benchmark_black_boxes.yaml --data.root data  # by which method how far
"""

import argparse

import torch
from pytorch_lightning import LightningDataModule
from sklearn.datasets import make_friedman1
from sklearn.ensemble import GradientBoostingRegressor
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning.data.batches import ShuffledBatches, TensorBatches

INPUTS = 10
Pair = tuple[Tensor, Tensor]


def function(examples: int, seed: int) -> Pair:
    """Friedman's first function (1991): inputs [n, 10] uniform in [0, 1]; targets [n, 1] with noise of variance 1."""
    x, y = make_friedman1(examples, INPUTS, noise=1.0, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32).view(-1, 1)


def sensor() -> Pair:
    """What the sensor does, ``x ↦ x Mᵀ + b``: the matrix [10, 10] and the vector [10]."""
    stream = torch.Generator().manual_seed(0)
    mixed = 0.7 * torch.randn(INPUTS, INPUTS, generator=stream) / INPUTS**0.5
    return torch.eye(INPUTS) + mixed, 0.3 * torch.randn(INPUTS, generator=stream)


class Sensor(LightningDataModule):
    """5,000 examples for training and 2,000 for testing, as the sensor says.

    Args:
        batch_size: examples per batch.
        val_size: the number of training examples that are held out, or their share; 0 validates on the test set.
        seed: decides the split and the order of the batches; None takes PyTorch's own.
        root: of files; there are none.
    """

    def __init__(
        self, batch_size: int = 128, val_size: int | float = 0, seed: int | None = None, root: str = "data"
    ) -> None:
        super().__init__()
        self.batch_size, self.val_size = batch_size, val_size
        self.seed = torch.initial_seed() if seed is None else seed

    def setup(self, stage: str | None = None) -> None:
        """Make the data."""
        matrix, shift = sensor()
        (x, y), (test, targets) = function(5000, 1), function(2000, 2)
        self.test = test @ matrix.T + shift, targets
        held_out = round(self.val_size * len(x)) if self.val_size < 1 else int(self.val_size)
        if not 0 <= held_out < len(x):
            raise ValueError(f"val_size={self.val_size} must leave some of the {len(x)} training examples")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed % 2**63))
        x = x @ matrix.T + shift
        self.train = x[order[held_out:]], y[order[held_out:]]
        self.val = (x[order[:held_out]], y[order[:held_out]]) if held_out else self.test

    def train_dataloader(self) -> ShuffledBatches:
        """In a new order every epoch."""
        return ShuffledBatches(*self.train, self.batch_size, self.seed)

    def val_dataloader(self) -> TensorBatches:
        """What was held out, or else the test set."""
        return TensorBatches(*self.val, self.batch_size)

    def test_dataloader(self) -> TensorBatches:
        """The test set."""
        return TensorBatches(*self.test, self.batch_size)


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
