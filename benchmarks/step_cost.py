"""What a training step costs beside its forward passes: all of ``Trainer.fit``, as a ratio from one run.

The denominator is the same batch through the same net under ``no_grad``, loss included, as many times as the estimator
asks. The two are timed in turns within one process, so that the machine's moods meet both; medians are compared.

    python benchmarks/step_cost.py [--steps 300] [--threads 2] [--scales 0.1112 12.34 119.9]
"""

import argparse
import csv
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch.nn import functional as F

from zo_lightning import Backprop, Classifier, GradientEstimator, Rademacher, ScalableCNN, ZerothOrder
from zo_lightning.data.batches import TensorBatches

BATCH = 128
METHODS: dict[str, tuple[GradientEstimator, int]] = {
    "sphere, central, 1 direction": (ZerothOrder(seed=0), 2),
    "Rademacher, central, 1 direction": (ZerothOrder(Rademacher(), seed=0), 2),
    "sphere, central, 8 directions": (ZerothOrder(samples=8, seed=0), 16),
    "backpropagation": (Backprop(), 1),
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


def measure(estimator: GradientEstimator, forwards: int, scale: float, steps: int) -> tuple[float, float]:
    """The median milliseconds of one whole step, and of its bare forward passes."""
    torch.manual_seed(0)
    images, labels = torch.rand(steps * BATCH // 4, 1, 28, 28), torch.randint(10, (steps * BATCH // 4,))
    watch = Stopwatch(forwards)
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
        trainer.fit(Classifier(ScalableCNN(scale), estimator), TensorBatches(images, labels, BATCH))
    return median(watch.steps[watch.warmup :]) * 1e3, median(watch.bare[2:]) * 1e3


def main() -> None:
    """Print a table, and the same as CSV on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    print(f"{'d':>9}  {'method':<34}{'step':>9}{'bare forward passes':>28}{'ratio':>8}")
    for scale in options.scales:
        d = sum(p.numel() for p in ScalableCNN(scale).parameters())
        for name in options.methods:
            estimator, forwards = METHODS[name]
            step, bare = measure(estimator, forwards, scale, options.steps)
            rows.append((d, name, round(step, 3), forwards, round(bare, 3), round(step / bare, 3)))
            print(f"{d:>9}  {name:<34}{step:>6.2f} ms{forwards:>15} in {bare:>6.2f} ms{step / bare:>8.2f}", flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("d", "method", "step_ms", "forward_passes", "bare_ms", "ratio"))
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
