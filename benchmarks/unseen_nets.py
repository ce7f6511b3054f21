"""Nets that the forward-only estimator was not made for, at five times the forward passes of backpropagation.

A ResNet of torchvision (batch normalisation, strides, residuals) and a transformer encoder of PyTorch with two layers,
unchanged, on scikit-learn's digits. Backpropagation trains for a number of steps, counted as three forward passes each;
forward only training then has five times as many passes, two a step. Test accuracy after training, and what training
has really cost: floating-point operations and seconds, the mean over the seeds.

    python benchmarks/unseen_nets.py [--nets transformer resnet] [--seeds 42 43 44] [--csv FILE]
"""

import argparse
import csv
import logging
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from pytorch_lightning import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from zo_lightning import Backprop, Classifier, GradientEstimator, PerExample
from zo_lightning.data import Digits


class SmallResNet(nn.Module):
    """ResNet-10 for grey images of 14 x 14 pixels, 4.9 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(F.avg_pool2d(images, 2).expand(-1, 3, -1, -1))


class Transformer(nn.Module):
    """Two encoder layers over the four quarters of an image, 24,000 parameters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(14**2, width)
        self.position = nn.Parameter(torch.randn(4, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        quarters = F.unfold(images, 14, stride=14).mT
        return self.head(self.norm(self.encoder(self.embed(quarters) + self.position)).mean(1))


class Outcome(NamedTuple):
    """What a training has brought and cost."""

    accuracy: float
    flops: float
    seconds: float


class Task(NamedTuple):
    """A net, the steps and learning rate of backpropagation, and the estimator and learning rate without it."""

    net: Callable[[], nn.Module]
    steps: int
    fo_lr: float
    estimator: GradientEstimator
    zo_lr: float


# What attention does varies from example to example, so feedback predicts less and slopes are trusted more.
TASKS = {
    "transformer": Task(Transformer, 1000, 3e-3, PerExample(correction=0.1), 1e-3),
    "resnet": Task(SmallResNet, 60, 1e-3, PerExample(), 1e-3),
}


def train(net: Callable[[], nn.Module], estimator: GradientEstimator, lr: float, steps: int, seed: int) -> Outcome:
    """Some steps of Adam with a cosine schedule."""
    seed_everything(seed, verbose=False)
    model = Classifier(
        net(),
        estimator,
        partial(torch.optim.Adam, lr=lr, betas=(0.9, 0.99)),
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        lr_interval="step",
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    data = Digits(val_size=0, seed=seed)
    began = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - began
    return Outcome(trainer.test(model, data, verbose=False)[0]["test/acc"], model.flops, seconds)


def main() -> None:
    """Print a table, and the same as CSV on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    rows = []
    for name in options.nets:
        task = TASKS[name]
        for method, estimator, lr, passes in (
            ("backpropagation", Backprop(), task.fo_lr, 3 * task.steps),
            ("forward only", task.estimator, task.zo_lr, 15 * task.steps),
        ):
            steps = passes // (3 if isinstance(estimator, Backprop) else 2)
            outcomes = [train(task.net, estimator, lr, steps, seed) for seed in options.seeds]
            accuracies = [one.accuracy for one in outcomes]
            operations, seconds = mean(one.flops for one in outcomes), mean(one.seconds for one in outcomes)
            cost = passes, f"{operations:.4g}", round(seconds, 1)
            rows.append((name, method, *cost, *(round(a, 4) for a in accuracies), round(mean(accuracies), 4)))
            each = " ".join(f"{a:.3f}" for a in accuracies)
            print(
                f"{name:<12} {method:<16} {passes:>6} forward passes, {operations / 1e12:.3f} TFLOP, {seconds:.0f} s: "
                f"{each}, mean {mean(accuracies):.3f}",
                flush=True,
            )
    if options.csv:
        header = ("net", "method", "forward_passes", "flops", "seconds", *(f"seed_{s}" for s in options.seeds), "mean")
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    sys.exit(main())
