"""Test accuracy of every estimator at equal numbers of forward passes of 128 images.

    python benchmarks/query_efficiency.py --root ../shared/data --budgets 1000 9380 --nets digits mnist-1k
    python benchmarks/query_efficiency.py --figure docs/query_efficiency.png

Each accuracy is a row of the table file and is appended as soon as it is known; what is there already is not trained
again, so a run that was stopped is continued by the same command. A backward pass counts two forward passes. The
learning rates were chosen on held-out images at one budget each and decay to 0 at every budget. The net on the digits
is one that no method was tuned on.
"""

import argparse
import csv
import itertools
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from pytorch_lightning import LightningDataModule, Trainer, seed_everything
from tqdm import tqdm

from zo_lightning import (
    ActivationPerturbation,
    AdaMM,
    Backprop,
    Classifier,
    ExampleDirections,
    ForwardDifference,
    ForwardGradient,
    GradientEstimator,
    NormalizedSGD,
    PerExample,
    Rademacher,
    ScalableCNN,
    SmallCNN,
    ZerothOrder,
)
from zo_lightning.data import MNIST, Digits


class Method(NamedTuple):
    """An estimator with the optimizer that suits it."""

    estimator: GradientEstimator
    optimizer: Callable[..., torch.optim.Optimizer]
    passes: float  # of a batch, each step
    batch_size: int = 128


_ADAM = partial(torch.optim.Adam, betas=(0.9, 0.99))
METHODS = {
    "backpropagation": Method(Backprop(), partial(_ADAM, lr=3e-3), 3),
    "one direction (ZO-AdaMM)": Method(ZerothOrder(), partial(AdaMM, lr=4e-3, betas=(0.9, 0.99)), 2),
    "forward gradient": Method(ForwardGradient(), partial(AdaMM, lr=4e-3, betas=(0.9, 0.99)), 2),
    "8 directions, batches of 32": Method(
        ZerothOrder(Rademacher(), ForwardDifference(1e-3), samples=8),
        partial(NormalizedSGD, lr=6e-3, betas=(0.9, 0.99), weight_decay=0.03),
        9,
        32,
    ),
    "ExampleDirections without feedback": Method(
        ExampleDirections(feedback=0, correction=1.0), partial(_ADAM, lr=3e-3), 2
    ),
    "ActivationPerturbation without feedback": Method(
        ActivationPerturbation(feedback=0, correction=1.0), partial(_ADAM, lr=3e-3), 2
    ),
    "PerExample without feedback": Method(PerExample(feedback=0, correction=1.0), partial(_ADAM, lr=3e-3), 2),
    "PerExample": Method(PerExample(), partial(_ADAM, lr=5e-3), 2),
}
NETS: dict[str, Callable[[], torch.nn.Module]] = {
    "digits": SmallCNN,
    "mnist-1k": lambda: ScalableCNN(1 / 9),
    "mnist-169k": lambda: ScalableCNN(12.33),
    "mnist-2.8M": lambda: ScalableCNN(119.88888888888889),
}
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito's
COLUMNS = ("net", "method", "budget", "seed", "accuracy")
Key = tuple[str, str, int, int]


def accuracy(net: str, method: Method, budget: int, seed: int, root: Path) -> float:
    """Train for ``budget`` forward passes of 128 images, and test."""
    seed_everything(seed, verbose=False)
    steps = max(1, int(budget * 128 / (method.passes * method.batch_size)))
    model = Classifier(
        NETS[net](),
        method.estimator,
        method.optimizer,
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        lr_interval="step",
    )
    data: LightningDataModule = (
        Digits(method.batch_size, 0, seed)
        if net == "digits"
        else MNIST(method.batch_size, 0, seed, str(root), download=False)
    )
    quiet: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "model_summary", "progress_bar")}
    trainer = Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, limit_val_batches=0, **quiet)
    trainer.fit(model, data)
    return trainer.test(model, data, verbose=False)[0]["test/acc"]


