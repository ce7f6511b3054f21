"""What foreign code does that finite differences stumble over; docs/estimators.md has the list."""

import logging
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import zo_lightning as zo
from tests.modules.ways import batches, made, trainer

FORWARD_ONLY: dict[str, Any] = {
    "ZerothOrder": zo.ZerothOrder(samples=2, seed=0),
    "PerExample": zo.PerExample(seed=0),
    "ForwardGradient": zo.ForwardGradient(samples=2, seed=0),
}
forward_only = pytest.mark.parametrize("estimator", FORWARD_ONLY.values(), ids=FORWARD_ONLY)
X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])


class Lit(LightningModule):
    """Regression by a net that a subclass chooses; the losses of the examples beside their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = self.make()

    def make(self) -> nn.Module:
        return nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = F.mse_loss(self.net(batch[0]), batch[1], reduction="none").mean(1)
        return {"loss": losses.mean(), "losses": losses}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> Any:
        return batches()


def fitted(kind: type[LightningModule], estimator: Any, path: Path, *callbacks: Callback, **options: Any) -> Any:
    module, own = made(kind, "mixin", estimator)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    trainer(path, *own, *callbacks, **{"max_epochs": 1, **options}).fit(module)
    return module


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@forward_only
def test_random_numbers_of_python_and_numpy_in_the_loss(estimator: Any, tmp_path: Path) -> None:
    """They are the same at all points of a step, and other ones in the next step."""
    seen: list[tuple[float, float, float]] = []

    class Draws(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            output = super().training_step(batch, batch_idx)
            return {name: value + 1e3 * sum(seen[-1]) for name, value in output.items()}

    module = fitted(Draws, estimator, tmp_path, max_epochs=1)
    steps = set(seen)
    assert len(steps) == 8 and len(seen) > 8
    # Losses are up to 3,000 larger, rounded to 2e-4: a difference of other numbers would be 1e5 times a slope.
    assert all(bool((a - b).norm() < 10) for a, b in zip(weights(module), weights(Lit()), strict=True))


def test_what_a_training_step_appends_anywhere_grows_once_a_step(tmp_path: Path) -> None:
    """In containers of every kind, within others, and in those of the net."""

    class Counts(nn.Linear):
        seen: list[int]
        calls: int

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            self.calls += 1
            return super().forward(x)

    class Keeps(Lit):
        def make(self) -> nn.Module:
            net = Counts(4, 2)
            vars(net).update(seen=[], calls=0)
            return net

        def __init__(self) -> None:
            super().__init__()
            self.latest: deque[int] = deque(maxlen=100)
            self.by_name: defaultdict[str, list[int]] = defaultdict(list)
            self.counted: Counter[str] = Counter()
            self.ordered: OrderedDict[int, int] = OrderedDict()
            self.nested: dict[str, Any] = {"a": {"b": [0]}}
            self.numbers = np.zeros(1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.latest.append(batch_idx)
            self.by_name["x"].append(batch_idx)
            self.counted["x"] += 1
            self.ordered[len(self.ordered)] = batch_idx
            self.nested["a"]["b"][0] += 1
            self.numbers += 1
            return super().training_step(batch, batch_idx)

    module = fitted(Keeps, FORWARD_ONLY["ZerothOrder"], tmp_path)
    grown = {
        "deque": len(module.latest),
        "defaultdict": len(module.by_name["x"]),
        "Counter": module.counted["x"],
        "OrderedDict": len(module.ordered),
        "nested": module.nested["a"]["b"][0],
        "list of the net": len(module.net.seen),
        "number of the net": module.net.calls,
        "array": int(module.numbers[0]),
    }
    assert grown == dict.fromkeys(grown, 8)
    assert module.latest.maxlen == 100


@pytest.mark.parametrize("shape", [(6, 4, 3), (4, 4, 3), (4, 3)], ids=["[T, B, E]", "T = B", "[B, E]"])
def test_a_loss_that_couples_the_examples_is_named(shape: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(3, 5), torch.randn(shape)

    def contrastive() -> Tensor:
        z = net(x)
        z = F.normalize(z.mean(0) if z.ndim == 3 else z, dim=1)
        return F.cross_entropy(5 * z @ z.T, torch.arange(len(z)).roll(1), reduction="none")

    estimator = zo.PerExample(seed=0)
    state = estimator.init(net)
    with caplog.at_level(logging.WARNING):
        estimator.backward(contrastive, net, 0, state)
        estimator.backward(contrastive, net, 1, state)
    said = [one.getMessage() for one in caplog.records if "outputs of others" in one.getMessage()]
    assert len(said) == 1 and "take ZerothOrder" in said[0]


def test_a_loss_that_does_not_couple_them_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    with caplog.at_level(logging.WARNING):
        zo.PerExample(seed=0).backward(
            lambda: F.cross_entropy(net(X), Y, reduction="none"), net, 0, zo.PerExample().init(net)
        )
    assert not caplog.records


NETS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "old weight norm": lambda: torch.nn.utils.weight_norm(nn.Linear(4, 3)),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3)),
    "complex": lambda: Complex(),
    "recurrent": lambda: Recurrent(),
}


NO_FORWARD_DERIVATIVE = ("weight norm", "old weight norm", "spectral norm")
"""Of which PyTorch says so itself."""


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.w).abs()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unsqueeze(2))[1][0])


@forward_only
@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore")
def test_unusual_weights_are_trained_and_otherwise_left_alone(name: str, estimator: Any) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    state = estimator.init(net)
    x = X

    def loss() -> Tensor:
        return F.cross_entropy(net(x), Y, reduction="none")

    if isinstance(estimator, zo.ForwardGradient) and name in NO_FORWARD_DERIVATIVE:
        with pytest.raises(NotImplementedError, match="forward AD.*Take ZerothOrder: it needs values alone"):
            estimator.backward(loss, net, 0, state)
        return
    estimator.backward(loss, net, 0, state)  # gives lazy ones their shapes
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.zero_grad()
    estimator.backward(loss, net, 1, state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert any(bool(p.grad.abs().sum() > 0) for p in net.parameters() if p.grad is not None)


def test_the_power_iteration_of_spectral_norm_steps_once(tmp_path: Path) -> None:
    class Spectral(Lit):
        def make(self) -> nn.Module:
            net = parametrizations.spectral_norm(nn.Linear(4, 2))
            for buffer in net.buffers():  # far from where the iteration converges
                buffer.copy_(torch.eye(len(buffer))[0])
            return net

    def iterated(estimator: Any, steps: int) -> Tensor:
        module = fitted(Spectral, estimator, tmp_path, max_epochs=-1, max_steps=steps)
        return torch.cat([buffer.flatten() for buffer in module.buffers()])

    once, twice = iterated(zo.Backprop(), 1), iterated(zo.Backprop(), 2)
    asked = iterated(zo.ZerothOrder(samples=3, seed=0), 1)
    # The first of its six passes counts, which has the weights displaced by 1e-3 in each direction.
    assert torch.allclose(asked, once, atol=3e-2)
    assert not torch.allclose(twice, once, atol=5e-2)


def test_lazy_statistics_begin_where_ordinary_ones_do() -> None:
    ends = []
    for make in (lambda: nn.BatchNorm1d(4), nn.LazyBatchNorm1d):
        torch.manual_seed(0)
        net = nn.Sequential(make(), nn.Linear(4, 3))
        objective = zo.Objective(lambda net=net: F.cross_entropy(net(X), Y), net)
        estimator = zo.ZerothOrder(seed=0)
        estimator.backward(objective, net, 0, estimator.init(net))
        objective.commit()
        assert net.training
        ends.append([buffer.clone() for buffer in net.buffers()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize(
    "loss", [lambda net: 3, lambda net: net(X).sum().reshape(1, 1), lambda net: net(X).sum().half()]
)
def test_losses_that_are_numbers_in_another_form(loss: Callable[[nn.Module], Any]) -> None:
    net = nn.Linear(4, 2)
    assert zo.ZerothOrder(seed=0).backward(lambda: loss(net), net, 0).isfinite()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net: net(X), r"one element or one per example, got shape \(4, 2\)"),
        (lambda net: "text", "got str"),
        (lambda net: None, "got NoneType"),
        (lambda net: net(X).sum() * 1j, r"must be real, got torch\.complex64: take its modulus or its real part"),
        (lambda net: 1j, "got complex"),
    ],
    ids=["[B, C]", "str", "None", "complex", "complex of Python"],
)
def test_losses_that_are_no_number_are_refused(loss: Callable[[nn.Module], Any], message: str) -> None:
    net = nn.Linear(4, 2)
    before = weights(net)
    with pytest.raises(ValueError, match=message):
        zo.ZerothOrder(seed=0).backward(lambda: loss(net), net, 0)
    assert all(p.grad is None for p in net.parameters())
    assert all(map(torch.equal, weights(net), before))


@forward_only
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit, MemoryError])
def test_an_interruption_within_a_probe_leaves_everything_as_it_was(
    estimator: Any, error: type[BaseException], tmp_path: Path
) -> None:
    class Interrupted(Lit):
        asked = 0

        def make(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            type(self).asked += batch_idx == 3
            if self.asked >= 2:  # from the second pass of the fourth batch on: one that is counted is tried again
                raise error("stop")
            return output

    kept: dict[str, Any] = {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            kept.update(state={k: v.clone() for k, v in pl_module.state_dict().items()}, random=torch.get_rng_state())

    module, _ = made(Interrupted, "mixin", estimator)
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, Keep(), max_epochs=1).fit(module)
    after = module.state_dict()
    named = [name for name, value in kept["state"].items() if not torch.equal(value, after[name])]
    if not isinstance(estimator, zo.ForwardGradient):  # which asks once
        assert named == [] and torch.equal(torch.get_rng_state(), kept["random"])
    assert not any("weight" in name and "1." not in name for name in named)
