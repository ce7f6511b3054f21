"""Noise that patches of a convolution's output share: what it finds, and where it is used."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from zo_lightning.estimators.per_example.state import Layer
from zo_lightning.perturbed.layouts import FIRST

BATCH, PATCH = 8, 2


def problem(size: int = 8) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(2 * size * size, 3))
    net[3].requires_grad_(False)
    return net, torch.randn(BATCH, 1, size, size), torch.arange(BATCH) % 3


def test_the_slopes_find_the_mean_gradient_of_each_patch() -> None:
    net, x, y = problem()
    q = 1000
    estimator = zo.PerExample(samples=q, patch=PATCH, feedback=0, correction=1.0, seed=0)
    loss = estimator.backward(
        lambda: F.cross_entropy(net(x), y, reduction="none"), net, 0, state := estimator.init(net)
    )
    assert loss.isfinite() and state.layers["0.weight"].dims == 2 * (8 / PATCH) ** 2
    out = net[0](x)
    g = torch.autograd.grad(F.cross_entropy(net[1:](out), y), out, retain_graph=True)[0]
    mean = F.interpolate(F.avg_pool2d(g, PATCH), scale_factor=PATCH)
    weight = net[0].weight
    blurred, exact = (torch.autograd.grad(out, weight, by, retain_graph=True)[0].flatten() for by in (mean, g))
    assert weight.grad is not None
    found = weight.grad.flatten()
    # An example has 32 patches, whose noise leaves an error of about √(32 / q B) = 0.06 times the norm of the mean of
    # the examples' gradients, and as much more as they differ from one another: less than three times.
    assert float((found - blurred).norm() / blurred.norm()) < 3 * 0.06
    assert float((found - blurred).norm()) < float((found - exact).norm())


def test_patches_of_one_pixel_are_none() -> None:
    gradients = []
    for patch in (1, 8):  # on 5 x 5 pixels, a quarter of a side is one pixel
        net, x, y = problem(5)
        estimator = zo.PerExample(patch=patch, seed=0)
        estimator.backward(lambda: F.cross_entropy(net(x), y, reduction="none"), net, 0, estimator.init(net))  # noqa: B023
        assert net[0].weight.grad is not None
        gradients.append(net[0].weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("size", "sides"), [((32, 32), [4, 4]), ((10, 7), [2, 1]), ((16,), [4])])
def test_patches_are_at_most_a_quarter_of_each_side(size: tuple[int, ...], sides: list[int]) -> None:
    layer = Layer(False, 1.0, FIRST, False, False, False, "0.weight", patch=4)
    assert layer.sides((BATCH, 3, *size)) == sides


def test_a_side_need_not_be_a_multiple() -> None:
    net, x, y = problem(9)
    estimator = zo.PerExample(patch=2, seed=0)
    state = estimator.init(net)
    for step in range(2):
        loss = estimator.backward(lambda: F.cross_entropy(net(x), y, reduction="none"), net, step, state)
        assert math.isfinite(float(loss))
    assert state.layers["0.weight"].scale == 2
    assert net[0].weight.grad is not None and bool(net[0].weight.grad.any())


def test_a_patch_below_one_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match="patch must be at least 1, got 0"):
        zo.PerExample(patch=0)
