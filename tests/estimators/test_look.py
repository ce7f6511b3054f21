"""Where a look finds the examples, and what it says where it does not."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.perturbed.exact import assert_exact, look
from zo_lightning import CentralDifference, PerExample
from zo_lightning.estimators.per_example import look as looks
from zo_lightning.objective import Objective
from zo_lightning.perturbed.layouts import FIRST, Layout
from zo_lightning.perturbed.weights import Weights

B, T, E = 4, 5, 6


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(E, E), nn.LayerNorm(E), nn.Tanh(), nn.Linear(E, 2)).double()


Flow = Callable[[nn.Module, Tensor], Tensor]

# From an input [B, T, E] to losses [B]: what shape the layers see, and where they have the examples.
FLOWS: dict[str, tuple[Flow, Layout]] = {
    "first": (lambda net, x: net(x).square().sum((1, 2)), FIRST),
    "second": (lambda net, x: net(x.transpose(0, 1)).square().sum((0, 2)), Layout(1)),
    "joined with time": (lambda net, x: net(x.reshape(-1, E)).view(len(x), -1).square().sum(1), FIRST),
    "within time": (
        lambda net, x: net(x.transpose(0, 1).reshape(-1, E)).view(x.shape[1], -1, 2).square().sum((0, 2)),
        Layout(0, True),
    ),
    "windows": (lambda net, x: net(x.unflatten(1, (-1, 1)).flatten(0, 1)).view(len(x), -1).square().sum(1), FIRST),
    "third": (lambda net, x: net(x.transpose(0, 1).unsqueeze(0)).square().sum((0, 1, 3)), Layout(2)),
}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("space", ["auto", "weights", "activations"])
@pytest.mark.parametrize("steps", [T, B])  # as many as examples: the shape alone says nothing
def test_examples_are_found_where_they_are(name: str, space: str, steps: int) -> None:
    flow, layout = FLOWS[name]
    net, x = mlp(), tensor(B, steps, E)
    state = assert_exact(net, lambda: flow(net, x), space)
    assert {one.layout for one in state.layers.values()} == {layout}
    if "joined" not in name and name not in ("windows", "within time"):
        assert state.layers["0.weight"].in_weights is (space == "weights" or (space == "auto" and steps * E > 42))


def test_a_whole_step_with_the_examples_second() -> None:
    """The estimates are as good as with the examples first."""
    net, x = mlp(), tensor(B, T, E)
    grads = []
    for turned in (False, True):
        net.zero_grad()
        estimator = PerExample(feedback=0, correction=1.0, layers={"*": "activations"}, seed=0)

        def losses(turned: bool = turned) -> Tensor:
            z = net(x.transpose(0, 1)).transpose(0, 1) if turned else net(x)
            return z.square().sum((1, 2))

        exact = torch.autograd.grad(losses().mean(), list(net.parameters()))
        total = [torch.zeros_like(p) for p in net.parameters()]
        state = estimator.init(net)
        for step in range(300):
            net.zero_grad()
            estimator.backward(losses, net, step, state)
            for t, p in zip(total, net.parameters(), strict=True):
                assert p.grad is not None
                t.add_(p.grad, alpha=1 / 300)
        grads.append(torch.cat([(t - g).flatten() for t, g in zip(total, exact, strict=True)]).norm())
        norm = torch.cat([g.flatten() for g in exact]).norm()
    # The mean of 300 unbiased estimates; the noise has the same size in both.
    assert max(grads) < 0.5 * norm
    assert 0.5 < grads[0] / grads[1] < 2


def test_what_a_batch_shares_is_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    mixer, net = nn.Linear(B, B, bias=False).double(), mlp()
    both, x = nn.ModuleList([mixer, net]), tensor(B, E)
    with caplog.at_level(logging.WARNING):
        state = look(both, lambda: net(mixer(x.T).T).square().sum(1))
    # An output of the mixer is of its example: it is what it reads that is not, and nothing before it has weights.
    assert not state.shared
    with caplog.at_level(logging.WARNING):
        state = look(both, lambda: mixer(net(x).T).T.square().sum(1))
    assert {name.partition(".")[0] for name in state.shared} <= {"1"}


def test_a_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose outputs are of all examples together are given up after so many passes."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(E, E) for _ in range(9)]).double()
    x = tensor(2 * B, E)
    monkeypatch.setattr(looks, "PASSES", 10)
    objective = Objective(lambda: net(x.roll(1)).sum() * torch.ones(B), net)
    with objective.guard():
        state = looks.PerExampleState()
        looks.Look(objective, net, Weights.of(net), 0, lambda name: "auto", False).take(state)
    assert state.shared.keys() == dict(net.named_parameters()).keys()
    assert objective.forward_passes == 1 + 10
    assert state.shared["0.bias"] == f"no dimension of the output {(2 * B, E)} of linear holds the {B} examples"


def test_one_look_is_enough_where_shapes_tell() -> None:
    net, x = mlp(), tensor(B, T, E)
    for flow, passes in ((FLOWS["first"][0], 1), (FLOWS["second"][0], 3)):
        objective = Objective(lambda flow=flow: flow(net, x), net)
        with objective.guard():
            looks.Look(objective, net, Weights.of(net), 0, lambda name: "auto", False).take(looks.PerExampleState())
        assert objective.forward_passes == passes


class Hidden(nn.Module):
    """A layer with a temperature that becomes a number of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.odd = nn.Linear(E, 3), nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh() * float(self.odd.exp())


@pytest.mark.filterwarnings("ignore:Converting a tensor:UserWarning")
def test_a_use_that_nothing_shows_is_found() -> None:
    torch.manual_seed(0)
    net, x = Hidden().double(), tensor(B, E)
    net.inner.requires_grad_(False)  # whose noise would only be in the way

    def losses() -> Tensor:
        return net(x).square().sum(1)

    estimator = PerExample(CentralDifference(1e-5), correction=1.0, seed=0)
    assert estimator.shared_weights(losses, net) == {"odd": "NumPy or Python reads it"}
    before = net.odd.detach().clone()
    estimator.backward(losses, net, 0, estimator.init(net))
    assert torch.equal(net.odd, before)
    # Of one number the slope along any direction is the derivative, up to the square of the step.
    exact = 2 * (net.inner(x).tanh() * net.odd.exp()).square().sum(1).mean()
    assert net.odd.grad is not None and float(net.odd.grad) == pytest.approx(float(exact), rel=1e-6)


def test_a_weight_without_a_use_is_not_shared() -> None:
    net = nn.ModuleList([mlp(), nn.Linear(2, 2)])
    assert not look(net, lambda: net[0](tensor(B, E)).square().sum(1)).shared


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_first_batch_of_one_example_is_looked_at_again(batch_first: bool) -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(E, 2, 8, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    estimator, x = PerExample(feedback=0, seed=0), tensor(B, T, E)
    state, fresh = estimator.init(net), estimator.init(net)
    for step, (n, of) in enumerate([(1, state), (1, state), (B, state), (B, fresh), (1, state)]):

        def losses(n: int = n) -> Tensor:
            z = x[:n] if batch_first else x[:n].transpose(0, 1)
            return (net(z) if batch_first else net(z).transpose(0, 1)).square().sum((1, 2))

        net.zero_grad()
        estimator.backward(losses, net, step, of)
        assert not of.shared
        if n == B:
            assert not of.alone
    assert {key: one.layout for key, one in state.layers.items()} == {key: o.layout for key, o in fresh.layers.items()}
