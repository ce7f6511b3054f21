"""What it gains to keep freed memory for the next step: processor time of a step and peak memory, with and without.

    python -m benchmarks.freed_memory [--rounds 3] [--threads 1] [--nets 12.33 SmallVGG]

Each figure is of a process of its own, since glibc's thresholds are the process's; a round has one of each kind, in
turns the one or the other first. Batches of 128, Adam. The times are medians over rounds, the ratios those of rounds:
median, lowest and highest. Memory is the peak of all that is resident, Python and PyTorch included. Linux only.
"""

import argparse
import json
import os
import resource
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
VGG = "SmallVGG"
NETS = ("0.1111111111111111", "12.33", "61.2", "119.89", VGG)  # scales of ScalableCNN, and a net with BatchNorm
KEPT, NOT_KEPT = "kept", "not kept"


def made(net: str) -> tuple[nn.Module, torch.Tensor]:
    """The net, and a batch of images."""
    torch.manual_seed(0)
    if net == VGG:
        return SmallVGG(), torch.randn(128, 3, 32, 32)
    return ScalableCNN(scale=float(net)), torch.randn(128, 1, 28, 28)


def step_time(method: str, net: str, steps: int = 20) -> float:
    """Median seconds of processor time of a step."""
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


def measured(method: str, net: str, how: str, threads: int) -> tuple[float, float]:
    """Milliseconds and megabytes, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.freed_memory", "--threads", str(threads), "--one", method, net, how]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return tuple(json.loads(subprocess.run(words, env=plain, capture_output=True, text=True, check=True).stdout))


def main() -> None:
    """Print a line for each method and net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--nets", nargs="+", default=NETS, help=f"scales of ScalableCNN, or {VGG}")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        method, net, how = options.one
        if how == KEPT and not keep_freed_memory():
            raise SystemExit("the allocator is not glibc's")
        seconds = step_time(method, net)
        print(json.dumps([seconds * 1e3, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
        return
    for net in options.nets:
        d = sum(p.numel() for p in made(net)[0].parameters())
        for method in METHODS:
            found: dict[str, list[tuple[float, float]]] = {NOT_KEPT: [], KEPT: []}
            for place in range(options.rounds):
                for how in (NOT_KEPT, KEPT) if place % 2 == 0 else (KEPT, NOT_KEPT):
                    found[how].append(measured(method, net, how, options.threads))
            ratios = sorted(after[0] / before[0] for before, after in zip(found[NOT_KEPT], found[KEPT], strict=True))
            said = (f"{median(t for t, _ in of):.1f} ms, {median(m for _, m in of):.0f} MB" for of in found.values())
            spread = f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
            print(f"{d:>9,}  {method:<12}{', kept: '.join(said)}; {spread}", flush=True)


if __name__ == "__main__":
    main()
