"""What a training step costs over two bare forward passes, beside its peers: in a plain loop, and in ``Trainer.fit``.

    python -m benchmarks.step_cost [--seconds 20] [--threads 2] [--clock wall] [--modes plain fit] [--json FILE]

The denominator is the same batch twice through the same net under ``no_grad``, loss included. In the plain loop all
methods take turns, so that the machine's moods meet all of them. A turn is ten steps, as training takes them, of which
the first, that finds the processor's memory full of others' numbers, does not count: the medians and quartiles are of
the ratios of turns. In ``Trainer.fit`` short trainings take turns. The peers: backpropagation with ``torch.optim``;
MeZO, written from its paper (Malladi et al., *Fine-tuning language models with just forward passes*, 2023, algorithm
1); and torchzero's finite differences, where torchzero is installed (``pip install -e .[bench]``). Beside the times
stand a step's floating-point operations, in forward passes of the batch.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
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
from zo_lightning.modules.classifier import AutomaticClassifier

SCALES = 1 / 9, 12.3333, 120 - 1 / 9
PACKAGES = "torch", "numpy", "pytorch-lightning", "torchzero"
LR, MU, TURN = 1e-4, 1e-3, 10
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
clock = CLOCKS["wall"]
Step = Callable[[int], object]
Task = tuple[nn.Module, Tensor, Tensor]


def task(scale: float, batch: int, device: str = "cpu") -> Task:
    """A net and a batch, always the same."""
    torch.manual_seed(0)
    net, images, labels = ScalableCNN(scale), torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
    return net.to(device), images.to(device), labels.to(device)


def bare(task: Task, passes: int = 2) -> Step:
    """The forward passes alone."""
    net, images, labels = task

    @torch.no_grad()
    def step(_: int) -> None:
        for _ in range(passes):
            F.cross_entropy(net(images), labels).item()

    return step


def backpropagation(task: Task) -> Step:
    """PyTorch's own way."""
    net, images, labels = task
    optimizer = torch.optim.Adam(net.parameters(), LR)

    def step(_: int) -> None:
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def mezo(task: Task) -> Step:
    """MeZO: weights are moved in place by normal numbers that are drawn four times from one seed."""
    net, images, labels = task
    weights = list(net.parameters())

    def move(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for w in weights:
            w.add_(torch.randn_like(w), alpha=scale)

    @torch.no_grad()
    def step(seed: int) -> None:
        move(seed, MU)
        above = F.cross_entropy(net(images), labels).item()
        move(seed, -2 * MU)
        below = F.cross_entropy(net(images), labels).item()
        move(seed, MU)
        move(seed, -LR * (above - below) / (2 * MU))

    return step


def torchzero(approximator: str, task: Task) -> Step:
    """An approximator of torchzero with its default signs, and gradient descent; no pass for the loss alone."""
    tz: Any = import_module("torchzero")  # of the extra "bench", which checks of types do without

    net, images, labels = task
    optimizer = tz.Optimizer(net.parameters(), getattr(tz.m, approximator)(h=MU, return_approx_loss=True), tz.m.LR(LR))

    def closure(backward: bool = True) -> Tensor:
        assert not backward  # it is asked for values alone
        return F.cross_entropy(net(images), labels)

    return lambda _: optimizer.step(closure)


def ours(estimator: GradientEstimator, optimizer: Callable[..., torch.optim.Optimizer], task: Task) -> Step:
    """An estimator in the place of ``loss.backward()``."""
    net, images, labels = task
    stepped, state = optimizer(net.parameters()), estimator.init(net)
    reduction = "none" if estimator.needs_example_losses else "mean"

    def step(index: int) -> None:
        estimator.backward(lambda: F.cross_entropy(net(images), labels, reduction=reduction), net, index, state)
        stepped.step()
        stepped.zero_grad()

    return step


def lean(estimator: GradientEstimator, optimizer: Callable[..., torch.optim.Optimizer], task: Task) -> Step:
    """Estimate and step in one, in the memory of inference."""
    net, images, labels = task
    stepped, state = optimizer(net.parameters()), estimator.init(net)
    return lambda index: estimator.update(stepped, lambda: F.cross_entropy(net(images), labels), net, index, state)


SGD, ADAM, ADAMM = (partial(one, lr=LR) for one in (torch.optim.SGD, torch.optim.Adam, AdaMM))
SIGNS, SPHERE = ZerothOrder(Rademacher(), seed=0), ZerothOrder(Sphere(), seed=0)
PLAIN: dict[str, Callable[[Task], Step]] = {
    "backpropagation, Adam": backpropagation,
    "MeZO, plain loop": mezo,
    "torchzero RandomizedFDM": partial(torchzero, "RandomizedFDM"),
    "torchzero MeZO": partial(torchzero, "MeZO"),
    "signs, SGD": partial(ours, SIGNS, SGD),
    "signs, SGD, lean": partial(lean, SIGNS, SGD),
    "sphere, AdaMM": partial(ours, SPHERE, ADAMM),
    "signs, SGD, 8 directions, each": partial(ours, ZerothOrder(Rademacher(), samples=8, seed=0), SGD),
    "PerExample, Adam": partial(ours, PerExample(seed=0), ADAM),
}
DIRECTIONS = {"signs, SGD, 8 directions, each": 8}
FIT: dict[str, Callable[[nn.Module], LightningModule]] = {
    "automatic optimization, Adam": lambda net: AutomaticClassifier(net, ADAM),
    "Backprop, Adam": lambda net: Classifier(net, Backprop(), ADAM),
    "signs, SGD": lambda net: Classifier(net, SIGNS, SGD),
    "signs, SGD, lean": lambda net: Classifier(net, SIGNS, SGD, memory="lean"),
    "sphere, AdaMM": lambda net: Classifier(net, SPHERE, ADAMM),
    "PerExample, Adam": lambda net: Classifier(net, PerExample(seed=0), ADAM),
}


class Stopwatch(Callback):
    """Times each whole step, from one batch's end to the next, and two bare forward passes now and then."""

    def __init__(self, every: int = 3) -> None:
        self.every = every
        self.steps: list[float] = []
        self.bare: list[float] = []
        self.last: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        if self.last is not None:
            self.steps.append(clock() - self.last)
        if batch_idx % self.every == 0:
            self.bare.append(seconds(bare((pl_module.net, *batch)), 0))
        self.last = clock()


def seconds(step: Step, index: int) -> float:
    """How long one step takes, until a GPU has done it."""
    began = clock()
    step(index)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - began


def turn(step: Step, first: int) -> float:
    """The seconds of a step, from some in a row."""
    step(first)
    return median(seconds(step, first + index) for index in range(1, TURN))


def in_a_plain_loop(scale: float, batch: int, limit: float) -> dict[str, dict[str, Any]]:
    """All methods in turns: milliseconds of a step, and ratios over two bare passes of the same turn."""
    steps: dict[str, Step] = {}
    for name, make in PLAIN.items():
        try:
            steps[name] = make(task(scale, batch))
        except ImportError as error:
            print(f"{'':>9}  {name:<32}left out: {error}", flush=True)
    both, one = bare(task(scale, batch)), bare(task(scale, batch), passes=1)
    flops = {name: operations(step) / operations(one) / DIRECTIONS.get(name, 1) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    passes: list[float] = []
    began = time.perf_counter()
    while len(passes) < 5 or (time.perf_counter() - began < limit and len(passes) < 1000):
        first = TURN * (1 + len(passes))
        passes.append(turn(both, first))
        for name, step in steps.items():
            times[name].append(turn(step, first) / DIRECTIONS.get(name, 1))
    return {
        name: {"ms": median(times[name]) * 1e3, "flops_in_passes": flops[name], **spread(times[name], passes)}
        for name in steps
    }


def in_fit(scale: float, batch: int, limit: float, steps: int = 18, warmup: int = 6) -> dict[str, dict[str, Any]]:
    """Short trainings in turns: milliseconds of a whole step, ratios over two bare passes of the same training."""
    images, labels = task(scale, steps * batch)[1:]
    times: dict[str, list[float]] = {name: [] for name in FIT}
    passes: dict[str, list[float]] = {name: [] for name in FIT}
    began = time.perf_counter()
    while len(times["signs, SGD"]) < 3 or time.perf_counter() - began < limit:
        for name, make in FIT.items():
            watch = Stopwatch()
            with tempfile.TemporaryDirectory() as folder:
                trainer = Trainer(
                    accelerator="cpu",
                    max_steps=steps,
                    max_epochs=-1,
                    logger=False,
                    default_root_dir=folder,
                    callbacks=[watch],
                    enable_checkpointing=False,
                    enable_model_summary=False,
                    enable_progress_bar=False,
                )
                trainer.fit(make(task(scale, 1)[0]), TensorBatches(images, labels, batch))
            times[name].append(median(watch.steps[warmup:]))
            passes[name].append(median(watch.bare[1:]))
    automatic = times["automatic optimization, Adam"]
    return {
        name: {
            "ms": median(times[name]) * 1e3,
            **spread(times[name], passes[name]),
            "over_automatic": median(a / b for a, b in zip(times[name], automatic, strict=True)),
        }
        for name in FIT
    }


def spread(times: Iterable[float], passes: Iterable[float]) -> dict[str, float]:
    """The median of the ratios of pairs, and their quartiles."""
    ratios = [a / b for a, b in zip(times, passes, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {"ratio": median(ratios), "low": low, "high": high}


def operations(step: Step) -> float:
    """The floating-point operations of one step, once it has settled."""
    return [count_flops(lambda index=index: step(index)) for index in range(4)][-1]


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    git = partial(subprocess.run, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    found: dict[str, str] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {
        "commit": git(["git", "describe", "--always", "--dirty", "--abbrev=12"]).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor()),
        "cores": os.cpu_count(),
        "load": [round(one, 1) for one in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "versions": found,
    }


def main() -> None:
    """Print a table for each size, and write all as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="(default: both)")
    parser.add_argument("--seconds", type=float, default=20, help="for each size and mode (default: 20)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="processor: others disturb it less")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of ScalableCNN")
    parser.add_argument("--batch", type=int, default=128, help="images (default: 128)")
    parser.add_argument("--json", type=Path, help="also write the figures, and what they belong to, to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    global clock
    clock = CLOCKS[options.clock]
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    about, rows = {**machine(), "clock": options.clock, "batch": options.batch}, []
    for mode in options.modes:
        last = "over automatic" if mode == "fit" else "FLOPs in passes"
        print(f"\n{'d':>9}  {mode:<32}{'step':>11}  over 2 passes, quartiles{last:>17}")
        for scale in options.scales:
            d = sum(p.numel() for p in ScalableCNN(scale).parameters())
            for name, row in MODES[mode](scale, options.batch, options.seconds).items():
                rows.append({"mode": mode, "d": d, "method": name, **{k: round(v, 4) for k, v in row.items()}})
                beside = row["over_automatic" if mode == "fit" else "flops_in_passes"]
                quartiles = f"[{row['low']:.2f}, {row['high']:.2f}]"
                print(
                    f"{d:>9,}  {name:<32}{row['ms']:>8.2f} ms{row['ratio']:>9.2f}  {quartiles:<14}{beside:>17.2f}",
                    flush=True,
                )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


MODES = {"plain": in_a_plain_loop, "fit": in_fit}

if __name__ == "__main__":
    sys.exit(main())
