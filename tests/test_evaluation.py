from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zo_lightning.directions import Direction, Gaussian
from zo_lightning.estimators import ZerothOrder
from zo_lightning.evaluation import OneByOne
from zo_lightning.objective import NonFiniteLoss, Objective
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights
from zo_lightning.stencils import CentralDifference, ForwardDifference, Stencil


def drawn(weights: Weights, n: int, lean: bool) -> Iterator[Direction]:
    for index in range(n):
        direction = Gaussian().draw(weights, 1, 2, index)
        yield direction if lean else direction.hold()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("stencil", [ForwardDifference(0.5), CentralDifference(0.5)])
def test_losses_are_those_at_the_stencils_points(lean: bool, stencil: Stencil) -> None:
    net = nn.Linear(3, 1, dtype=torch.float64)
    weights = Weights.of(net)
    origin = [p.detach().clone() for p in weights]
    factors = [torch.arange(p.numel(), dtype=p.dtype).view(p.shape) + 1 for p in weights]
    objective = Objective(lambda: sum((f * p).sum() for f, p in zip(factors, weights, strict=True)), net)  # type: ignore[arg-type,return-value]
    for direction, losses in OneByOne().probes(objective, weights, drawn(weights, 3, lean), stencil, State()):
        u = [direction[k] for k in range(2)]
        for offset, loss in zip(stencil.offsets, losses, strict=True):
            expected = sum(
                float((f * (p + offset * 0.5 * t)).sum()) for f, p, t in zip(factors, origin, u, strict=True)
            )
            assert loss == pytest.approx(expected, rel=1e-12)


def test_the_loss_at_the_weights_themselves_is_asked_once() -> None:
    net = nn.Linear(1, 1)
    objective = Objective(lambda: net(torch.ones(1, 1)).sum(), net)
    weights = Weights.of(net)
    assert len(list(OneByOne().probes(objective, weights, drawn(weights, 4, False), ForwardDifference(), State()))) == 4
    assert objective.forward_passes == 5


@pytest.mark.parametrize("stencil", [CentralDifference(1e-2), ForwardDifference(1e-2)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_losses_that_are_read_together_are_those_read_at_once(
    stencil: Stencil, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the passes of a direction are asked first and their losses read then."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    kept = torch.zeros(())  # a loss that every pass writes into the same tensor

    def loss() -> torch.Tensor:
        value = F.cross_entropy(net(x), y, reduction=reduction)
        return value if reduction == "none" else kept.copy_(value)

    found = []
    for at_once in (True, False):
        monkeypatch.setattr("zo_lightning.objective._is_read_at_once", lambda loss, now=at_once: now)
        objective = Objective(loss, net)
        estimate = ZerothOrder(stencil=stencil, samples=3, seed=0).estimate(objective, net, 0, State())
        found.append((estimate.slopes, objective.values, objective.forward_passes))
    assert found[0] == found[1] and len(set(found[0][1])) > 3


def test_a_loss_read_later_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_lightning.objective._is_read_at_once", lambda loss: False)
    net = nn.Linear(2, 1)
    with pytest.raises(NonFiniteLoss):
        ZerothOrder(seed=0).backward(lambda: net(torch.ones(2)).sum() * torch.nan, net, 0)


def test_a_step_reads_each_loss_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of a number would wait for a GPU: two passes, and nothing else, for signs."""
    net, x = nn.Linear(20, 30), torch.randn(8, 20)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with Reads() as reads:
        ZerothOrder(seed=0).backward(lambda: net(x).square().mean(), net, 0)
        optimizer.step()
    assert reads.count == 2
    with Reads() as lean:
        optimizer.zero_grad()
        ZerothOrder(seed=0).update(optimizer, lambda: net(x).square().mean(), net, 0)
    assert lean.count == 2
