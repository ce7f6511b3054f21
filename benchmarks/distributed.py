"""Training in 1, 2 and 4 gloo processes that split q = 8 directions: equal weights, bytes sent, speed.

python benchmarks/distributed.py --data DIRECTORY
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import zo_lightning as zo
from zo_lightning.data import MNIST
from zo_lightning.distributed import fingerprint

SAMPLES = 8


def worker(rank: int, size: int, store: str, data: str, steps: int) -> None:
    """Train, and print what rank zero knows: seconds, bytes sent a step, the hash of the weights, d."""
    torch.set_num_threads(1)
    sent: list[int] = []
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        gather = dist.all_gather

        def counted(received: list[torch.Tensor], tensor: torch.Tensor) -> Any:
            sent.append(tensor.nbytes)
            return gather(received, tensor)

        dist.all_gather = counted
    module = MNIST(root=data, batch_size=128, seed=0)
    module.prepare_data()
    module.setup()
    batches = iter(module.train_dataloader())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 60), nn.ReLU(), nn.Linear(60, 10))
    d = sum(p.numel() for p in net.parameters())
    estimator = zo.ZerothOrder(samples=SAMPLES, seed=0, distributed=zo.Distributed("directions"))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    start = time.perf_counter()
    for step in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        estimator.backward(lambda x=x, y=y: nn.functional.cross_entropy(net(x), y), net, step)
        optimizer.step()
    seconds = time.perf_counter() - start
    print(seconds, max(sent, default=0), fingerprint(list(net.parameters())), d)


def main() -> None:
    """Run the processes, and print one line for each number of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of MNIST's files")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--worker", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rank, size, store = options.worker
        return worker(int(rank), int(size), store, options.data, options.steps)
    alone, hashes = 0.0, set()
    for size in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            words = ["--data", options.data, "--steps", str(options.steps), "--worker"]
            processes = [
                subprocess.Popen(
                    [sys.executable, __file__, *words, str(rank), str(size), str(Path(folder, "store"))],
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                for rank in range(size)
            ]
            lines = [process.communicate()[0].split() for process in processes]
        seconds, sent, d = max(float(line[0]) for line in lines), max(int(line[1]) for line in lines), int(lines[0][3])
        hashes |= {line[2] for line in lines}
        alone = alone or seconds
        assert sent <= 16 * SAMPLES + 8, "more than losses, slopes and a hash were sent"
        assert len(hashes) == 1, f"{size} processes ended with other weights"
        print(
            f"{size} processes, d = {d:,}: {options.steps / seconds:.1f} steps/s, {alone / seconds:.2f} x one process,"
        )
        print(f"  at most {sent} bytes a step and rank, against {4 * d:,} of a gradient; weights equal")
    return None


if __name__ == "__main__":
    main()
