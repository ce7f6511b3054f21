import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
    ("loss", "shown"), [(torch.zeros(3, 1), r"shape \(3, 1\)"), (None, "NoneType"), (1.0, "float")]
)
def test_loss_must_be_a_scalar_tensor(loss: object, shown: str) -> None:
    with pytest.raises(ValueError, match=f"a tensor with one element, or with one per example, got {shown}"):
        Objective(lambda: loss, nn.Linear(1, 1))()  # type: ignore[arg-type,return-value]


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
