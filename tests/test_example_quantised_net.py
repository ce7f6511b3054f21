"""The example of a net that backpropagation cannot train."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import zo_lightning as zo
from examples import quantised_net
from examples.quantised_net import STEP, QuantisedNet, handing_on
from examples.results import read


def test_the_smoke_form_learns_by_forward_passes_what_backpropagation_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["quantised_net", "--smoke", "--out", str(tmp_path)])
    quantised_net.main()
    results = {result.method: result for result in read(tmp_path / "quantised_net.csv")}
    assert list(results) == list(quantised_net.METHODS)
    assert results["backpropagation"].after == results["backpropagation"].before
    # Chance is 0.1, with a standard deviation of 0.016 on 364 images.
    assert results["ZerothOrder"].after > 0.25
    assert results["PerExample"].after > 0.25
    assert all(result.gflops > 0 for result in results.values())
    assert (tmp_path / "quantised_net.png").stat().st_size > 0


@pytest.mark.parametrize(("straight_through", "trained"), [("nothing", 0), ("weights", 2), ("all", 4)])
def test_what_hands_gradients_on(straight_through: str, trained: int) -> None:
    """The output layer's weight and bias stand behind no activation."""
    torch.manual_seed(0)
    net = QuantisedNet(straight_through)
    logits = net(torch.rand(8, 1, 28, 28))
    if logits.requires_grad:
        logits.square().sum().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in net.parameters()) == trained


def test_values_are_quantised_whatever_hands_gradients_on() -> None:
    torch.manual_seed(0)
    nets = [QuantisedNet(where) for where in ("nothing", "weights", "all")]
    for net in nets:
        net.load_state_dict(nets[0].state_dict())
    images = torch.rand(8, 1, 28, 28)
    logits = [net(images) for net in nets]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    levels = nets[1].int8(torch.linspace(-1, 1, 999)) / STEP
    assert torch.equal(levels, levels.round())
    assert (levels.min(), levels.max()) == (-128, 127)
    assert torch.equal(handing_on(torch.ones(3), torch.full((3,), 0.1)), torch.ones(3))


def test_a_mu_far_below_the_rounding_step_finds_no_slope() -> None:
    """Losses are equal bit for bit where no weight comes to round otherwise."""
    torch.manual_seed(0)
    net = QuantisedNet("nothing")
    for p in net.parameters():
        p.data = net.int8(p.data) + 0.0
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    for mu, finds in ((0.4 * STEP, False), (STEP, True)):
        net.zero_grad()
        estimator = zo.ZerothOrder(stencil=zo.ForwardDifference(mu), samples=4, seed=0)
        estimator.backward(lambda: F.cross_entropy(net(images), labels), net, 0)
        assert all(p.grad is not None and bool(p.grad.any()) is finds for p in net.parameters())


@pytest.mark.parametrize(("straight_through", "trained"), [("nothing", 0), ("weights", 4)])
def test_per_example_needs_the_rule_for_rounded_weights_alone(straight_through: str, trained: int) -> None:
    """A layer's own adjoint leads through the rounding of its weights; none leads through the signs."""
    torch.manual_seed(0)
    net, images, labels = QuantisedNet(straight_through), torch.rand(8, 1, 28, 28), torch.arange(8)
    estimator = zo.PerExample(zo.CentralDifference(1.0), seed=0)
    state = estimator.init(net)
    for step in range(2):  # the first one finds the output, and the second one uses its maps
        net.zero_grad()
        estimator.backward(lambda: F.cross_entropy(net(images), labels, reduction="none"), net, step, state)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in net.parameters()) == trained
