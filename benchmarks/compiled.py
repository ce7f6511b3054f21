"""What ``torch.compile`` of the net gains: two forward passes alone, and a step of zeroth order, in turns.

    python -m benchmarks.compiled [--threads 2] [--seconds 10] [--device cuda]

Lean steps are watched, and run the code as it was written. Compiling takes up to a minute a size, before the first
turn, and needs a C++ compiler on a CPU.
"""

import argparse
import time
from functools import partial
from statistics import median

import torch

from benchmarks.step_cost import SCALES, SGD, SIGNS, Step, Task, bare, lean, ours, spread, task, turn

BARE = "two passes"
METHODS = {
    BARE: bare,
    "signs, SGD": partial(ours, SIGNS, SGD),
    "signs, SGD, lean": partial(lean, SIGNS, SGD),
}


def compiled(task: Task) -> Task:
    """The same, with a compiled net."""
    task[0].compile()
    return task


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="for each size (default: 10)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of ScalableCNN")
    parser.add_argument("--batch", type=int, default=128, help="images (default: 128)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'d':>9}  {'':<18}{'eager':>11}{'compiled':>11}  compiled over eager, quartiles")
    for scale in options.scales:
        steps: dict[tuple[str, bool], Step] = {}
        for name, make in METHODS.items():
            steps[name, False] = make(task(scale, options.batch, options.device))
            steps[name, True] = make(compiled(task(scale, options.batch, options.device)))
        for step in steps.values():
            for index in (0, 1):  # the first step is watched
                step(index)
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in steps}
        began = time.perf_counter()
        while len(times[BARE, True]) < 5 or time.perf_counter() - began < options.seconds:
            for key, step in steps.items():
                times[key].append(turn(step, 2))
        d = sum(p.numel() for p in task(scale, 1)[0].parameters())
        for name in METHODS:
            eager, fast = times[name, False], times[name, True]
            found = spread(fast, eager)
            print(
                f"{d:>9,}  {name:<18}{median(eager) * 1e3:>8.2f} ms{median(fast) * 1e3:>8.2f} ms"
                f"{found['ratio']:>9.2f}  [{found['low']:.2f}, {found['high']:.2f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
