"""Weights rebuilt from a start and a log of steps are those of the run, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import (
    AdaMM,
    CentralDifference,
    ForwardDifference,
    ForwardGradient,
    LowRank,
    NormalizedSGD,
    PerExample,
    Rademacher,
    SignSGD,
    Sphere,
    ZerothOrder,
)
from zo_lightning.distributed import fingerprint
from zo_lightning.estimators import GradientEstimator
from zo_lightning.objective import Objective
from zo_lightning.perturbed.weights import Weights
from zo_lightning.replay.rebuild import FOLDER, STEPS, rebuild
from zo_lightning.replay.start import CannotReplay, Start, _checksum
from zo_lightning.step_log import Check, Settings, Step, StepLog

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.9)),
    "adamm": lambda p: AdaMM(p, lr=0.01),
    "sign_sgd": lambda p: SignSGD(p, lr=0.01),
    "normalized_sgd": lambda p: NormalizedSGD(p, lr=0.1),
    "groups": lambda p: torch.optim.SGD([{"params": p[:2], "lr": 0.2}, {"params": p[2:]}], lr=0.1),
}
ESTIMATORS: dict[str, GradientEstimator] = {
    "sphere": ZerothOrder(Sphere(), CentralDifference(1e-2), samples=2, seed=3),
    "signs": ZerothOrder(Rademacher(), ForwardDifference(1e-2), seed=3),
    "low_rank": ZerothOrder(LowRank(2), samples=3, seed=3),
    "forward_gradient": ForwardGradient(samples=2, seed=3),
}


class Net(nn.Module):
    """A net with a tied weight, a frozen one, a padding row, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 5)
        self.last.bias.data = self.last.bias.data.clone()
        self.shared = self.last
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(self.embedding(x).tanh()).tanh()) * self.scale


def train(
    folder: Path, estimator: GradientEstimator, make: Make, steps: int = 7, clip: tuple[float, str] | None = None
) -> list[dict[str, Tensor]]:
    """Train by hand, with a schedule that moves the momentum too, and log each step; return the weights after each."""
    net = Net()
    optimizer = make([p for p in net.parameters() if p.requires_grad])
    weights, state = Weights.of(net), estimator.init(net)
    Start.of(net, estimator, optimizer, clip).write(folder)
    log = StepLog(folder / STEPS)
    x = torch.randint(5, (6,))
    history = [{k: v.clone() for k, v in net.state_dict().items()}]
    for step in range(steps):
        objective = Objective(lambda: F.cross_entropy(net(x), x), net)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        if step == 3 and "momentum" in optimizer.param_groups[0]:
            for group in optimizer.param_groups:
                group["momentum"] = 0.5
            log.append(Settings(step, tuple({"momentum": 0.5} for _ in optimizer.param_groups)))
        estimate = estimator.estimate(objective, net, step, state)
        with torch.no_grad():
            for p, gradient in estimate.gradients:
                p.grad = gradient
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], clip[0])
        rates = tuple(group["lr"] for group in optimizer.param_groups)
        optimizer.step()
        optimizer.zero_grad()
        log.append(Step(step, float(estimate.loss), estimate.slopes, rates, estimator.mu))
        if step % 3 == 2:
            log.append(Check(step + 1, fingerprint(weights)))
        history.append({k: v.clone() for k, v in net.state_dict().items()})
    log.close()
    return history


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_any_step_is_rebuilt_bit_for_bit(tmp_path: Path, estimator: GradientEstimator, make: Make) -> None:
    history = train(tmp_path / FOLDER, estimator, make)
    for step in (0, 1, 5, 7):
        rebuilt = rebuild(tmp_path, step)
        assert rebuilt.step == step and set(rebuilt.tensors) == set(history[step])
        assert all(torch.equal(rebuilt.tensors[name], value) for name, value in history[step].items())
    assert rebuild(tmp_path).step == 7 and rebuild(tmp_path).checked == 6


def test_clipping_is_repeated(tmp_path: Path) -> None:
    history = train(tmp_path / FOLDER, ESTIMATORS["sphere"], OPTIMIZERS["sgd"], clip=(0.01, "norm"))
    rebuilt = rebuild(tmp_path)
    assert all(torch.equal(rebuilt.tensors[name], value) for name, value in history[-1].items())


