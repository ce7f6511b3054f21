"""What one of several processes does in plain PyTorch; ``tests.processes.together`` runs it."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import zo_lightning as zo

STEPS, SAMPLES, FEW = 100, 8, range(10)
SPLITS = [("data", 2), ("directions", 2), ("directions", 3), ("both", 2), ("both", 3)]


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
    state = estimator.init(model)
    if start is not None:
        model.load_state_dict(start)
    for step in steps:
        x, y = (t[part] for t in batch(step))

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return nn.functional.cross_entropy(model(x), y, reduction="none")

        if lean:
            estimator.update(optimizer, loss, model, step, state)
        else:
            optimizer.zero_grad()
            estimator.backward(loss, model, step, state)
            optimizer.step()
    return model.state_dict()


def estimator(name: str, split: str, samples: int = SAMPLES) -> zo.GradientEstimator:
    shared = zo.Distributed(split, check_every=50)  # type: ignore[arg-type]
    if name == "ForwardGradient":
        return zo.ForwardGradient(samples=samples, seed=3, distributed=shared)
    if name == "DirectFeedbackAlignment":
        return zo.DirectFeedbackAlignment(seed=3, distributed=shared)
    if name == "PerExample":
        return zo.PerExample(samples=samples, seed=3, distributed=shared)
    stencil = zo.ForwardDifference() if name == "forward" else zo.CentralDifference()
    return zo.ZerothOrder(stencil=stencil, samples=samples, seed=3, distributed=shared)


def one_number(estimator: zo.GradientEstimator, loss: Any, step: int = 1) -> str:
    model = nn.Linear(2, 1)
    try:
        estimator.backward(lambda: model(torch.ones(2, 2)).sum(1) * loss, model, step, estimator.init(model))
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def join() -> list[int]:
    """Join the group; returns a list that grows by the bytes of each tensor that this process sends."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    sent: list[int] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted(received: list[Tensor], tensor: Tensor) -> Any:
        sent.append(tensor.nbytes)
        return gather(received, tensor)

    def counted_reduction(tensor: Tensor) -> Any:
        sent.append(tensor.nbytes)
        return reduce(tensor)

    dist.all_gather, dist.all_reduce = counted, counted_reduction
    return sent


def trains(rank: int) -> dict[str, Any]:
    """Train in every way, and count what is sent."""
    sent, results = join(), {}
    whole, mine = slice(None), slice(rank, None, dist.get_world_size())
    results["central"] = train(estimator("central", "directions"), whole)
    for name in ("forward", "ForwardGradient"):
        results[name] = train(estimator(name, "directions"), whole, steps=FEW)
    results["bytes"] = list(sent)
    results["lean"] = train(estimator("central", "directions"), whole, lean=True, steps=FEW)
    results["uneven"] = train(estimator("central", "directions", 5), whole, steps=FEW)
    sent.clear()
    for split in ("data", "both"):
        results[split] = train(estimator("central", split), mine, steps=FEW)
        results[f"{split} bytes"], sent[:] = sum(sent), []
    for split in ("data", "directions", "both"):
        results[f"PerExample {split}"] = train(estimator("PerExample", split), mine, steps=FEW)
    return results


def estimates(rank: int) -> dict[str, Tensor]:
    """One estimate of every kind, each rank with the part of the batch that the split gives it."""
    join()
    kinds = [("ForwardGradient", split, q) for split, q in SPLITS] + [("PerExample", split, q) for split, q in SPLITS]
    kinds += [("DirectFeedbackAlignment", split, 1) for split in ("data", "directions", "both")]
    unseeded = zo.ForwardGradient(samples=2, distributed=zo.Distributed("both"))
    return {"unseeded": one_estimate(unseeded, part("both", rank), seed=3)} | {
        f"{name} {split} {q}": one_estimate(estimator(name, split, q), part(split, rank)) for name, split, q in kinds
    }


def part(split: str, rank: int, size: int = 2) -> slice:
    return slice(None) if split == "directions" else slice(rank, None, size)


def one_estimate(estimator: zo.GradientEstimator, part: slice, seed: int = 0) -> Tensor:
    model = net().eval()
    x, y = (t[part] for t in batch(0))
    torch.manual_seed(seed)
    state = estimator.init(model)
    estimator.backward(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), model, 0, state)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def faults(rank: int) -> dict[str, str]:
    """What goes wrong on the last rank alone, as each rank hears of it."""
    join()
    torch.manual_seed(0)
    last, results = rank == dist.get_world_size() - 1, {}
    for name in ("central", "PerExample"):
        for split in ("data", "both", "directions"):
            results[f"{name} {split}"] = one_number(estimator(name, split), float("nan") if last else 1.0)
    results["few"] = one_number(estimator("central", "directions", 1), 1.0)
    results["step"] = one_number(estimator("central", "data"), 1.0, step=1 + last)
    results["seed"] = one_number(zo.ZerothOrder(seed=int(last)), 1.0)
    torch.manual_seed(int(last))
    results["diverged"] = one_number(estimator("central", "data"), 1.0, step=50)
    return results


def killed(rank: int, checkpoint: Path) -> str:
    """What the others hear when the last rank dies at step 70."""
    join()
    if rank == dist.get_world_size() - 1:
        torch.save(train(estimator("central", "directions"), slice(None), steps=range(70)), checkpoint)
        os._exit(9)
    try:
        train(estimator("central", "directions"), slice(None))
    except zo.ProcessLost as error:
        return str(error)
    return "nothing raised"


def resumed(rank: int, checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a run that goes on from that step."""
    join()
    start = torch.load(checkpoint)
    return train(estimator("central", "directions"), slice(None), steps=range(70, STEPS), start=start)
