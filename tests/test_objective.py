import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zo_lightning.directions import Rademacher
from zo_lightning.estimators import ZerothOrder
from zo_lightning.objective import NonFiniteLoss, Objective


def test_commit_leaves_what_one_forward_pass_would() -> None:
    x = torch.randn(8, 3)
    probed, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    objective = Objective(lambda: probed(x).sum(), probed)
    objective()
    objective()
    assert probed.num_batches_tracked is not None and probed.num_batches_tracked.item() == 0
    objective.commit()
    plain(x)
    assert all(torch.equal(a, b) for a, b in zip(probed.buffers(), plain.buffers(), strict=True))


def test_a_replaced_buffer_comes_back() -> None:
    module: Any = nn.Module()
    module.register_buffer("count", torch.zeros(()))

    def loss() -> torch.Tensor:
        module.count = module.count + 1
        return module.count * 1.0

    objective = Objective(loss, module)
    assert [objective(), objective()] == [1.0, 1.0]
    assert module.count.item() == 0


def test_settings_that_drown_a_difference_are_off_during_a_probe_only() -> None:
    torch.backends.cudnn.allow_tf32 = True
    seen: list[bool] = []

    def loss() -> torch.Tensor:
        seen.append(bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32))
        return torch.zeros(())

    Objective(loss, nn.Linear(1, 1))()
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32


def test_autocast_sees_the_perturbed_weights() -> None:
    """Autocast caches its casts of the weights: from a stale cache every finite difference would be exactly 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
    x = torch.randn(64, 20)
    slopes = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(10):
            net.zero_grad()
            ZerothOrder(seed=0).backward(lambda: F.mse_loss(net(x).float(), torch.ones(64, 1)), net, step)
            slopes.append(next(net.parameters()).grad)
    assert all(slope is not None and slope.abs().max() > 0 for slope in slopes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_loss(value: float) -> None:
    with pytest.raises(NonFiniteLoss, match=f"the loss is {value}"):
        Objective(lambda: torch.tensor(value), nn.Linear(1, 1))()


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (torch.zeros(3, 1), r"shape \(3, 1\)"),
        (np.zeros((3, 1)), r"shape \(3, 1\)"),
        (np.zeros(0), r"shape \(0,\)"),
        (np.array(["a"]), "ndarray"),
        (None, "NoneType"),
        ([1.0], "list"),
        (1j, "complex"),
    ],
)
def test_loss_must_be_a_number_or_one_per_example(loss: object, shown: str) -> None:
    with pytest.raises(ValueError, match=f"of one element or one per example, got {shown}"):
        Objective(lambda: loss, nn.Linear(1, 1))()  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    "loss",
    [
        2,
        2.0,
        np.float32(2),
        np.float64(2),
        np.int64(2),
        np.array(2.0),
        np.array([2]),
        np.array([1.0, 3.0]),
        np.array([[2.0]]),
        torch.tensor([1.0, 3.0]),
    ],
    ids=lambda value: f"{type(value).__name__}{np.shape(value)}",
)
def test_loss_may_be_a_number_or_an_array(loss: object) -> None:
    assert Objective(lambda: loss, nn.Linear(1, 1))() == 2.0


@pytest.mark.parametrize("loss", [float("nan"), np.array([1.0, math.inf])])
def test_non_finite_numbers(loss: object) -> None:
    with pytest.raises(NonFiniteLoss):
        Objective(lambda: loss, nn.Linear(1, 1))()


def test_forward_passes_are_counted() -> None:
    net = nn.Linear(1, 1)
    objective = Objective(lambda: net(torch.ones(1, 1)).sum(), net)
    ZerothOrder(samples=3, seed=0).backward(objective, net, 0)
    assert objective.forward_passes == 6


def test_the_loss_of_each_example() -> None:
    objective = Objective(lambda: torch.tensor([1.0, 3.0]), nn.Linear(1, 1))
    assert objective() == 2.0
    with objective.probe():
        assert objective.losses().tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match=r"needs the loss of each example, .* got a tensor of shape \(\)"):
        Objective(lambda: torch.tensor(1.0), nn.Linear(1, 1)).losses()
    with pytest.raises(NonFiniteLoss):
        Objective(lambda: torch.tensor([1.0, float("nan")]), nn.Linear(1, 1)).losses()


class MomentumEncoder(nn.Module):
    """Frozen weights that follow the trained ones, within the training step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online, self.slow = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
        self.asked = 0

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        with torch.no_grad():
            for slow, online in zip(self.slow.parameters(), self.online.parameters(), strict=True):
                slow.data.mul_(0.9)
                slow.add_(online.detach(), alpha=0.1)
        return F.mse_loss(self.online(x), self.slow(x))


