"""Draw validation accuracy against what was spent, one curve per method, from runs' TensorBoard files.

    python benchmarks/learning_curves.py "PerExample=runs/a-42,runs/a-43" "one loss=runs/b-42" --published 169196

Several runs of one method are drawn as their mean and the range from the lowest to the highest. The horizontal axis is
``budget/flops``, the floating-point operations of all training steps, or with ``--against`` another count of
``budget/``. ``--published`` adds the study's own curves at a size, dashed, at what one step of each method costs.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from zo_lightning import Backprop, GradientEstimator, ScalableCNN, Sphere, ZerothOrder
from zo_lightning.costs import count_flops
from zo_lightning.palette import COLOURS
from zo_lightning.study.results import published

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

AXES = {
    "flops": "floating-point operations of training",
    "seconds": "seconds of training",
    "forward_passes": "forward passes of a batch (a backward pass counts two)",
}
EXAMPLES = 60_000  # in an epoch of MNIST


def curve(folder: Path, against: str) -> tuple[np.ndarray, np.ndarray]:
    """What was spent, and validation accuracies, of the run whose event files lie somewhere under a folder.

    Raises:
        FileNotFoundError: there are none.
    """
    events = sorted(folder.rglob("events.out.tfevents.*"))
    if not events:
        raise FileNotFoundError(f"no TensorBoard event file under '{folder}'")
    log = EventAccumulator(str(events[0].parent))
    log.Reload()
    accuracy, budget = log.Scalars("val/acc"), log.Scalars(f"budget/{against}")
    spent = np.interp(
        [point.step for point in accuracy], [point.step for point in budget], [point.value for point in budget]
    )
    return spent, np.array([point.value for point in accuracy])


def flops_of_an_epoch(estimator: GradientEstimator, scale: float) -> float:
    """Of a published run: every example of MNIST once."""
    net, images, labels = ScalableCNN(scale), torch.rand(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64)
    return EXAMPLES * count_flops(lambda: estimator.backward(lambda: F.cross_entropy(net(images), labels), net, 0))


def draw_published(axes: Axes, d: int, against: str) -> None:
    """Add the published curves at size ``d``, dashed."""
    table = published()
    for method, estimator, passes, grey in (
        ("FO-AdaMM", Backprop(), 3 * 469, "black"),
        ("ZO-AdaMM", ZerothOrder(Sphere()), 2 * 469, "dimgrey"),
    ):
        rows = table[(table["method"] == method) & (table["d"] == d)]
        epoch = passes if against == "forward_passes" else flops_of_an_epoch(estimator, rows["scale"].iloc[0])
        label = f"{method}, published: {rows['val_accuracy_mean'].iloc[-1]:.3f}"
        axes.plot(rows["epoch"] * epoch, rows["val_accuracy_mean"], color=grey, linestyle="--", label=label)


def draw(methods: dict[str, list[Path]], d: int | None, against: str, title: str, output: Path) -> None:
    """Draw one curve per method, and the published ones at size ``d``."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if d is not None:
        draw_published(axes, d, against)
    for (name, folders), colour in zip(methods.items(), COLOURS, strict=False):
        curves = [curve(folder, against) for folder in folders]
        length = min(len(accuracies) for _, accuracies in curves)
        spent = np.stack([spent[:length] for spent, _ in curves]).mean(0)
        accuracies = np.stack([accuracies[:length] for _, accuracies in curves])
        axes.plot(spent, accuracies.mean(0), color=colour, label=f"{name}: {accuracies[:, -1].mean():.3f}")
        axes.fill_between(spent, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=AXES[against], ylabel="accuracy", title=title, xscale="log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.grid(alpha=0.3)
    axes.legend(title="method: final accuracy", loc="lower right")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="NAME=FOLDER[,FOLDER...]")
    parser.add_argument("--published", type=int, metavar="D", help="draw the study's curves of this size as well")
    parser.add_argument("--against", choices=list(AXES), default="flops", help="what the horizontal axis is")
    parser.add_argument("--output", type=Path, default=Path("learning_curves.png"))
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    if options.published and options.against == "seconds":
        parser.error("the published seconds are those of other hardware: leave --published out")
    methods = {}
    for method in options.methods:
        name, _, runs = method.partition("=")
        methods[name] = [Path(folder) for folder in runs.split(",")]
    draw(methods, options.published, options.against, options.title, options.output)


if __name__ == "__main__":
    sys.exit(main())
