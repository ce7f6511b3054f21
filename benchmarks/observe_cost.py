"""What ``configs/callbacks/observe.yaml`` costs at its default intervals: epochs with and without, from one process.

Runs of ZO-AdaMM on MNIST with d = 169,000 weights take turns, so that the machine's moods meet both; the medians of
their epochs, validation included, are compared. What happens once, when training ends (t-SNE), is told apart.

    python benchmarks/observe_cost.py --root ../shared/data [--rounds 3] [--epochs 3]
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

from pytorch_lightning import Callback, LightningModule, Trainer

from zo_lightning.__main__ import main as zo_lightning

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Stopwatch(Callback):
    """Times epochs, and the end of training. It stands behind the observers, so that their work is in its times."""

    epochs: list[float] = []
    ends: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(time.perf_counter() - self.last)
        self.last = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends.append(time.perf_counter() - self.last)


def measure(root: Path, epochs: int, observed: bool) -> tuple[list[float], float]:
    """The seconds of each epoch of one run, and those of its end."""
    Stopwatch.epochs, Stopwatch.ends = [], []
    words = ["fit", "-c", f"{CONFIGS}/mnist.yaml", "-c", f"{CONFIGS}/estimator/zo_adamm.yaml"]
    words += ["-c", f"{CONFIGS}/callbacks/observe.yaml"] if observed else []
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
    seconds: dict[bool, list[float]] = {False: [], True: []}
    ends: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for turn in range(options.rounds):
            for observed in (False, True) if turn % 2 == 0 else (True, False):
                epochs, end = measure(root, options.epochs, observed)
                seconds[observed] += epochs
                ends[observed].append(end)
                print(f"{'with   ' if observed else 'without'}", *(f"{s:6.2f} s" for s in epochs), f"end {end:5.2f} s")
    plain, watched = median(seconds[False]), median(seconds[True])
    print(f"epoch: {plain:.2f} s without, {watched:.2f} s with: {watched / plain - 1:+.1%} (medians)")
    print(f"end of training: {median(ends[False]):.2f} s without, {median(ends[True]):.2f} s with, once per run")


if __name__ == "__main__":
    main()
