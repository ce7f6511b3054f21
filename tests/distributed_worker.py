"""One of several processes that train together: ``python -m tests.distributed_worker rank size store result case``."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import zo_lightning as zo

STEPS, SAMPLES = 200, 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))


def batch(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 6, generator=generator)
    return x, (x[:, :3] + x[:, 3:]).argmax(1)


def train(
    estimator: zo.GradientEstimator, part: slice, lean: bool = False, steps: range = range(STEPS), start: Any = None
) -> dict[str, Tensor]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if start is not None:
        model.load_state_dict(start)
    for step in steps:
        x, y = (t[part] for t in batch(step))

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return nn.functional.cross_entropy(model(x), y)

        if lean:
            estimator.update(optimizer, loss, model, step)
        else:
            optimizer.zero_grad()
            estimator.backward(loss, model, step)
            optimizer.step()
    return model.state_dict()


def estimator(name: str, split: str, samples: int = SAMPLES) -> zo.GradientEstimator:
    shared = zo.Distributed(split, check_every=50)  # type: ignore[arg-type]
    if name == "ForwardGradient":
        return zo.ForwardGradient(samples=samples, seed=3, distributed=shared)
    stencil = zo.ForwardDifference() if name == "forward" else zo.CentralDifference()
    return zo.ZerothOrder(stencil=stencil, samples=samples, seed=3, distributed=shared)


def one_number(estimator: zo.GradientEstimator, loss: Any, step: int = 1) -> str:
    model = nn.Linear(2, 1)
    try:
        estimator.backward(lambda: model(torch.ones(1, 2)).sum() * loss, model, step)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def main(rank: int, size: int, store: str, result: str, case: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    sent: list[int] = []
    gather = dist.all_gather

    def counted(received: list[Tensor], tensor: Tensor) -> Any:
        sent.append(tensor.nbytes)
        return gather(received, tensor)

    dist.all_gather = counted
    whole, mine = slice(None), slice(rank, None, size)
    results: dict[str, Any] = {}
    if case == "train":
        for name in ("central", "forward", "ForwardGradient"):
            results[name] = train(estimator(name, "directions"), whole)
        results["bytes"] = list(sent)
        results["lean"] = train(estimator("central", "directions"), whole, lean=True)
        results["uneven"] = train(estimator("central", "directions", 5), whole)
        results["data"] = train(estimator("central", "data"), mine, steps=range(20))
    elif case == "faults":
        torch.manual_seed(0)
        last = rank == size - 1
        for split in ("data", "directions"):
            results[split] = one_number(estimator("central", split), float("nan") if last else 1.0)
        results["few"] = one_number(estimator("central", "directions", 1), 1.0)
        torch.manual_seed(int(last))
        results["diverged"] = one_number(estimator("central", "data"), 1.0, step=50)
    elif case == "killed":
        if rank == size - 1:
            torch.save(train(estimator("central", "directions"), whole, steps=range(70)), f"{result}.checkpoint")
            os._exit(9)
        try:
            train(estimator("central", "directions"), whole)
        except zo.ProcessLost as error:
            results["lost"] = str(error)
    elif case == "resumed":
        start = torch.load(Path(result).with_name("killed.checkpoint"))
        results["central"] = train(estimator("central", "directions"), whole, steps=range(70, STEPS), start=start)
    torch.save(results, f"{result}.{rank}")
    os._exit(0)  # a group that has lost a member cannot be closed


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
