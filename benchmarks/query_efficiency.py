"""Test accuracy of every estimator after equal numbers of forward passes, and what it has cost: operations, seconds.

    python benchmarks/query_efficiency.py --root data --budgets 1000 9380 --nets digits mnist-1k
    python benchmarks/query_efficiency.py --count --figure docs/query_efficiency.png

Each accuracy is a row of the table file and is appended as soon as it is known; what is there already is not trained
again, so a run that was stopped is continued by the same command. A budget is in forward passes of 128 images, of which
a backward pass counts two; what a step really costs is in the columns ``flops`` (floating-point operations of all
training steps) and ``seconds`` (of training; empty where they were not measured). The learning rates were chosen on
held-out images at one budget each and decay to 0 at every budget. The net on the digits is one that no method was tuned
on.
"""

import argparse
import csv
import itertools
import logging
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from pytorch_lightning import LightningDataModule, Trainer, seed_everything
from torch.nn import functional as F
from tqdm import tqdm

from zo_lightning import (
    AdaMM,
    Backprop,
    Classifier,
    ForwardDifference,
    ForwardGradient,
    GradientEstimator,
    NormalizedSGD,
    PerExample,
    Rademacher,
    ScalableCNN,
    SmallCNN,
    Sphere,
    ZerothOrder,
)
from zo_lightning.costs import count_flops
from zo_lightning.data import MNIST, Digits
from zo_lightning.palette import COLOURS, MARKERS


class Method(NamedTuple):
    """An estimator with the optimizer that suits it."""

    estimator: GradientEstimator
    optimizer: Callable[..., torch.optim.Optimizer]
    passes: float  # of a batch, each step
    batch_size: int = 128

    def steps(self, budget: int) -> int:
        """As many as a budget pays for."""
        return max(1, int(budget * 128 / (self.passes * self.batch_size)))


class Outcome(NamedTuple):
    """What a training has brought and cost; None: not measured."""

    accuracy: float
    flops: float | None
    seconds: float | None


