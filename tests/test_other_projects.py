"""Other people's projects: Fabric with every estimator. tests/test_docs.py runs the page that tells them how."""

from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from zo_lightning import Backprop, ForwardGradient, GradientEstimator, PerExample, ZerothOrder


class TwoNames(nn.Module):
    """A module reachable by two names, whose second layer is tied to the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.same = self.inner
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.inner.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tied(self.same(self.inner(x).tanh()).tanh()).tanh())


@pytest.mark.parametrize(
    "estimator",
    [Backprop(), ZerothOrder(samples=2, seed=0), ForwardGradient(samples=2, seed=0), PerExample(seed=0)],
    ids=lambda e: type(e).__name__,
)
def test_fabric_trains_as_plain_pytorch_and_keeps_every_parameter(estimator: GradientEstimator) -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    ended = []
    for with_fabric in (False, True):
        net = TwoNames()
        held = dict(net.named_parameters(remove_duplicate=False))
        model: Any = net
        optimizer: Any = torch.optim.SGD(net.parameters(), 0.05)
        if with_fabric:
            model, optimizer = Fabric(accelerator="cpu", devices=1).setup(net, optimizer)
        state = estimator.init(model)
        reduction = "none" if estimator.needs_example_losses else "mean"
        for step in range(5):
            optimizer.zero_grad()
            estimator.backward(lambda m=model, r=reduction: F.cross_entropy(m(x), y, reduction=r), model, step, state)
            optimizer.step()
        after = dict(net.named_parameters(remove_duplicate=False))
        assert all(after[name] is p and isinstance(p, nn.Parameter) and p.requires_grad for name, p in held.items())
        assert after.keys() == held.keys()
        ended.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ended, strict=True))
    start = TwoNames().head.weight
    assert not torch.equal(ended[1][-2], start)
