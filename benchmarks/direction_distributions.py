"""Does the distribution of the directions matter? Accuracy on held-out images after equal budgets, ZO-AdaMM.

    python benchmarks/direction_distributions.py --root data [--tasks digits] [--only Sphere Rademacher]

Everything but the distribution is equal: initial weights, batches, learning rate (chosen for the sphere), schedule.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from zo_lightning import AdaMM, Directions, Gaussian, Rademacher, ScalableCNN, SmallCNN, Sphere, ZerothOrder
from zo_lightning.data import MNIST, Digits

BATCH = 128
DISTRIBUTIONS: dict[str, Directions] = {"Sphere": Sphere(), "Gaussian": Gaussian(), "Rademacher": Rademacher()}


class Task(NamedTuple):
    """A net and the setting that it is trained with, as in the default and in `study/width`."""

    net: Callable[[], nn.Module]
    samples: int
    lr: float
    betas: tuple[float, float]
    held_out: int


TASKS = {
    "digits": Task(SmallCNN, 4, 1e-2, (0.9, 0.99), 200),
    "mnist-1.4k": Task(partial(ScalableCNN, 1 / 9), 1, 4e-3, (0.9, 0.99), 5000),
    "mnist-169k": Task(partial(ScalableCNN, 12.3333), 1, 1e-3, (0.9, 0.999), 5000),
}


def train(task: Task, directions: Directions, seed: int, steps: int, images: Tensor, labels: Tensor) -> float:
    """The accuracy on the held-out images."""
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    held_out, rest = order[: task.held_out], order[task.held_out :]
    net = task.net()
    optimizer = AdaMM(net.parameters(), lr=task.lr, betas=task.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    estimator = ZerothOrder(directions, samples=task.samples, seed=seed)
    state = estimator.init(net)
    for step in range(steps):
        chosen = rest[torch.randint(len(rest), (BATCH,))]
        x, y = as_float(images[chosen]), labels[chosen]
        estimator.backward(lambda x=x, y=y: F.cross_entropy(net(x), y), net, step, state)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        return (net(as_float(images[held_out])).argmax(1) == labels[held_out]).float().mean().item()


def as_float(images: Tensor) -> Tensor:
    """Images in [0, 1]."""
    return images.float().div(255) if images.dtype == torch.uint8 else images


def main() -> None:
    """Print a table in Markdown, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=list(DISTRIBUTIONS), default=list(DISTRIBUTIONS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--root", type=Path, default=Path("data"), help="of MNIST")
    options = parser.parse_args()
    print(f"| task | directions | {' | '.join(map(str, options.seeds))} | mean |")
    print("|---|---|" + "---|" * len(options.seeds) + "---|")
    for name in tqdm(options.tasks, disable=not sys.stderr.isatty()):
        data = Digits() if name == "digits" else MNIST(root=str(options.root), download=False)
        images, labels = data.load(train=True)
        for kind in options.only:
            found = [train(TASKS[name], DISTRIBUTIONS[kind], s, options.steps, images, labels) for s in options.seeds]
            spread = f" ± {stdev(found):.3f}" if len(found) > 1 else ""
            row = " | ".join(f"{one:.3f}" for one in found)
            print(f"| {name} | {kind} | {row} | {mean(found):.3f}{spread} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
