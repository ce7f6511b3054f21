"""How time and memory of a step grow with the number of weights, of directions and of images, beside bare passes.

    python -m benchmarks.scaling [--json benchmarks/results/scaling.json] [--figure docs/step_cost.png]
    python -m benchmarks.scaling --draw benchmarks/results/scaling.json --figure docs/step_cost.png

ScalableCNN on images of MNIST's size, SGD. Times are medians of processor milliseconds with one thread, methods in
turns, as others on the machine disturb those less; memory is the peak of resident memory above what the process had
before its net, each point in a process of its own (Linux only). Bare passes are as many as the estimator asks.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tqdm import tqdm

from benchmarks import memory
from benchmarks.step_cost import SGD, Step, Task, bare, lean, machine, ours, task
from zo_lightning import Backprop, Batched, Rademacher, ScalableCNN, ZerothOrder
from zo_lightning.palette import COLOURS, MARKERS

BARE, EXACT, FULL, LEAN, MANY = (
    "bare forward passes",
    "backpropagation",
    "zeroth order",
    "zeroth order, lean",
    "Batched",
)
STYLES = {BARE: ("dimgrey", "")}
STYLES |= dict(zip((EXACT, FULL, LEAN, MANY), zip(COLOURS, MARKERS, strict=True), strict=False))
MEMORY = {BARE: "inference", EXACT: EXACT, FULL: FULL, LEAN: LEAN}
SCALES = 1 / 9, 12.3333, 120 - 1 / 9, 730
SAMPLES = 1, 4, 16, 32
BATCHES = 1, 16, 128, 512
Points = dict[str, list[tuple[float, float]]]


def makers(samples: int, many: bool) -> dict[str, Callable[[Task], Step]]:
    """What is compared: all ask 2 ``samples`` passes but backpropagation, whose one step asks for all there is."""
    of = partial(ZerothOrder, Rademacher(), samples=samples, seed=0)
    found: dict[str, Callable[[Task], Step]] = {
        BARE: partial(bare, passes=2 * samples),
        EXACT: partial(ours, Backprop(), SGD),
        FULL: partial(ours, of(), SGD),
        LEAN: partial(lean, of(), SGD),
    }
    return {**found, MANY: partial(ours, of(evaluation=Batched()), SGD)} if many else found


def milliseconds(scale: float, batch: int, samples: int, many: bool, seconds: float) -> dict[str, float]:
    """The median of each method's processor time, in turns."""
    steps = {name: make(task(scale, batch)) for name, make in makers(samples, many).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for index in range(200):
        for name, step in steps.items():
            before = time.process_time()
            step(index)
            times[name].append((time.process_time() - before) * 1e3)
        if index >= 3 and time.perf_counter() - began > seconds:
            break
    return {name: median(found[1:]) for name, found in times.items()}


def peak(scale: float, mode: str) -> float:
    """In a process of its own: megabytes of weights, and of what steps need beside them at their peak."""
    small = memory.stepper(mode, memory.cnn(1, 8))
    for index in range(2):
        small(index)
    gc.collect()
    begun = memory.memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step = memory.stepper(mode, memory.cnn(scale))
    for index in range(memory.STEPS):
        step(index)
    return (memory.memory("VmHWM") - begun) / 2**20


def measured(seconds: float) -> dict[str, Any]:
    """All curves: by number of weights, of directions and of images."""
    torch.set_num_threads(1)
    curves: dict[str, Points] = {name: {} for name in ("weights", "memory", "directions", "images")}

    def add(curve: str, x: float, found: dict[str, float]) -> None:
        for name, value in found.items():
            curves[curve].setdefault(name, []).append((x, round(value, 3)))

    sizes = {scale: sum(p.numel() for p in ScalableCNN(scale).parameters()) for scale in SCALES}
    for scale in tqdm(SCALES, "weights", disable=None):
        add("weights", sizes[scale], milliseconds(scale, 128, 1, False, seconds))
        for name, mode in MEMORY.items():
            command = [sys.executable, "-m", "benchmarks.scaling", "--one", str(scale), mode]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            add("memory", sizes[scale], {name: float(done.stdout.split()[-1])})
    for samples in tqdm(SAMPLES, "directions", disable=None):
        add("directions", samples, milliseconds(12.3333, 32, samples, True, seconds))
    for batch in tqdm(BATCHES, "images", disable=None):
        add("images", batch, milliseconds(12.3333, batch, 1, False, seconds))
    return {**machine(), "curves": curves}


def draw(curves: dict[str, Points], figure: Path) -> None:
    """Four panels, logarithmic."""
    matplotlib.use("Agg")
    fig, axes = plt.subplots(2, 2, figsize=(10, 7.5), constrained_layout=True)
    panels = {
        "weights": ("processor ms per step, 128 images, one direction", "weights d"),
        "memory": ("peak memory, weights included, MB", "weights d"),
        "directions": ("processor ms per step, d = 169,196, 32 images", "directions q"),
        "images": ("processor ms per step, d = 169,196, one direction", "images in the batch"),
    }
    for axis, (name, (title, x)) in zip(axes.flat, panels.items(), strict=True):
        panel(axis, curves[name], title, x)
    times = axes[0, 0], axes[1, 0], axes[1, 1]  # of one unit, so on one axis
    low, high = zip(*(axis.get_ylim() for axis in times), strict=True)
    for axis in times:
        axis.set_ylim(min(low), max(high))
    handles, labels = axes[1, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=110)


def panel(axis: Axes, points: Points, title: str, x: str) -> None:
    """One panel: bare passes dashed, the methods as lines."""
    for name, found in points.items():
        colour, marker = STYLES.get(name, ("dimgrey", ""))
        axis.loglog(
            *zip(*found, strict=True), color=colour, marker=marker, ls="-" if marker else "--", label=name, ms=4
        )
    axis.set(title=title, xlabel=x)
    axis.grid(alpha=0.3)


def main() -> None:
    """Measure and draw, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2, help="for each point (default: 2)")
    parser.add_argument("--json", type=Path, help="write the figures, and what they belong to, to this file")
    parser.add_argument("--figure", type=Path, help="draw them into this file")
    parser.add_argument("--draw", type=Path, help="draw this file, and measure nothing")
    parser.add_argument("--one", nargs=2, metavar=("SCALE", "MODE"), help="measure memory in this process")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        print(peak(float(options.one[0]), options.one[1]))
        return
    found = json.loads(options.draw.read_text()) if options.draw else measured(options.seconds)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.figure:
        draw(found["curves"], options.figure)
    for curve, points in found["curves"].items():
        print(f"\n{curve}: " + "; ".join(f"{x:,}" for x, _ in points[BARE]))
        for name, of in points.items():
            ratios = [y / b for (_, y), (_, b) in zip(of, points[BARE], strict=True)]
            print(f"  {name:<22}" + "  ".join(f"{y:.1f} ({r:.2f})" for (_, y), r in zip(of, ratios, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
