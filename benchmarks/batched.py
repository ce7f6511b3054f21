"""What ``Batched`` gains over ``OneByOne``: ratios of a whole estimate's time, in turns within one process.

    python benchmarks/batched.py [--samples 32] [--batch 32] [--threads 2] [--chunks 0 8]

The net is ``ScalableCNN``; a chunk of 0 is as many directions as fit into the memory.
"""

import argparse
import sys
import time
from statistics import median

import torch
from torch.nn import functional as F

from zo_lightning import (
    Batched,
    CentralDifference,
    ForwardDifference,
    LowRank,
    OneByOne,
    Rademacher,
    ScalableCNN,
    Stencil,
    ZerothOrder,
)
from zo_lightning.directions import Directions
from zo_lightning.evaluation import Evaluation

DIRECTIONS: dict[str, Directions] = {"signs": Rademacher(), "rank 1": LowRank()}
STENCILS: dict[str, Stencil] = {"central": CentralDifference(1e-3), "forward": ForwardDifference(1e-3)}


def times(
    scale: float, batch: int, u: Directions, stencil: Stencil, evaluations: list[Evaluation], samples: int, repeats: int
) -> list[list[float]]:
    """The milliseconds of estimates by each evaluation, in turns."""
    torch.manual_seed(0)
    net, x, y = ScalableCNN(scale), torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
    found: list[list[float]] = [[] for _ in evaluations]
    pairs = [ZerothOrder(u, stencil, evaluation, samples, seed=0) for evaluation in evaluations]
    states = [estimator.init(net) for estimator in pairs]
    for step in range(repeats + 2):
        for estimator, state, into in zip(pairs, states, found, strict=True):
            began = time.perf_counter()
            estimator.backward(lambda: F.cross_entropy(net(x), y), net, step, state)
            if step >= 2:
                into.append((time.perf_counter() - began) * 1e3)
            net.zero_grad()
    return found


def main() -> None:
    """Print a table in Markdown, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="directions")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scales", type=float, nargs="+", default=[1 / 9, 12.3333], help="of ScalableCNN")
    parser.add_argument("--chunks", type=int, nargs="+", default=[0])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        "| d | directions | stencil | one by one, ms |"
        + "".join(f" gain, chunk {c or 'None'} |" for c in options.chunks)
    )
    print("|---|---|---|---|" + "---|" * len(options.chunks))
    evaluations: list[Evaluation] = [OneByOne(), *(Batched(chunk or None) for chunk in options.chunks)]
    for scale in options.scales:
        d = sum(p.numel() for p in ScalableCNN(scale).parameters())
        for kind, u in DIRECTIONS.items():
            for name, stencil in STENCILS.items():
                one, *many = times(scale, options.batch, u, stencil, evaluations, options.samples, options.repeats)
                gains = [median(a / b for a, b in zip(one, other, strict=True)) for other in many]
                row = "".join(f" {gain:.2f} |" for gain in gains)
                print(f"| {d:,} | {kind} | {name} | {median(one):.0f} |{row}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
