"""What shaped losses are, and what an estimate of them does not depend on."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from zo_lightning import CentralDifference, CentredRanks, ForwardDifference, Shaping, Standardised, ZerothOrder
from zo_lightning.perturbed.weights import Weights

SHAPINGS = pytest.mark.parametrize("shaping", [CentredRanks(), Standardised()])
STENCILS = pytest.mark.parametrize("stencil", [CentralDifference(1e-2), ForwardDifference(1e-2)])


def problem() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 2), torch.randn(16, 4), torch.randn(16, 2)


def test_ranks_are_centred_and_equal_losses_share_theirs() -> None:
    ranks = CentredRanks().shaped([(3.0, 1.0), (1e9, 2.0), (-5.0, 0.0)])
    assert [pytest.approx(along) for along in ranks] == [(0.3, -0.1), (0.5, 0.1), (-0.5, -0.3)]
    assert CentredRanks().shaped([(1.0, 2.0), (2.0, 3.0)]) == [(-0.5, 0.0), (0.0, 0.5)]
    assert CentredRanks().shaped([(1.0,)]) == [(0.0,)] and CentredRanks().shaped([(7.0,), (7.0,)]) == [(0.0,), (0.0,)]


def test_a_shared_loss_is_no_sample_of_the_spread() -> None:
    shared = Standardised().shaped([(10.0, 1.0), (10.0, 3.0)])
    assert shared == [(10.0, 1.0), (10.0, 3.0)]  # 1 and 3 have the standard deviation 1
    assert Standardised().shaped([(4.0, 0.0), (0.0, 4.0)]) == [(2.0, 0.0), (0.0, 2.0)]
    assert Standardised().shaped([(2.0, 2.0), (2.0, 2.0)]) == [(2.0, 2.0), (2.0, 2.0)]


@STENCILS
def test_fzoo(stencil: zo.Stencil) -> None:
    """The slopes are those of the losses over the losses' spread."""
    net, x, y = problem()
    plain, shaped = (ZerothOrder(stencil=stencil, samples=5, seed=1, shaping=s) for s in (None, Standardised()))
    objectives = [zo.Objective(lambda: F.mse_loss(net(x), y), net) for _ in range(2)]
    one, other = (
        estimator.estimate(objective, net, 0, estimator.init(net))
        for estimator, objective in zip((plain, shaped), objectives, strict=True)
    )
    losses = objectives[0].values[1 if 0.0 in stencil.offsets else 0 :]
    spread = torch.tensor(losses, dtype=torch.float64).std(correction=0).item()
    assert other.slopes == pytest.approx([slope / spread for slope in one.slopes])
    assert float(one.loss) == float(other.loss), "the loss itself is not shaped"
    for (_, g), (_, h) in zip(one.gradients, other.gradients, strict=True):
        assert torch.allclose(g / spread, h)
    assert objectives[0].forward_passes == objectives[1].forward_passes


@STENCILS
def test_ranks_do_not_see_an_increasing_function_of_the_loss(stencil: zo.Stencil) -> None:
    net, x, y = problem()
    estimator = ZerothOrder(stencil=stencil, samples=6, seed=1, shaping=CentredRanks())
    estimates = []
    functions: list[Callable[[Tensor], Tensor]] = [lambda loss: loss, lambda loss: loss.exp(), lambda loss: loss**3]
    for function in functions:
        net.zero_grad()

        def loss(of: Callable[[Tensor], Tensor] = function) -> Tensor:
            return of(F.mse_loss(net(x), y).double())

        estimator.backward(loss, net, 0)
        estimates.append([p.grad for p in net.parameters()])
    for others in estimates[1:]:
        assert all(torch.equal(g, h) for g, h in zip(estimates[0], others, strict=True) if g is not None)


@SHAPINGS
@pytest.mark.parametrize("evaluation", [zo.OneByOne(), zo.Batched()])
def test_a_step_descends_and_its_slopes_rebuild_it(shaping: Shaping, evaluation: zo.Evaluation) -> None:
    net, x, y = problem()
    estimator = ZerothOrder(samples=16, seed=0, shaping=shaping, evaluation=evaluation)
    optimizer = zo.NormalizedSGD(net.parameters(), lr=0.02)
    state = estimator.init(net)
    start = F.mse_loss(net(x), y).item()
    for step in range(60):
        estimate = estimator.estimate(zo.Objective(lambda: F.mse_loss(net(x), y), net), net, step, state)
        weights = Weights.of(net)
        again = estimator.replay(weights, step, float(estimate.loss), estimate.slopes, state)
        for (p, g), (_, h) in zip([(p, g.clone()) for p, g in estimate.gradients], again.gradients, strict=True):
            assert torch.equal(g, h)
            p.grad = g
        optimizer.step()
    inputs = F.pad(x, (0, 1), value=1.0)
    floor = F.mse_loss(inputs @ torch.linalg.lstsq(inputs, y).solution, y).item()
    assert F.mse_loss(net(x), y).item() - floor < 0.1 * (start - floor)


def test_shaping_needs_something_to_compare() -> None:
    with pytest.raises(ValueError, match="samples of 2 or more, got 1"):
        ZerothOrder(shaping=CentredRanks())


def test_a_loss_that_is_not_finite_is_refused_before_ranks_hide_it() -> None:
    net, x, _ = problem()
    losses = iter([1.0, 2.0, math.inf, 3.0])

    def loss() -> Tensor:
        return 0.0 * net(x).sum() + next(losses)

    with pytest.raises(zo.NonFiniteLoss):
        ZerothOrder(samples=2, seed=0, shaping=CentredRanks()).backward(loss, net, 0)


def test_processes_that_split_directions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = problem()
    monkeypatch.setattr(zo.Distributed, "own", lambda self, samples: range(samples)[::2])
    with pytest.raises(ValueError, match="compared within one process"):
        ZerothOrder(samples=4, seed=0, shaping=CentredRanks()).backward(lambda: F.mse_loss(net(x), y), net, 0)
