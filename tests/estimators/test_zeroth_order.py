import pytest
import torch
from torch import nn

from zo_lightning import (
    Backprop,
    CentralDifference,
    ForwardDifference,
    ForwardGradient,
    Gaussian,
    Rademacher,
    Sphere,
    ZerothOrder,
)
from zo_lightning.estimators import GradientEstimator
from zo_lightning.stencils import Stencil


def test_equals_a_plain_reference() -> None:
    """ĝ = (1/q) Σ (f(x + μu) − f(x − μu)) / 2μ · u, with nothing shared and nothing in place."""
    torch.manual_seed(0)
    net = nn.Linear(5, 2, dtype=torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64)
    params = list(net.parameters())

    def f(weight: torch.Tensor, bias: torch.Tensor) -> float:
        return float((x @ weight.T + bias).tanh().square().mean())

    expected = [torch.zeros_like(p) for p in params]
    for index in range(3):
        u = Sphere().draw(params, 11, 4, index).tensors()
        ends = [f(*(p.detach() + sign * 1e-2 * t for p, t in zip(params, u, strict=True))) for sign in (1, -1)]
        for e, t in zip(expected, u, strict=True):
            e += (ends[0] - ends[1]) / (2 * 1e-2) * t / 3
    ZerothOrder(Sphere(), CentralDifference(1e-2), samples=3, seed=11).backward(
        lambda: net(x).tanh().square().mean(), net, 4
    )
    for p, e in zip(params, expected, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, e, rtol=1e-9, atol=1e-12)


def test_the_error_of_a_central_difference_is_quadratic_in_mu() -> None:
    """Against the exact slope along the same direction, ten times the step gives a hundred times the error."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(7, 5, dtype=torch.float64)

    def slope(estimator: GradientEstimator) -> float:
        net.zero_grad()
        estimator.backward(lambda: net(x).exp().mean(), net, 0)
        return float(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm())

    exact = slope(ForwardGradient(Rademacher(), seed=0))
    errors = [abs(slope(ZerothOrder(Rademacher(), CentralDifference(mu), seed=0)) - exact) for mu in (1e-2, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    ("stencil", "samples", "b"),
    [(ForwardDifference(1e-6), 8, 2), (CentralDifference(1e-6), 1, 2), (CentralDifference(1e-6), 1, 9)],
)
def test_the_error_is_what_directions_and_examples_give(stencil: Stencil, samples: int, b: int) -> None:
    """E‖ĝ − g‖² = (d − 1)/q E‖G‖² + E‖G − g‖² with signs, G being the gradient of the batch."""
    torch.manual_seed(0)
    net = nn.Linear(9, 3).double()
    x, y = torch.randn(40, 9).double(), torch.randn(40, 3).double() + 1

    def gradient(chosen: torch.Tensor, estimator: GradientEstimator, step: int = 0) -> torch.Tensor:
        net.zero_grad()
        estimator.backward(lambda: (net(x[chosen]) - y[chosen]).square().mean(), net, step)
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    g = gradient(torch.arange(40), Backprop())
    each = torch.stack([gradient(torch.tensor([i]), Backprop()) for i in range(40)])
    spread = (each - g).square().sum(1).mean() / b
    expected = (len(g) - 1) / samples * (g.square().sum() + spread) + spread
    estimator = ZerothOrder(Rademacher(), stencil, samples=samples, seed=0)
    steps = 600
    draws = torch.stack([gradient(torch.randint(40, (b,)), estimator, step) for step in range(steps)])
    errors = (draws - g).square().sum(1)
    # Four standard errors of the mean, as the sample shows them; twice the directions would be seven or more away.
    assert (errors.mean() - expected).abs() < 4 * errors.std() / steps**0.5


def test_the_seed_is_that_of_torch_unless_given() -> None:
    net = nn.Linear(3, 1)

    def gradient(estimator: GradientEstimator, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        torch.rand(3)  # numbers drawn in between do not matter
        net.zero_grad()
        estimator.backward(lambda: net(torch.ones(1, 3)).sum(), net, 0)
        assert net.weight.grad is not None
        return net.weight.grad.clone()

    for make in (lambda seed: ZerothOrder(Gaussian(), seed=seed), lambda seed: ForwardGradient(seed=seed)):
        assert torch.equal(gradient(make(None), 3), gradient(make(3), 8))
        assert not torch.equal(gradient(make(None), 3), gradient(make(None), 8))
        assert torch.equal(gradient(make(5), 3), gradient(make(5), 8))


def test_loss_is_returned() -> None:
    net = nn.Linear(3, 1)
    loss = ZerothOrder(stencil=CentralDifference(1e-4), seed=0).backward(
        lambda: net(torch.ones(1, 3)).square().sum(), net, 0
    )
    assert loss.item() == pytest.approx(net(torch.ones(1, 3)).square().item(), rel=1e-3)
    assert not loss.requires_grad


@pytest.mark.parametrize("make", [ZerothOrder, ForwardGradient])
def test_bad_arguments(make: type[ZerothOrder]) -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        make(samples=0)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no parameter with requires_grad=True"):
        make(seed=0).backward(lambda: torch.zeros(()), frozen, 0)