def test_accumulated_batches_and_skipped_ones(tmp_path: Path) -> None:
    net, estimator = Net(), ESTIMATORS["sphere"]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    Start.of(net, estimator, optimizer).write(tmp_path)
    log, state = StepLog(tmp_path / STEPS), estimator.init(net)
    for step in range(2):
        for batch in range(3):
            x = torch.randint(5, (6,), generator=torch.Generator().manual_seed(batch))
            if batch == 1:
                log.append(Step(step, float("nan"), (), skipped=True, stepped=False))
                continue
            objective = Objective(lambda x=x: F.cross_entropy(net(x), x), net)
            estimate = estimator.estimate(objective, net, step, state)
            for p, gradient in estimate.gradients:
                p.grad = gradient * 0.5 if p.grad is None else p.grad.add_(gradient * 0.5)
            last = batch == 2
            log.append(
                Step(step, float(estimate.loss), estimate.slopes, (0.1,) if last else (), scale=0.5, stepped=last)
            )
        optimizer.step()
        optimizer.zero_grad()
    rebuilt = rebuild(tmp_path)
    assert rebuilt.step == 2
    assert all(torch.equal(rebuilt.tensors[name], value) for name, value in net.state_dict().items())


def test_a_torn_log_ends_at_its_last_whole_record(tmp_path: Path) -> None:
    history = train(tmp_path, ESTIMATORS["sphere"], OPTIMIZERS["sgd"])
    file = tmp_path / STEPS
    file.write_bytes(file.read_bytes()[:-3])
    rebuilt = rebuild(tmp_path)
    assert rebuilt.step == 6
    assert all(torch.equal(rebuilt.tensors[name], value) for name, value in history[6].items())
    with pytest.raises(CannotReplay, match="ends after step 6"):
        rebuild(tmp_path, 7)


def test_weights_that_something_else_has_moved_are_noticed(tmp_path: Path) -> None:
    train(tmp_path, ESTIMATORS["sphere"], OPTIMIZERS["sgd"], steps=2)
    log = StepLog(tmp_path / STEPS)
    log.append(Check(2, 12345))
    log.close()
    with pytest.raises(CannotReplay, match="after step 2 the weights are not those of the run"):
        rebuild(tmp_path)


def test_what_cannot_be_replayed_says_so(tmp_path: Path) -> None:
    net = Net()
    weights = [p for p in net.parameters() if p.requires_grad]

    class Own(torch.optim.SGD):
        pass

    with pytest.raises(CannotReplay, match="PerExample takes more than slopes"):
        Start.of(net, PerExample(), torch.optim.SGD(weights))
    with pytest.raises(CannotReplay, match=r"Own is none of torch\.optim"):
        Start.of(net, ZerothOrder(), Own(weights))
    with pytest.raises(CannotReplay, match="LBFGS asks for the loss several times"):
        Start.of(net, ZerothOrder(), torch.optim.LBFGS(weights))
    with pytest.raises(CannotReplay, match="train with the callback TrajectoryLog"):
        rebuild(tmp_path)


def test_a_log_names_only_optimizers_and_parts_of_estimators(tmp_path: Path) -> None:
    train(tmp_path, ESTIMATORS["sphere"], OPTIMIZERS["sgd"], steps=1)
    file = tmp_path / "start.json"
    text = file.read_text()

    def replaced(old: str, new: str) -> str:  # by someone who knows of the checksum
        settings = json.loads(text.replace(old, new))
        del settings["checksum"]
        return json.dumps({**settings, "checksum": _checksum(settings)})

    file.write_text(text.replace("torch.optim.sgd.SGD", "os.system"))
    with pytest.raises(CannotReplay, match=r"damaged: the checksum of start\.json is wrong"):
        rebuild(tmp_path)
    file.write_text(replaced("torch.optim.sgd.SGD", "os.system"))
    with pytest.raises(CannotReplay, match=r"'os\.system', which is none of"):
        rebuild(tmp_path)
    file.write_text(replaced('"Sphere"', '"Popen"'))
    with pytest.raises(CannotReplay, match="'Popen', which is none of"):
        rebuild(tmp_path)
    file.write_text(text[:100])
    with pytest.raises(CannotReplay, match="damaged"):
        rebuild(tmp_path)