_ADAM = partial(torch.optim.Adam, betas=(0.9, 0.99))
METHODS = {
    "backpropagation": Method(Backprop(), partial(_ADAM, lr=3e-3), 3),
    "one direction (ZO-AdaMM)": Method(ZerothOrder(Sphere()), partial(AdaMM, lr=4e-3, betas=(0.9, 0.99)), 2),
    "forward gradient": Method(ForwardGradient(), partial(AdaMM, lr=4e-3, betas=(0.9, 0.99)), 2),
    "8 directions, batches of 32": Method(
        ZerothOrder(Rademacher(), ForwardDifference(1e-3), samples=8),
        partial(NormalizedSGD, lr=6e-3, betas=(0.9, 0.99), weight_decay=0.03),
        9,
        32,
    ),
    "PerExample on weights without feedback": Method(
        PerExample(feedback=0, correction=1.0, space="weights"), partial(_ADAM, lr=3e-3), 2
    ),
    "PerExample on outputs without feedback": Method(
        PerExample(feedback=0, correction=1.0, space="activations"), partial(_ADAM, lr=3e-3), 2
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
COLUMNS = ("net", "method", "budget", "seed", "accuracy", "flops", "seconds")
Key = tuple[str, str, int, int]
Table = dict[Key, Outcome]


def outcome(net: str, method: Method, budget: int, seed: int, root: Path) -> Outcome:
    """Train for ``budget`` forward passes of 128 images, and test."""
    seed_everything(seed, verbose=False)
    steps = method.steps(budget)
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
    began = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - began
    return Outcome(trainer.test(model, data, verbose=False)[0]["test/acc"], model.flops, seconds)


def flops(net: str, method: Method, budget: int) -> float:
    """What ``outcome`` would count, without training: from one step of each kind, as often as it occurs."""
    module, estimator = NETS[net](), method.estimator
    examples, state = 1433 if net == "digits" else 60000, estimator.init(module)

    def step(size: int, index: int) -> float:
        images, labels = torch.rand(size, 1, 28, 28), torch.arange(size) % 10

        def loss() -> torch.Tensor:
            return F.cross_entropy(module(images), labels, reduction="none")

        return count_flops(lambda: estimator.backward(loss, module, index, state))

    first, *_, whole = [step(method.batch_size, index) for index in range(3)]  # the first can hold a look at the net
    in_epoch, rest = divmod(examples, method.batch_size)
    steps = method.steps(budget)
    smaller = steps // (in_epoch + 1) if rest else 0
    return first + (steps - 1 - smaller) * whole + (smaller * step(rest, 3) if smaller else 0)


def read(path: Path) -> Table:
    """What is known."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (row["net"], row["method"], int(row["budget"]), int(row["seed"])): Outcome(
                float(row["accuracy"]),
                *(float(row[column]) if row.get(column) else None for column in ("flops", "seconds")),
            )
            for row in csv.DictReader(file)
        }


def write(path: Path, table: Table) -> None:
    """Write a table, or append to one."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for key, (accuracy, operations, seconds) in table.items():
            cost = "" if operations is None else f"{operations:.0f}", "" if seconds is None else f"{seconds:.1f}"
            writer.writerow((*key, f"{accuracy:.4f}", *cost))


def count(path: Path, table: Table) -> None:
    """Fill in the operations of rows that lack them."""
    missing = sorted({key[:3] for key, row in table.items() if row.flops is None})
    found = {key: flops(key[0], METHODS[key[1]], key[2]) for key in tqdm(missing, disable=not missing)}
    table |= {key: row._replace(flops=found[key[:3]]) for key, row in table.items() if row.flops is None}
    path.unlink()
    write(path, table)


def grouped(known: Table) -> dict[str, dict[str, dict[int, list[Outcome]]]]:
    """The outcomes of all seeds by net, method and budget."""
    groups: dict[str, dict[str, dict[int, list[Outcome]]]] = defaultdict(lambda: defaultdict(dict))
    for (net, method, budget, _), row in sorted(known.items(), key=lambda item: (list(NETS).index(item[0][0]), item)):
        groups[net][method].setdefault(budget, []).append(row)
    return groups


def show(known: Table) -> None:
    """Print mean and standard deviation over the seeds, and the cost, as a table in Markdown for each net."""
    for net, by_method in grouped(known).items():
        budgets = sorted({budget for by_budget in by_method.values() for budget in by_budget})
        head = " | ".join(f"{budget:,}: accuracy | TFLOP | seconds" for budget in budgets)
        print(f"\n| {net} | {head} |\n|---" + "|---" * 3 * len(budgets) + "|")
        for method in METHODS:
            cells = [by_method.get(method, {}).get(budget, []) for budget in budgets]
            print(f"| {method} | " + " | ".join(map(_cells, cells)) + " |")


def _cells(rows: list[Outcome]) -> str:
    if not rows:
        return "– | – | –"
    accuracies = [row.accuracy for row in rows]
    spread = f" ± {stdev(accuracies):.3f} ({len(rows)})" if len(rows) > 1 else ""
    operations = [row.flops / 1e12 for row in rows if row.flops is not None]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    cost = f"{mean(operations):.3g}" if operations else "–", f"{mean(seconds):.0f}" if seconds else "–"
    return " | ".join((f"{mean(accuracies):.3f}{spread}", *cost))


def draw(known: Table, output: Path) -> None:
    """Draw the accuracies, one panel per net: against operations, or of one budget by method; bars: all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped({key: row for key, row in known.items() if row.flops})
    columns = min(2, len(groups))
    rows = -(-(len(groups) + 1) // columns)  # the last place is the legend's
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.7 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    panels = list(grid.ravel())
    styles = dict(zip(METHODS, zip(COLOURS, MARKERS, strict=True), strict=True))
    for axes, (net, by_method) in zip(panels, groups.items(), strict=False):
        budgets = sorted({budget for by_budget in by_method.values() for budget in by_budget})
        axes.set(title=f"{net}, after {' and '.join(f'{b:,}' for b in budgets)} passes of 128", ylim=(0, 1))
        axes.set_ylabel("test accuracy")
        axes.tick_params(labelleft=True)
        axes.grid(alpha=0.3)
        (_by_method if len(budgets) == 1 else _against_operations)(axes, by_method, styles)
    along = [axes for axes in panels[: len(groups)] if axes.get_xscale() == "log"]
    if along:
        ends = [axes.get_xlim() for axes in along]
        for axes in along:
            axes.set_xlim(min(low for low, _ in ends), max(high for _, high in ends))
    handles = [plt.Line2D([], [], color=colour, marker=marker, label=name) for name, (colour, marker) in styles.items()]
    for axes in panels[len(groups) :]:
        axes.axis("off")
    panels[len(groups)].legend(handles=handles, loc="center", frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


Styles = Mapping[str, tuple[str, str]]


def _against_operations(axes: Any, by_method: dict[str, dict[int, list[Outcome]]], styles: Styles) -> None:
    """Methods are moved by up to 4 %, or the bars of those with equal cost would hide each other."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    for index, (name, (colour, marker)) in enumerate(styles.items()):
        if by_budget := by_method.get(name):
            beside = 1.01 ** (index - len(styles) / 2)
            spent = [beside * mean(row.flops or 0 for row in rows) for rows in by_budget.values()]
            middle, errors = _middle(list(by_budget.values()))
            axes.errorbar(spent, middle, errors, color=colour, marker=marker, capsize=3)
    axes.set(xscale="log", xlabel="floating-point operations of training")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _by_method(axes: Any, by_method: dict[str, dict[int, list[Outcome]]], styles: Styles) -> None:
    """One budget has no axis: a place for each method, and below it what it took."""
    shown = [name for name in styles if by_method.get(name)]
    for place, name in enumerate(shown):
        [rows] = by_method[name].values()
        colour, marker = styles[name]
        middle, errors = _middle([rows])
        axes.errorbar([place], middle, errors, color=colour, marker=marker, capsize=3, linestyle="")
    operations = [mean(row.flops or 0 for rows in by_method[name].values() for row in rows) for name in shown]
    axes.set_xticks(range(len(shown)), [f"{spent / 1e9:.0f} G" for spent in operations])
    axes.set(xlim=(-0.5, len(shown) - 0.5), xlabel="floating-point operations of training, by method")


def _middle(groups: list[list[Outcome]]) -> tuple[list[float], list[list[float]]]:
    """The mean accuracy of each group, and how far its lowest and highest are below and above."""
    found = [[row.accuracy for row in rows] for rows in groups]
    middle = [mean(values) for values in found]
    below = [m - min(values) for m, values in zip(middle, found, strict=True)]
    return middle, [below, [max(values) - m for m, values in zip(middle, found, strict=True)]]


def main() -> None:
    """Read the command line, train what is missing, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", choices=list(NETS), default=[], help="what to train on (default: nothing)")
    parser.add_argument("--budgets", nargs="+", type=int, default=[1000, 9380, 46900], help="in forward passes of 128")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--root", type=Path, default=Path("data"), help="of MNIST")
    parser.add_argument("--table", type=Path, default=Path("docs/query_efficiency.csv"))
    parser.add_argument("--count", action="store_true", help="fill in the operations of rows that lack them")
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
        row = {(net, method, budget, seed): outcome(net, METHODS[method], budget, seed, options.root)}
        write(options.table, row)
        known |= row
    if options.count and known:
        count(options.table, known)
    show(known)
    if options.figure:
        draw(known, options.figure)


if __name__ == "__main__":
    sys.exit(main())
