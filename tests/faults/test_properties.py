"""What holds for every estimator, stencil, net and dtype, on nets that hypothesis makes up."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from tests.faults import LONG
from zo_lightning.estimators.weight_space import WeightSpace
from zo_lightning.objective import Objective
from zo_lightning.perturbed.weights import Weights

EXAMPLES, BATCH = (400, 4) if LONG else (25, 4)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Net(nn.Module):
    """A few layers that hypothesis chooses: with BatchNorm's buffers, dropout, tied and frozen weights among them."""

    def __init__(self, kinds: list[str], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for kind in kinds:
            layers.append(nn.Linear(width, width))
            if kind == "tied" and len(layers) > 1:
                layers[-1].weight = next(one.weight for one in layers if isinstance(one, nn.Linear))
            elif kind == "frozen":
                layers[-1].requires_grad_(False)
            else:
                layers.append({"norm": nn.BatchNorm1d(width), "dropout": nn.Dropout(0.3)}.get(kind, nn.Tanh()))
        self.layers = nn.Sequential(*layers, nn.Linear(width, 3)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


nets = st.builds(
    Net,
    st.lists(st.sampled_from(["tanh", "norm", "dropout", "tied", "frozen"]), max_size=4),
    st.integers(1, 6),
    st.sampled_from(DTYPES),
)
stencils = st.one_of(
    st.builds(zo.CentralDifference, st.sampled_from([1e-3, 0.1])),
    st.builds(zo.ForwardDifference, st.sampled_from([1e-3, 0.1])),
)
directions = st.sampled_from([zo.Sphere(), zo.Gaussian(), zo.Rademacher(), zo.Coordinate(), zo.LowRank(2)])
samples, seeds = st.integers(1, 3), st.integers(0, 2**31)
weight_space = st.one_of(
    st.builds(zo.ZerothOrder, directions, stencils, samples=samples, seed=seeds),
    st.builds(zo.ForwardGradient, directions, samples=samples, seed=seeds),
)
per_example = st.builds(zo.PerExample, stencils, samples=samples, seed=seeds)
estimators = st.one_of(weight_space, per_example)
few = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def loss_of(net: Net) -> Callable[[], Tensor]:
    """A loss for each example that also draws from all three generators."""
    p = next(net.parameters())
    x = torch.randn(BATCH, net.layers[-1].in_features, generator=torch.Generator().manual_seed(1)).to(p)  # type: ignore[union-attr,arg-type]

    def loss() -> Tensor:
        noise = random.random() + np.random.rand() + torch.rand(())
        return F.cross_entropy(net(x).float(), torch.arange(BATCH) % 3, reduction="none") * (1 + 0.1 * noise)

    return loss


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]


@given(nets, estimators, st.integers(0, 1000))
@few
def test_weights_buffers_and_random_numbers_are_untouched_and_the_estimate_is_finite(
    net: Net, estimator: Any, step: int
) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parameters, numbers = list(net.parameters()), states()
    loss = estimator.backward(loss_of(net), net, step, estimator.init(net))
    assert states() == numbers
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert bool(loss.isfinite()) and loss.ndim == 0
    for p in parameters:
        assert (p.grad is not None) == p.requires_grad
        if p.grad is not None:
            assert p.grad.dtype == p.dtype and p.grad.shape == p.shape and bool(p.grad.isfinite().all())


@given(nets, estimators)
@few
def test_grad_accumulates(net: Net, estimator: Any) -> None:
    loss = loss_of(net)
    found = []
    for _ in range(2):
        net.zero_grad()
        estimator.backward(loss, net, 3, estimator.init(net))
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))  # the same step is the same estimate
    estimator.backward(loss, net, 3, estimator.init(net))
    twice = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.equal(a, 2 * b) for a, b in zip(twice, found[0], strict=True))  # exact, in any dtype


@given(nets, weight_space, st.integers(0, 1000))
@few
def test_replay_equals_the_estimate(net: Net, estimator: WeightSpace, step: int) -> None:
    state = estimator.init(net)
    estimate = estimator.estimate(Objective(loss_of(net), net), net, step, state)
    gradients = [gradient.clone() for _, gradient in estimate.gradients]
    copies = [nn.Parameter(torch.zeros_like(p)) for p in Weights.of(net)]  # of whose values nothing is read
    weights = Weights(list(Weights.of(net).names), copies, {})
    again = estimator.replay(weights, step, float(estimate.loss), estimate.slopes, estimator.init(net))
    assert all(torch.equal(a, b) for a, (_, b) in zip(gradients, again.gradients, strict=True))
