"""Training in 1, 2 and 4 gloo processes, q = 8 on MNIST: equal weights, bytes sent, speed, a killed rank, a restart.

python benchmarks/distributed.py --root data
"""

import argparse
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import zo_lightning as zo
from zo_lightning.data import MNIST
from zo_lightning.data.batches import ShuffledBatches
from zo_lightning.distributed import fingerprint

SAMPLES, EVERY = 8, 50


class Task(NamedTuple):
    """What a process does: ``steps`` of training, from a checkpoint if there is one, and whether its last rank dies."""

    root: str
    split: str
    steps: int
    folder: Path
    resume: Path | None = None
    dies_at: int | None = None


class Found(NamedTuple):
    """What one rank found."""

    seconds: float
    cpu_seconds: float
    sent: int
    weights: int
    d: int
    error: str = ""


def main() -> None:
    """Run the processes, and print one line for each number of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each run")
    options = parser.parse_args()
    MNIST(root=options.root).prepare_data()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(size: int, split: str = "directions", **task: Any) -> list[Found | None]:
            return together(size, Task(options.root, split, options.steps, folder, **task))

        alone = _checked(run(1))
        print(f"{os.cpu_count()} cores, d = {alone.d:,}, q = {SAMPLES}, batch 128, {options.steps} steps")
        print("split       ranks  steps/s   speed  CPU s/step  bytes/step  weights after the last step")
        _print("", 1, alone, alone, options.steps, "those of one process, by definition")
        for split in ("directions", "both", "data"):
            for size in (2, 4):
                ranks = run(size, split)
                found = _checked(ranks)
                same = "those of one process, bit for bit" if found.weights == alone.weights else "equal on all ranks"
                assert split != "directions" or found.weights == alone.weights
                _print(split, size, found, alone, options.steps, same)
        print(f"a gradient has {4 * alone.d:,} bytes")
        dies_at = options.steps * 3 // 4 - EVERY // 2
        first, dead = run(2, dies_at=dies_at)
        assert dead is None and first is not None and first.error
        print(f"rank 1 of 2 killed at step {dies_at}; rank 0 said: {first.error}")
        checkpoint = max(folder.glob("*.pt"), key=lambda path: int(path.stem))
        for size in (1, 4):
            found = _checked(run(size, resume=checkpoint))
            assert found.weights == alone.weights
            print(f"resumed at step {checkpoint.stem} by {size}: the weights of the uninterrupted run, bit for bit")


def together(size: int, task: Task) -> list[Found | None]:
    """What each of ``size`` processes found; None of one that was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = [context.SimpleQueue() for _ in range(size)]
    ranks = [context.Process(target=worker, args=(rank, size, port, task, results[rank])) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [None if queue.empty() else queue.get() for queue in results]


def worker(rank: int, size: int, port: int, task: Task, result: Any) -> None:
    """Train as one of ``size`` processes."""
    torch.set_num_threads(1)
    sent = [0]
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        gather = dist.all_gather

        def counted(received: list[torch.Tensor], tensor: torch.Tensor) -> Any:
            sent.append(tensor.nbytes)
            return gather(received, tensor)

        dist.all_gather = counted
    data = MNIST(root=task.root, seed=0)
    data.setup()
    images, labels = data._subset("train")
    own = (0, 1) if task.split == "directions" else (rank, size)
    batches = ShuffledBatches(images, labels, 128, seed=0, rank=own[0], world_size=own[1])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 60), nn.ReLU(), nn.Linear(60, 10))
    first = 0
    if task.resume is not None:
        first = int(task.resume.stem)
        net.load_state_dict(torch.load(task.resume))
        batches.load_state_dict({"epoch": 0, "position": first})
    estimator = zo.ZerothOrder(samples=SAMPLES, seed=0, distributed=zo.Distributed(task.split))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    error, wall, cpu = "", time.perf_counter(), time.process_time()
    for step, (x, y) in zip(range(first, task.steps), batches, strict=False):
        if step == task.dies_at:
            if rank == 0 and size > 1:
                wall = time.perf_counter()
            if rank == size - 1:
                os._exit(9)
        if rank == 0 and task.dies_at is not None and step % EVERY == 0:
            torch.save(net.state_dict(), task.folder / f"{step}.pt")
        optimizer.zero_grad()
        try:
            estimator.backward(lambda x=x, y=y: nn.functional.cross_entropy(net(x), y), net, step)
        except zo.ProcessLost as lost:
            error = f"ProcessLost after {time.perf_counter() - wall:.2f} s, {str(lost).partition(' (')[0]}"
            break
        optimizer.step()
    spent = time.perf_counter() - wall, time.process_time() - cpu
    weights, d = list(net.parameters()), sum(p.numel() for p in net.parameters())
    result.put(Found(*spent, max(sent), fingerprint(weights), d, error))
    sys.stdout.flush()
    os._exit(0)  # a group that has lost a member cannot be closed


def _checked(ranks: list[Found | None]) -> Found:
    """The slowest of the ranks, all of which must have the same weights."""
    found = [one for one in ranks if one is not None]
    assert len(found) == len(ranks) and len({one.weights for one in found}) == 1, found
    return Found(
        max(one.seconds for one in found),
        max(one.cpu_seconds for one in found),
        max(one.sent for one in found),
        found[0].weights,
        found[0].d,
    )


def _print(split: str, size: int, found: Found, alone: Found, steps: int, same: str) -> None:
    speed = alone.seconds / found.seconds
    print(
        f"{split:10} {size:6} {steps / found.seconds:8.1f} {speed:6.2f}x {found.cpu_seconds / steps:11.4f} "
        f"{found.sent:11}  {same}",
        flush=True,
    )


if __name__ == "__main__":
    main()
