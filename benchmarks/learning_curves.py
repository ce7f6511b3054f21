"""Draw validation accuracy against forward passes spent, one curve per method, from runs' TensorBoard files.

    python benchmarks/learning_curves.py "PerExample=runs/a-42,runs/a-43" "one loss=runs/b-42@0.25" --published 169196

Several runs of one method are drawn as their mean and the range from the lowest to the highest. ``@0.25`` counts a pass
as a quarter, for runs with batches of 32. ``--published`` adds the study's own curves at a size, dashed.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zo_lightning.study.results import published

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's, for every kind of colour vision


def curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Forward passes and validation accuracies of the run whose event files lie somewhere under a folder.

    Raises:
        FileNotFoundError: there are none.
    """
    events = sorted(folder.rglob("events.out.tfevents.*"))
    if not events:
        raise FileNotFoundError(f"no TensorBoard event file under '{folder}'")
    log = EventAccumulator(str(events[0].parent))
    log.Reload()
    accuracy, budget = log.Scalars("val/acc"), log.Scalars("budget/forward_passes")
    passes = np.interp(
        [point.step for point in accuracy], [point.step for point in budget], [point.value for point in budget]
    )
    return passes, np.array([point.value for point in accuracy])


def draw(methods: dict[str, tuple[list[Path], float]], d: int | None, title: str, output: Path) -> None:
    """Draw one curve per method, and the published ones at size ``d``."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if d is not None:
        table = published()
        for (method, passes), grey in zip(
            {"FO-AdaMM": 3 * 469, "ZO-AdaMM": 2 * 469}.items(), ("black", "grey"), strict=True
        ):
            rows = table[(table["method"] == method) & (table["d"] == d)]
            label = f"{method}, published: {rows['val_accuracy_mean'].iloc[-1]:.3f}"
            axes.plot(rows["epoch"] * passes, rows["val_accuracy_mean"], color=grey, linestyle="--", label=label)
    for (name, (folders, weight)), colour in zip(methods.items(), COLOURS, strict=False):
        curves = [curve(folder) for folder in folders]
        passes = curves[0][0] * weight
        accuracies = np.stack([accuracy[: len(passes)] for _, accuracy in curves])
        axes.plot(passes, accuracies.mean(0), color=colour, label=f"{name}: {accuracies[:, -1].mean():.3f}")
        axes.fill_between(passes, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="forward passes of a batch of 128 (a backward pass counts two)", ylabel="accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="method: final accuracy", loc="lower right")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="NAME=FOLDER[,FOLDER...][@WEIGHT]")
    parser.add_argument("--published", type=int, metavar="D", help="draw the study's curves of this size as well")
    parser.add_argument("--output", type=Path, default=Path("learning_curves.png"))
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    methods = {}
    for method in options.methods:
        name, _, runs = method.partition("=")
        folders, _, weight = runs.partition("@")
        methods[name] = [Path(folder) for folder in folders.split(",")], float(weight or 1)
    draw(
        methods,
        options.published,
        options.title,
        options.output,
    )


if __name__ == "__main__":
    sys.exit(main())
