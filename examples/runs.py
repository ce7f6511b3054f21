"""What examples do beside training: a command line, a process for each training, a table and a figure."""

import argparse
import re
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from examples.results import Result, read, record, table

Train = Callable[[str, int, Path, bool], list[Result]]


def main(name: str, description: str | None, train: Train, methods: Sequence[str], forward_only: str) -> None:
    """Train by each method with each seed, keep the results, print their table and draw them.

    Args:
        name: of the results ``<name>.csv`` and of the figure ``<name>.png``.
        description: what ``--help`` says.
        train: called with a method, a seed, the folder of the data and whether a few seconds are all there is.
        methods: all that there are.
        forward_only: a pattern that is in the names of methods without backpropagation; the figure has them in colour.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default="data", help="folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, metavar="METHOD", help=str(methods))
    parser.add_argument("--smoke", action="store_true", help="a training of seconds, that shows that it runs")
    parser.add_argument("--out", type=Path, help="folder of results (default: docs/examples, with --smoke build/smoke)")
    args = parser.parse_args()
    file = (args.out or Path("build/smoke" if args.smoke else "docs/examples")) / f"{name}.csv"
    for seed in args.seeds:
        for method in args.methods:
            with get_context("spawn").Pool(1) as pool:  # so that a peak of memory is that of one training
                for result in pool.apply(train, (method, seed, args.root, args.smoke)):
                    record(file, result)
    results = read(file)
    print(table(results))
    draw(results, file.with_suffix(".png"), forward_only)


def draw(results: list[Result], file: Path, forward_only: str) -> None:
    """A panel for each problem, a bar for each method, a dot for each seed, and a dashed line where they began."""
    problems: dict[str, dict[str, list[Result]]] = {}
    for one in results:
        problems.setdefault(one.example, {}).setdefault(one.method, []).append(one)
    heights = [len(methods) for methods in problems.values()]
    figure = Figure(figsize=(7, 0.75 * len(problems) + 0.36 * sum(heights)), dpi=100, layout="constrained")
    panels = figure.subplots(len(problems), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (problem, methods) in zip(panels, problems.items(), strict=True):
        for place, (method, rows) in enumerate(methods.items()):
            before, after = mean(one.before for one in rows), mean(one.after for one in rows)
            colour = "#56B4E9" if re.search(forward_only, method) else "#BBBBBB"  # Okabe and Ito's light blue
            panel.barh(place, after, height=0.7, color=colour)
            panel.plot([one.after for one in rows], [place] * len(rows), "o", color="black", markersize=4)
            panel.plot([before, before], [place - 0.45, place + 0.45], "--", color="#D55E00", linewidth=2)
            panel.text(0.01, place, f"{after:.3f}", transform=panel.get_yaxis_transform(), va="center")
        panel.set_yticks(range(len(methods)), methods)
        panel.invert_yaxis()
        panel.set_title(f"{problem}: {next(iter(methods.values()))[0].metric}, dashed where it began", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
