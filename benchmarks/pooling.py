"""What it gains to pool without looking for places: processor time of a step, over that with PyTorch's max-pooling.

    python -m benchmarks.pooling [--rounds 5] [--threads 1] [--nets 12.33 SmallVGG]

Both in one process, in turns; of each round the ratio: median, lowest and highest. Batches of 128, Adam, on the CPU.
"""

import argparse
from statistics import median
from unittest.mock import patch

import torch

from benchmarks.freed_memory import METHODS, VGG, made, step_time
from zo_lightning.allocator import keep_freed_memory
from zo_lightning.perturbed import pooling

NETS = ("0.1111111111111111", "12.33", VGG)


def main() -> None:
    """Print a line for each method and net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--nets", nargs="+", default=NETS, help=f"scales of ScalableCNN, or {VGG}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for net in options.nets:
        d = sum(p.numel() for p in made(net)[0].parameters())
        for method in METHODS:
            rounds = []
            for _ in range(options.rounds):
                with patch.object(pooling, "_FEW", float("inf")):
                    slow = step_time(method, net)
                rounds.append((step_time(method, net), slow))
            ratios = sorted(fast / slow for fast, slow in rounds)
            times = " and ".join(f"{median(turn) * 1e3:.1f} ms" for turn in zip(*rounds, strict=True))
            print(
                f"{d:>9,}  {method:<12} {times}: {median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]", flush=True
            )


if __name__ == "__main__":
    main()
