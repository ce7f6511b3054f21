"""Exact slopes: through attention, in modules with two names, counted as what they cost."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import Backprop, ForwardGradient, Objective, Rademacher, ZerothOrder


def attention() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(3, 5, 8)


@pytest.mark.parametrize("train", [True, False])
def test_the_slope_through_attention_is_that_of_backpropagation(train: bool) -> None:
    net, x = attention()
    net.train(train).double()
    x = x.double()
    Backprop().backward(lambda: net(x).square().mean(), net, 0)
    gradient = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    ForwardGradient(Rademacher(), seed=0).backward(lambda: net(x).square().mean(), net, 0)
    u = Rademacher().draw(list(net.parameters()), 0, 0, 0).tensors()
    slope = sum(float((gradient[name] * t).sum()) for (name, _), t in zip(net.named_parameters(), u, strict=True))
    for p, t in zip(net.parameters(), u, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, slope * t, rtol=1e-9)


def test_a_direction_counts_two_passes() -> None:
    net, x = attention()
    objective = Objective(lambda: net(x).square().mean(), net)
    ForwardGradient(samples=3, seed=0).backward(objective, net, 0)
    assert objective.forward_passes == 6


def test_a_loss_that_drops_the_tangents_is_refused() -> None:
    net = nn.Linear(2, 2)
    x = torch.randn(3, 2)

    def loss() -> Tensor:
        return F.mse_loss(torch.from_numpy(net(x).detach().numpy()), torch.ones(3, 2))

    with pytest.raises(ValueError, match="no tangent reaches the loss: .* ZerothOrder needs values alone"):
        ForwardGradient(seed=0).backward(loss, net, 0)
    assert net.weight.grad is None
    ZerothOrder(seed=0).backward(loss, net, 0)
    assert net.weight.grad is not None and net.weight.grad.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused() -> None:
    net = nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Linear(4, 1))
    with pytest.raises(ValueError, match="cannot see through TorchScript"):
        ForwardGradient(seed=0).backward(lambda: net(torch.ones(2, 3)).sum(), net, 0)
