"""How well estimates of two forward passes each point along the true gradient: cos², on MNIST's nets.

    python benchmarks/alignment.py --root data [--scales 0.1112 12.33] [--draws 100]

At the initial weights, and after some steps of backpropagation; every estimate is compared with the gradient of its own
batch. "With feedback" is the default estimator, which learns during these draws. Beside cos² stands what an estimate
costs: floating-point operations in forward passes of the batch, and milliseconds (medians, in turns). Last comes the
bias that batch normalisation leaves, in a net of three convolutions with it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import mean, median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import (
    Backprop,
    GradientEstimator,
    PerExample,
    ScalableCNN,
    Sphere,
    ZerothOrder,
)
from zo_lightning.costs import count_flops
from zo_lightning.data import MNIST
from zo_lightning.measures import cosine
from zo_lightning.perturbed.state import State

BATCH = 128
ESTIMATORS: dict[str, GradientEstimator] = {
    "one direction": ZerothOrder(Sphere(), seed=0),
    "directions per example": PerExample(feedback=0, correction=1.0, seed=0, space="weights"),
    "activations": PerExample(feedback=0, correction=1.0, seed=0, space="activations"),
    "per layer the better of both": PerExample(feedback=0, correction=1.0, seed=0),
    "the same with feedback": PerExample(seed=0),
}


def gradients(
    estimator: GradientEstimator, loss: Callable[[], Tensor], net: nn.Module, step: int, state: State
) -> dict[str, Tensor]:
    """The estimate of every weight's gradient."""
    net.zero_grad()
    estimator.backward(loss, net, step, state)
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        yield images[chosen].float().div(255), labels[chosen]


class Estimated(NamedTuple):
    """The mean of cos² between an estimate and the gradient of the same batch, and what one estimate costs."""

    squared_cosine: float
    flops: float
    milliseconds: float


def squared_cosines(net: nn.Module, stream: Iterator[tuple[Tensor, Tensor]], draws: int) -> dict[str, Estimated]:
    """How good each estimator is, and at what cost; the first is the gradient itself."""
    every: dict[str, GradientEstimator] = {"backpropagation": Backprop(), **ESTIMATORS}
    found: dict[str, list[float]] = {name: [] for name in every}
    times: dict[str, list[float]] = {name: [] for name in every}
    flops: dict[str, float] = {}
    states = {name: estimator.init(net) for name, estimator in every.items()}
    x, y = next(stream)

    def loss() -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    for step in range(draws):
        exact = None
        for name, estimator in every.items():
            net.zero_grad()
            began = time.perf_counter()
            estimator.backward(loss, net, step, states[name])
            times[name].append(time.perf_counter() - began)
            estimate = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
            exact = exact or estimate
            found[name].append(cosine(estimate, exact)["all"] ** 2)
        x, y = next(stream)
    for name, estimator in every.items():
        flops[name] = count_flops(partial(estimator.backward, loss, net, draws, states[name]))
    # Feedback needs some steps to have something to say: of all, the second half counts.
    return {
        name: Estimated(mean(values[draws // 2 :]), flops[name], median(times[name]) * 1e3)
        for name, values in found.items()
    }


def train(net: nn.Module, stream: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    """Take some steps of Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for (x, y), _ in zip(stream, range(steps), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def batch_norm_bias(x: Tensor, y: Tensor, draws: int) -> dict[str, float]:
    """The cosine between the gradient and what estimates with λ = 1 are in the mean, for convolutions of such a net.

    With the means ``a`` and ``b`` of two halves of the draws, whose noise is independent, it is
    ``<(a + b)/2, g> / (‖g‖ √<a, b>)``.
    """
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(c, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()) for c in (1, 8, 8)]
    net = nn.Sequential(*(layer for block in blocks for layer in block), nn.Flatten(), nn.Linear(32, 10)).double()

    def loss() -> Tensor:
        return F.cross_entropy(net(x.double()), y, reduction="none")

    exact = gradients(Backprop(), loss, net, 0, State())
    estimator = PerExample(feedback=0, correction=1.0, seed=0, space="activations")
    state, halves = estimator.init(net), []
    for half in range(2):
        total = {name: torch.zeros_like(g) for name, g in exact.items()}
        for step in range(draws):
            for name, g in gradients(estimator, loss, net, half * draws + step, state).items():
                total[name] += g / draws
        halves.append(total)
    names = [name for name, p in net.named_parameters() if p.ndim == 4]
    dots = {name: float((halves[0][name] * halves[1][name]).sum()) for name in names}
    along = {name: float(((halves[0][name] + halves[1][name]) / 2 * exact[name]).sum()) for name in names}
    return {name: along[name] / float(exact[name].norm()) / max(dots[name], 1e-30) ** 0.5 for name in names}


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="of MNIST")
    parser.add_argument("--scales", nargs="+", type=float, default=[1 / 9, 12.33], help="of ScalableCNN")
    parser.add_argument("--draws", type=int, default=100, help="estimates of each kind")
    parser.add_argument("--steps", type=int, default=300, help="of backpropagation")
    options = parser.parse_args()
    data = MNIST(root=options.root, val_size=0, seed=0, download=False)
    images, labels = data.load(train=True)
    for scale in options.scales:
        torch.manual_seed(0)
        net, stream = ScalableCNN(scale), batches(images, labels)
        for steps in (0, options.steps):
            train(net, stream, steps)
            found = squared_cosines(net, stream, options.draws)
            print(f"\nd = {sum(p.numel() for p in net.parameters()):,}, after {steps} steps of backpropagation")
            passes = count_flops(lambda net=net: net(images[:BATCH].float()))
            for name, (value, flops, milliseconds) in found.items():
                print(
                    f"  {name:<32}cos² {value:9.6f}{value / found['one direction'].squared_cosine:11.1f} times"
                    f"{flops / passes:8.2f} passes{milliseconds:9.2f} ms",
                    flush=True,
                )
    print("\nBatch normalisation: cosine of the mean estimate, by convolution")
    for name, value in batch_norm_bias(*next(batches(images, labels)), 20 * options.draws).items():
        print(f"  {name:<30} {value:.3f}")


if __name__ == "__main__":
    sys.exit(main())
