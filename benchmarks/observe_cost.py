"""What ``configs/callbacks/observe.yaml`` costs at its default intervals: epochs with and without, from one process.

Runs of ZO-AdaMM on MNIST with d = 169,000 weights take turns, so that the machine's moods meet both; the medians of
their epochs, validation included, are compared: in seconds, and in seconds of the processor, which others on the
machine disturb less. What happens once, when training ends (t-SNE), is told apart.

    python benchmarks/observe_cost.py --root data [--rounds 3] [--epochs 3]
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pytorch_lightning import Callback, LightningModule, Trainer

from zo_lightning.__main__ import main as zo_lightning


class Times(NamedTuple):
    """Seconds that went by, and seconds of the processor."""

    wall: float
    processor: float


class Stopwatch(Callback):
    """Times epochs, and the end of training. It stands behind the observers, so that their work is in its times."""

    epochs: list[Times] = []
    ends: list[Times] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last = now()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(since(self.last))
        self.last = now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends.append(since(self.last))


def now() -> Times:
    return Times(time.perf_counter(), time.process_time())


def since(then: Times) -> Times:
    return Times(*(b - a for a, b in zip(then, now(), strict=True)))


def measure(root: Path, epochs: int, observed: bool) -> tuple[list[Times], Times]:
    """The times of each epoch of one run, and that of its end."""
    Stopwatch.epochs, Stopwatch.ends = [], []
    words = ["fit", "-c", "mnist", "-c", "estimator/zo_adamm"]
    words += ["-c", "callbacks/observe"] if observed else []
    words += ["--data.root", str(root), "--trainer.callbacks+", f"{__name__}.Stopwatch"]
    words += ["--trainer.max_epochs", str(epochs), "--trainer.enable_model_summary", "false"]
    sys.argv = sys.argv[:1]  # LightningCLI warns of a command line that is not the one it was given
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = zo_lightning(words)
    if code:
        raise SystemExit(errors.getvalue())
    return Stopwatch.epochs, Stopwatch.ends[0]


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of MNIST (default: data)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per run (default: 3)")
    options = parser.parse_args()
    root = options.root.resolve()
    logging.disable(logging.WARNING)
    times: dict[bool, list[Times]] = {False: [], True: []}
    ends: dict[bool, list[Times]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for turn in range(options.rounds):
            for observed in (False, True) if turn % 2 == 0 else (True, False):
                epochs, end = measure(root, options.epochs, observed)
                times[observed] += epochs
                ends[observed].append(end)
                print(
                    f"{'with   ' if observed else 'without'}",
                    *(f"{e.wall:6.2f} s" for e in epochs),
                    f"end {end.wall:5.2f} s",
                )
    for kind in Times._fields:
        plain, watched, plain_end, watched_end = (
            median(getattr(one, kind) for one in some[observed]) for some in (times, ends) for observed in (False, True)
        )
        print(
            f"{kind:<9} epoch {plain:.2f} s without, {watched:.2f} s with: {watched / plain - 1:+.1%} (medians);",
            end=" ",
        )
        print(f"end of training {plain_end:.2f} s without, {watched_end:.2f} s with, once per run")


if __name__ == "__main__":
    main()
