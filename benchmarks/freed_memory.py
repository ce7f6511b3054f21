"""What it gains to keep freed memory for the next step: processor time of a step, with and without, in turns.

    python -m benchmarks.freed_memory [--rounds 3] [--threads 1]

Each figure is from a process of its own, since glibc's thresholds are the process's. Batches of 128.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from zo_lightning import Backprop, GradientEstimator, PerExample, ScalableCNN, SmallVGG, ZerothOrder
from zo_lightning.allocator import keep_freed_memory

METHODS: dict[str, GradientEstimator] = {
    "Backprop": Backprop(),
    "ZerothOrder": ZerothOrder(seed=0),
    "PerExample": PerExample(seed=0),
}
NETS = ("0.1111111111111111", "12.33", "61.2", "119.89", "SmallVGG")  # scales of ScalableCNN, and one with BatchNorm
KEPT, NOT_KEPT = "kept", "not"


def made(net: str) -> tuple[nn.Module, torch.Tensor]:
    """The net, and a batch of images."""
    torch.manual_seed(0)
    return (
        (SmallVGG(), torch.randn(128, 3, 32, 32))
        if net == "SmallVGG"
        else (
            ScalableCNN(scale=float(net)),
            torch.randn(128, 1, 28, 28),
        )
    )


def step_time(method: str, net: str, steps: int = 20) -> float:
    """Median seconds of processor time of a step, with Adam."""
    estimator, (model, x), y = METHODS[method], made(net), torch.randint(10, (128,))
    state, optimizer = estimator.init(model), torch.optim.Adam(model.parameters(), lr=1e-4)
    reduction = "none" if method == "PerExample" else "mean"
    seconds = []
    for step in range(3 + steps):
        began = time.process_time()
        estimator.backward(lambda: F.cross_entropy(model(x), y, reduction=reduction), model, step, state)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
    return median(seconds[3:])


def measured(method: str, net: str, how: str, threads: int) -> float:
    """The same, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.freed_memory", "--threads", str(threads), "--one", method, net, how]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return float(subprocess.run(words, env=plain, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print a line for each method and net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of processes (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--nets", nargs="+", default=NETS, help="scales of ScalableCNN, SmallVGG")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        method, net, how = options.one
        if how == KEPT and not keep_freed_memory():
            raise SystemExit("the allocator is not glibc's")
        print(step_time(method, net))
        return
    for net in options.nets:
        d = sum(p.numel() for p in made(net)[0].parameters())
        for method in METHODS:
            pairs = [
                [measured(method, net, how, options.threads) for how in (NOT_KEPT, KEPT)] for _ in range(options.rounds)
            ]
            ratios = sorted(kept / not_kept for not_kept, kept in pairs)
            before, after = (min(times) * 1e3 for times in zip(*pairs, strict=True))
            print(
                f"{d:>9,}  {method:<12}{before:>8.1f} ms{after:>8.1f} ms  kept over not "
                f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
