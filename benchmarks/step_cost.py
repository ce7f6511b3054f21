"""What a training step costs beside its forward passes, as ratios from one run: in a plain loop, in ``Trainer.fit``.

A plain step is ``estimator.backward``, ``optimizer.step`` and ``zero_grad``. The denominator is the same batch through
the same net under ``no_grad``, loss included, as many times as the estimator asks; for ``PerExample`` in the plain loop
it is a plain step of backpropagation. The two are timed in turns within one process, so that the machine's moods meet
both; medians are compared. Beside them stand the step's floating-point operations, in forward passes of the batch.

    python benchmarks/step_cost.py [--modes plain fit] [--steps 300] [--threads 2] [--scales 0.1112 12.34 119.9]
"""

import argparse
import csv
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch.nn import functional as F

from zo_lightning import (
    AdaMM,
    Backprop,
    Classifier,
    GradientEstimator,
    PerExample,
    Rademacher,
    ScalableCNN,
    Sphere,
    ZerothOrder,
)
from zo_lightning.costs import count_flops
from zo_lightning.data.batches import TensorBatches

BATCH = 128


class Method(NamedTuple):
    """An estimator, the forward passes it asks for, and the optimizer that steps in the plain loop."""

    estimator: GradientEstimator
    forwards: int
    optimizer: Callable[..., torch.optim.Optimizer] = AdaMM
    beside_backpropagation: bool = False


METHODS = {
    "sphere, central, 1 direction": Method(ZerothOrder(Sphere(), seed=0), 2),
    "Rademacher, central, 1 direction": Method(ZerothOrder(Rademacher(), seed=0), 2),
    "Rademacher, central, SGD": Method(ZerothOrder(Rademacher(), seed=0), 2, partial(torch.optim.SGD, lr=1e-4)),
    "sphere, central, 8 directions": Method(ZerothOrder(Sphere(), samples=8, seed=0), 16),
    "backpropagation": Method(Backprop(), 1, torch.optim.Adam),
    "PerExample": Method(PerExample(seed=0), 2, torch.optim.Adam, beside_backpropagation=True),
}


class Stopwatch(Callback):
    """Times each whole step, from one batch's end to the next, and a block of bare forward passes in between."""

    def __init__(self, forwards: int, warmup: int = 20) -> None:
        self.forwards, self.warmup = forwards, warmup
        self.steps: list[float] = []
        self.bare: list[float] = []
        self.last: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int
    ) -> None:
        if self.last is not None:
            self.steps.append(time.perf_counter() - self.last)
        if batch_idx % 10 == 0:
            self.bare.append(self.forward_passes(pl_module, batch))
        self.last = time.perf_counter()

    @torch.no_grad()
    def forward_passes(self, module: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        images, labels = batch
        start = time.perf_counter()
        for _ in range(self.forwards):
            F.cross_entropy(module.net(images), labels).item()
        return time.perf_counter() - start


def in_fit(method: Method, scale: float, steps: int) -> tuple[float, float]:
    """The median milliseconds of one whole step of ``Trainer.fit``, and of its bare forward passes."""
    torch.manual_seed(0)
    images, labels = torch.rand(steps * BATCH // 4, 1, 28, 28), torch.randint(10, (steps * BATCH // 4,))
    watch = Stopwatch(method.forwards)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=TensorBoardLogger(folder),
            callbacks=[watch, TQDMProgressBar(refresh_rate=20)],
            log_every_n_steps=50,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(ScalableCNN(scale), method.estimator), TensorBatches(images, labels, BATCH))
    return median(watch.steps[watch.warmup :]) * 1e3, median(watch.bare[2:]) * 1e3


def in_a_plain_loop(method: Method, scale: float, steps: int, warmup: int = 20) -> tuple[float, float]:
    """The median milliseconds of one step, and of its forward passes or of backpropagation's step."""
    step = plain_step(method, scale)
    beside = plain_step(METHODS["backpropagation"], scale) if method.beside_backpropagation else bare(method, scale)
    times: tuple[list[float], list[float]] = [], []
    for index in range(warmup + steps):
        for work, into in zip((step, beside), times, strict=True):
            began = time.perf_counter()
            work(index)
            into.append(time.perf_counter() - began)
    return median(times[0][warmup:]) * 1e3, median(times[1][warmup:]) * 1e3


def plain_step(method: Method, scale: float) -> Callable[[int], object]:
    """A training step as one would write it without Lightning."""
    net, images, labels = task(scale)
    optimizer, state = method.optimizer(net.parameters()), method.estimator.init(net)

    def step(index: int) -> None:
        method.estimator.backward(lambda: F.cross_entropy(net(images), labels, reduction="none"), net, index, state)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare(method: Method, scale: float) -> Callable[[int], object]:
    """The forward passes alone."""
    net, images, labels = task(scale)

    @torch.no_grad()
    def passes(_: int) -> None:
        for _ in range(method.forwards):
            F.cross_entropy(net(images), labels).item()

    return passes


def task(scale: float) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A net and a batch, always the same."""
    torch.manual_seed(0)
    return ScalableCNN(scale), torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))


def operations(work: Callable[[int], object]) -> float:
    """The floating-point operations of one step, once it has settled."""
    return [count_flops(lambda index=index: work(index)) for index in range(4)][-1]


def main() -> None:
    """Print a table, and the same as CSV on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="(default: both)")
    parser.add_argument("--steps", type=int, default=300, help="steps per measurement (default: 300)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1 / 9, 12.3333, 120 - 1 / 9], help="of ScalableCNN")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="what to measure")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    rows = []
    print(f"{'d':>9}  {'method':<34}{'mode':<7}{'step':>10}{'over':>26}{'ratio':>12}{'operations, in passes':>24}")
    for scale in options.scales:
        d = sum(p.numel() for p in ScalableCNN(scale).parameters())
        for name in options.methods:
            method = METHODS[name]
            passes = operations(plain_step(method, scale)) / operations(bare(Method(Backprop(), 1), scale))
            for mode in options.modes:
                over = (
                    "backpropagation's step"
                    if mode == "plain" and method.beside_backpropagation
                    else f"{method.forwards} forward passes"
                )
                step, other = MODES[mode](method, scale, options.steps)
                rows.append((d, name, mode, round(step, 3), over, round(other, 3), round(step / other, 3), passes))
                print(
                    f"{d:>9}  {name:<34}{mode:<7}{step:>7.2f} ms{over:>24}{other:>8.2f} ms{step / other:>6.2f}"
                    f"{passes:>14.2f}",
                    flush=True,
                )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("d", "method", "mode", "step_ms", "over", "over_ms", "ratio", "flops_in_forward_passes"))
            writer.writerows(rows)


MODES = {"plain": in_a_plain_loop, "fit": in_fit}

if __name__ == "__main__":
    sys.exit(main())