def read(path: Path) -> dict[Key, float]:
    """The accuracies that are known."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (row["net"], row["method"], int(row["budget"]), int(row["seed"])): float(row["accuracy"])
            for row in csv.DictReader(file)
        }


def append(path: Path, key: Key, value: float) -> None:
    """Add an accuracy to the table."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow((*key, f"{value:.4f}"))


def grouped(known: dict[Key, float]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """The accuracies of all seeds by net, method and budget."""
    groups: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for (net, method, budget, _), value in sorted(known.items(), key=lambda item: (list(NETS).index(item[0][0]), item)):
        groups[net][method].setdefault(budget, []).append(value)
    return groups


def show(known: dict[Key, float]) -> None:
    """Print mean and standard deviation over the seeds, as a table in Markdown."""
    for net, by_method in grouped(known).items():
        budgets = sorted({budget for by_budget in by_method.values() for budget in by_budget})
        print(
            f"\n| {net} | " + " | ".join(f"{budget:,}" for budget in budgets) + " |\n|---" + "|---" * len(budgets) + "|"
        )
        for method in METHODS:
            cells = [by_method.get(method, {}).get(budget, []) for budget in budgets]
            print(f"| {method} | " + " | ".join(map(_cell, cells)) + " |")


def _cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.3f} ({len(values)})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}" if values else "–"


def draw(known: dict[Key, float], output: Path) -> None:
    """Draw accuracy against forward passes, one panel per net, from the lowest seed to the highest.

    Methods stand beside each other at the same budget, or their bars would hide each other.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(known)
    figure, panels = plt.subplots(
        1, len(groups), figsize=(4.6 * len(groups) + 2.6, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (net, by_method) in zip(panels[0], groups.items(), strict=True):
        for index, (name, colour, marker) in enumerate(zip(METHODS, COLOURS, "osv^DPX*", strict=True)):
            by_budget = by_method.get(name, {})
            if not by_budget:
                continue
            beside = 1.07 ** (index - len(METHODS) / 2)
            budgets = [budget * beside for budget in by_budget]
            middle = [mean(values) for values in by_budget.values()]
            low, high = ([f(values) for values in by_budget.values()] for f in (min, max))
            errors = [
                [m - a for m, a in zip(middle, low, strict=True)],
                [b - m for m, b in zip(middle, high, strict=True)],
            ]
            axes.errorbar(budgets, middle, errors, color=colour, marker=marker, capsize=3, label=name)
        ticks = sorted({budget for by_budget in by_method.values() for budget in by_budget})
        axes.set(xscale="log", xlabel="forward passes of 128 images", title=net)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("test accuracy")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def main() -> None:
    """Read the command line, train what is missing, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", choices=list(NETS), default=[], help="what to train on (default: nothing)")
    parser.add_argument("--budgets", nargs="+", type=int, default=[1000, 9380, 46900], help="in forward passes of 128")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--root", type=Path, default=Path("data"), help="of MNIST")
    parser.add_argument("--table", type=Path, default=Path("docs/query_efficiency.csv"))
    parser.add_argument("--figure", type=Path, help="draw the table into this file")
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("zo_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    known = read(options.table)
    wanted = itertools.product(sorted(options.budgets), options.seeds, options.nets, options.methods)
    missing = [(net, method, budget, seed) for budget, seed, net, method in wanted]
    missing = [key for key in missing if key not in known]
    for net, method, budget, seed in (bar := tqdm(missing, disable=not missing)):
        bar.set_description(f"{net}, {method}, {budget}")
        known[net, method, budget, seed] = accuracy(net, METHODS[method], budget, seed, options.root)
        append(options.table, (net, method, budget, seed), known[net, method, budget, seed])
    show(known)
    if options.figure:
        draw(known, options.figure)


if __name__ == "__main__":
    sys.exit(main())
