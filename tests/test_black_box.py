import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zo_lightning import (
    Backprop,
    BlackBox,
    CentralDifference,
    EstimatedGradient,
    EvaluationFailed,
    ForwardDifference,
    ForwardGradient,
    GradientFree,
    PerExample,
    ZerothOrder,
)
from zo_lightning.black_box import to_numpy


def problem() -> tuple[nn.Module, Callable[[], Tensor], Callable[[np.ndarray], float]]:
    """A net, its output, and a loss of the output in NumPy."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(8, 3)
    return net, lambda: net(x), lambda output: float(np.square(output - 1).mean())


def test_tensors_go_in_as_arrays_of_their_own() -> None:
    weight = torch.ones(2, requires_grad=True)
    seen: list[Any] = []

    def function(candidate: Any) -> float:
        seen.append(candidate)
        candidate["x"][0] += 5
        return 2.5

    loss = BlackBox(function)({"x": weight, "y": [weight.bfloat16(), 3, "name"]})
    assert isinstance(loss, Tensor) and loss.item() == 2.5
    assert torch.equal(weight, torch.ones(2))
    x, (y, number, name) = seen[0]["x"], seen[0]["y"]
    assert type(x) is np.ndarray and x.dtype == np.float32 and y.dtype == np.float32 and (number, name) == (3, "name")


def test_one_that_fails_once_is_asked_again() -> None:
    calls = 0

    def function(candidate: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ConnectionError("reset by peer")
        return float(candidate.sum())

    net, front, _ = problem()
    box = BlackBox(function, retries=1)
    ZerothOrder(seed=0).backward(lambda: box(front()), net, 0)
    assert calls == 3, "two points and one repetition"


@pytest.mark.parametrize(
    ("box", "named"),
    [
        ({}, "candidate 1 of 1"),
        ({"workers": 3}, "candidate 1 of 4"),
        ({"batched": True}, "all 4 candidates"),
        ({"retries": 0, "workers": 2}, "candidate 1 of 4"),
    ],
)
def test_one_that_fails_always_is_named_and_leaves_everything_as_it_was(box: dict[str, Any], named: str) -> None:
    def simulator(candidate: Any) -> float:
        raise OSError("no such host")

    net, front, _ = problem()
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    attempts = box.get("retries", 2) + 1
    text = f"simulator gave no loss for {named} in {attempts} attempts, the last one: OSError: no such host"
    with pytest.raises(EvaluationFailed, match=text) as raised:
        ZerothOrder(samples=2, seed=0).backward(BlackBox(simulator, **box).after(front), net, 0)
    assert isinstance(raised.value.__cause__, OSError)
    for p, start in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, start) and p.grad is not None and bool((p.grad == 1).all())


def test_one_that_takes_too_long_has_failed() -> None:
    release = threading.Event()
    began = time.monotonic()
    with pytest.raises(EvaluationFailed, match="in 2 attempts, the last one: TimeoutError: no answer within 0.05 s"):
        BlackBox(lambda candidate: release.wait(30), retries=1, timeout=0.05)(torch.ones(1))
    assert time.monotonic() - began < 20
    release.set()
    assert BlackBox(lambda candidate: 1.0, timeout=30)(torch.ones(1)).item() == 1.0
    with pytest.raises(EvaluationFailed, match="ValueError: broken"):
        BlackBox(_broken, timeout=30)(torch.ones(1))


def _broken(candidate: Any) -> float:
    raise ValueError("broken")


def test_workers_are_at_work_at_the_same_time() -> None:
    both = threading.Barrier(2)  # which no one passes alone

    def function(candidate: np.ndarray) -> float:
        both.wait(timeout=30)
        return float(candidate.sum())

    net, front, _ = problem()
    loss = BlackBox(function, retries=0, workers=2).after(front)
    ZerothOrder(samples=3, seed=0).backward(loss, net, 0)
    assert all(p.grad is not None for p in net.parameters())


STENCILS = [CentralDifference(1e-2), ForwardDifference(1e-2)]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("stencil", STENCILS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("many", [{"workers": 3}, {"batched": True}], ids=str)
def test_all_points_at_once_give_what_one_after_the_other_gives(many: dict[str, Any], stencil: Any, lean: bool) -> None:
    ends = []
    for together in (False, True):
        net, front, function = problem()
        optimizer, estimator = torch.optim.SGD(net.parameters(), 0.1), ZerothOrder(stencil=stencil, samples=3, seed=0)
        state, calls, value = estimator.init(net), [], torch.zeros(())

        def outside(given: Any, function: Any = function, calls: Any = calls) -> Any:
            calls.append(given)
            return [function(one) for one in given] if isinstance(given, list) else function(given)

        loss = BlackBox(outside, **many).after(front) if together else lambda f=function, g=front: f(to_numpy(g()))
        for step in range(3):
            if lean:
                value = estimator.update(optimizer, loss, net, step, state)
            else:
                value = estimator.backward(loss, net, step, state)
                optimizer.step()
                optimizer.zero_grad()
        ends.append([value, *net.parameters()])
        if together:
            points = 3 * 2 if isinstance(stencil, CentralDifference) else 3 + 1
            assert len(calls) == (3 if "batched" in many else 3 * points)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_weight_that_the_front_reads_as_numpy_is_moved_for_every_point() -> None:
    """The first pass, which finds that out, is repeated: its output must not count twice."""
    weight = nn.Linear(2, 1, bias=False)
    memory = weight.weight.detach().numpy()
    loss = BlackBox(lambda candidates: [float(c.sum()) for c in candidates], batched=True).after(lambda: memory.copy())
    ZerothOrder(samples=20, seed=0).backward(loss, weight, 0)
    assert weight.weight.grad is not None
    # The mean of 20 u <u, 1>, whose expectation is 1 and whose variance is at most 3 d = 6: five of its deviations.
    assert (weight.weight.grad - 1).abs().max() < 5 * (6 / 20) ** 0.5


def test_random_numbers_of_one_worker_are_those_of_the_step() -> None:
    net, front, function = problem()
    drawn: list[float] = []

    def noisy(output: np.ndarray) -> float:
        drawn.append(np.random.rand())
        return function(output)

    ZerothOrder(samples=2, seed=0).backward(BlackBox(noisy).after(front), net, 0)
    assert len(drawn) == 4 and len(set(drawn)) == 1


def test_losses_of_examples_serve_per_example() -> None:
    net, front, _ = problem()
    box = BlackBox(lambda output: np.square(output - 1).mean(1))
    estimator = PerExample(seed=0)
    estimator.backward(box.after(front), net, 0, estimator.init(net))
    outside = [p.grad for p in net.parameters()]
    net, front, _ = problem()
    estimator = PerExample(loss_gradient="values", seed=0)
    estimator.backward(lambda: (front() - 1).square().mean(1), net, 0, estimator.init(net))
    for grad, p in zip(outside, net.parameters(), strict=True):
        # Rounding of float32, 1e-7, over twice the step 1e-2, and the outputs' sums of a few terms of order 1.
        assert grad is not None and p.grad is not None and torch.allclose(grad, p.grad, atol=1e-4)


def test_weights_that_numpy_reads_move_for_all_examples_alike() -> None:
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    for form in (lambda w: w.detach().numpy(), lambda w: np.array(w.tolist(), np.float32)):
        w = torch.ones(3, requires_grad=True)
        estimator = PerExample(samples=30, seed=0)
        estimator.backward(lambda w=w, form=form: np.square(x @ form(w)), w, 0, estimator.init(w))
        exact = 2 * torch.from_numpy(x.T @ (x.sum(1) / 8))
        assert w.grad is not None and torch.cosine_similarity(w.grad, exact, 0) > 0.8


def test_per_example_says_that_it_sees_no_weight() -> None:
    w = torch.ones(3, requires_grad=True)
    memory = w.detach().numpy()
    estimator = PerExample(seed=0)
    with pytest.raises(ValueError, match="PerExample sees no use of 0 or another weight"):
        estimator.backward(lambda: np.square(memory), w, 0, estimator.init(w))


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient(seed=0)])
def test_derivatives_do_not_go_through_a_black_box(estimator: Any) -> None:
    net, front, function = problem()
    with pytest.raises(ValueError, match="ZerothOrder needs values alone"):
        estimator.backward(BlackBox(function).after(front), net, 0)


class Lit(LightningModule):
    """A module whose loss is computed elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.box = BlackBox(lambda output: float(np.square(output - 1).mean()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.box(self.net(batch[0]))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class ZOLit(EstimatedGradient, Lit):
    estimator = ZerothOrder(samples=4, seed=0)


@pytest.mark.parametrize("mixin", [False, True])
def test_a_training_step_may_return_its_loss(mixin: bool) -> None:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    module = ZOLit() if mixin else Lit()
    before = module.box(module.net(x)).item()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[] if mixin else [GradientFree(ZOLit.estimator)],
    )
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8))
    assert module.box(module.net(x)).item() < before / 2


def test_a_batched_box_returns_one_loss_for_each_candidate() -> None:
    net, front, _ = problem()
    loss = BlackBox(lambda candidates: [1.0], batched=True).after(front)
    with pytest.raises(ValueError, match="one loss for each of 2 candidates, got 1"):
        ZerothOrder(seed=0).backward(loss, net, 0)
    with pytest.raises(ValueError, match="got a float"):
        BlackBox(lambda candidates: 1.0, batched=True)(torch.ones(1))
    assert BlackBox(lambda candidates: np.array([[1.0, 2.0]]), batched=True)(torch.ones(1)).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"timeout": 0}, "timeout must be more than 0 seconds, or None, got 0"),
        ({"batched": True, "workers": 2}, "calls the function once for all candidates"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BlackBox(float, **arguments)