def test_frozen_weights_that_the_loss_moves_are_moved_once_a_step() -> None:
    x = torch.randn(4, 3)
    net, plain = MomentumEncoder(), MomentumEncoder()
    objective = Objective(lambda: net.loss(x), net)
    estimator, state = ZerothOrder(samples=3, seed=0), ZerothOrder().init(net)
    before = {name: p.clone() for name, p in net.named_parameters()}
    estimator.backward(objective, net, 0, state)
    assert net.asked == 6
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters()), (
        "as a probe finds them, it leaves them"
    )
    objective.commit()
    plain.loss(x)
    slow = zip(net.slow.parameters(), plain.slow.parameters(), strict=True)
    # The first probe saw weights that were displaced by 1e-3, of which a tenth went into the slow ones.
    assert all(
        torch.allclose(a, b, rtol=0, atol=5e-4) and not torch.equal(a, p)
        for (a, b), p in zip(slow, (before["slow.weight"], before["slow.bias"]), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_bit_identical_after_a_thousand_probes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    x, before = torch.randn(3, 5, dtype=dtype), [p.detach().clone() for p in net.parameters()]
    estimator, state = ZerothOrder(seed=0), ZerothOrder().init(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for step in range(500):
        estimator.backward(lambda: net(x).float().square().mean(), net, step, state)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_weights_whose_shapes_come_with_the_first_pass() -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    objective = Objective(lambda: net(torch.ones(3, 5)).sum(), net)
    ZerothOrder(seed=0).backward(objective, net, 0)
    assert [p.shape for p in net.parameters()] == [(4, 5), (4,), (2, 4), (2,)]
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert objective.forward_passes == 3


def test_complex_weights_are_trained_in_both_parts() -> None:
    torch.manual_seed(0)
    net: Any = nn.Module()
    net.w = nn.Parameter(torch.randn(2, dtype=torch.complex128))
    estimator, state = ZerothOrder(Rademacher(), samples=4, seed=0), ZerothOrder().init(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    target = torch.tensor([1 + 2j, -1j], dtype=torch.complex128)
    for step in range(300):
        estimator.backward(lambda: (net.w - target).abs().square().sum(), net, step, state)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(net.w.detach(), target, atol=1e-3)


def test_a_padding_row_stays_where_it_is() -> None:
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2))
    x, y = torch.tensor([[0, 1], [2, 0]]), torch.tensor([0, 1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(20):
        ZerothOrder(seed=0).backward(lambda: F.cross_entropy(net(x), y), net, step)
        optimizer.step()
        optimizer.zero_grad()
    assert not net[0].weight[0].any() and bool((net[0].weight[1:] != 0).all())  # type: ignore[index]


def test_a_buffer_that_is_an_expanded_view_is_left_alone() -> None:
    net = nn.Linear(2, 1)
    net.register_buffer("ones", torch.ones(1).expand(3))
    ZerothOrder(seed=0).backward(lambda: net(torch.ones(1, 2)).sum() * net.ones.sum(), net, 0)  # type: ignore[operator,union-attr]
    assert net.weight.grad is not None
