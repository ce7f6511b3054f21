"""What is learned of a module: which weights no pass shows, so that they are moved in place."""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import (
    Batched,
    CentralDifference,
    ForwardDifference,
    NonFiniteLoss,
    Objective,
    Rademacher,
    Stencil,
    ZerothOrder,
)
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import DisplacedWeights, Weights


def scripted() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    inner = torch.jit.script(nn.Linear(3, 4))
    net = nn.Sequential(inner, nn.Tanh(), nn.Linear(4, 2))
    return net, net


def compiled() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    net = torch.compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), backend="eager")
    return net, net  # type: ignore[return-value]


def compiled_closure() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return net, torch.compile(net.forward, backend="eager")


def through_numpy() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A foreign loss that holds the memory of a weight, as a runtime with its own view of the net does."""
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    raw = net[0].weight.detach().numpy()

    def forward(x: Tensor) -> Tensor:
        hidden = torch.from_numpy(np.asarray(x) @ raw.T) + net[0].bias
        return net[2](hidden.tanh())

    return net, forward


def numpy_each_time() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A loss that asks a weight for its array each time: a use as any other."""
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(x: Tensor) -> Tensor:
        hidden = torch.from_numpy(x.numpy() @ net[0].weight.detach().numpy().T)
        return net[2](hidden.tanh()) + net[0].bias.sum()

    return net, forward


FOREIGN = [scripted, compiled, compiled_closure, through_numpy, numpy_each_time]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("make", FOREIGN)
def test_slopes_through_foreign_code_are_right(make: Callable[[], Any], lean: bool) -> None:
    """The estimate is c u for one c: that of the loss at weights that are moved by hand."""
    torch.manual_seed(0)
    net, forward = make()
    x = torch.randn(5, 3)
    estimator = ZerothOrder(Rademacher(), CentralDifference(1e-2), seed=3)
    state = estimator.init(net)
    weights = list(net.parameters())

    def loss() -> Tensor:
        return F.mse_loss(forward(x), torch.ones(5, 2))

    for step in range(2):
        before = [p.detach().clone() for p in weights]
        u = Rademacher().draw(weights, 3, step, 0).tensors()
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                for p, b, t in zip(weights, before, u, strict=True):
                    p.copy_(b + sign * 1e-2 * t)
                ends.append(float(loss()))
            for p, b in zip(weights, before, strict=True):
                p.copy_(b)
        objective = Objective(loss, net)
        gradients = dict(estimator.estimate(objective, net, step, state, lean=lean).gradients)
        slope = (ends[0] - ends[1]) / 2e-2
        for p, b, t in zip(weights, before, u, strict=True):
            assert torch.equal(p, b)
            # The losses are rounded to 1e-7, and divided by 2e-2.
            assert torch.allclose(gradients[p], slope * t, rtol=1e-3, atol=2e-5)
            assert gradients[p].any()


def test_a_weight_that_no_pass_shows_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    net, forward = through_numpy()
    estimator = ZerothOrder(seed=0)
    state, objective = estimator.init(net), Objective(lambda: forward(torch.ones(2, 3)).sum(), net)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            estimator.backward(objective, net, step, state)
    assert [record.getMessage() for record in caplog.records] == [
        "no use of 0.weight shows in a forward pass: moved in place for each, and put back"
    ]
    assert objective.forward_passes == 7, "the first pass is repeated"
    visible = {"0.weight": False, "0.bias": True, "2.weight": True, "2.bias": True}
    assert state.state_dict() == {"visible": visible, "chunk_size": None, "shown": [], "pools": False}
    again = State()
    again.load_state_dict(state.state_dict())
    estimator.backward(objective, net, 3, again)
    assert objective.forward_passes == 9


def test_a_run_goes_on_with_as_many_directions_at_once_as_it_began_with() -> None:
    """Measured anew, on the smaller last batch of an epoch, there would be more, and sums might round otherwise."""
    net, estimator = nn.Linear(300, 300), ZerothOrder(evaluation=Batched(), samples=2, seed=0)
    state, again = State(), State()
    estimator.backward(lambda: net(torch.ones(8192, 300)).mean(), net, 0, state)
    again.load_state_dict(state.state_dict())
    estimator.backward(lambda: net(torch.ones(2, 300)).mean(), net, 1, again)
    assert again.chunk_size == state.chunk_size == 1


def test_steps_in_inference_mode_and_out_of_it_share_a_state() -> None:
    net, estimator, state = nn.Linear(3, 2), ZerothOrder(seed=0), State()
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            estimator.backward(lambda: net(torch.ones(2, 3)).mean(), net, 0, state)


def test_weights_that_are_unfrozen_later_are_looked_at_then() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[1].requires_grad_(False)
    estimator, state = ZerothOrder(seed=0), State()

    def loss() -> Tensor:
        return net(torch.ones(2, 3)).sum()

    estimator.backward(loss, net, 0, state)
    assert set(state.visible) == {"0.weight", "0.bias"}
    net.requires_grad_(True)
    estimator.backward(loss, net, 1, state)
    assert state.visible == dict.fromkeys(["0.weight", "0.bias", "1.weight", "1.bias"], True)


def test_a_first_pass_that_fails_says_nothing_about_the_weights() -> None:
    net, state = nn.Linear(2, 1), State()
    with pytest.raises(NonFiniteLoss):
        ZerothOrder(seed=0).backward(lambda: net(torch.ones(1, 2)).sum() * float("nan"), net, 0, state)
    assert state.visible == {}


def test_memory_is_kept_until_the_weights_change() -> None:
    net, state = nn.Linear(3, 2), State()
    first = state.scratch("points", Weights.of(net))
    assert [t.shape for t in first] == [p.shape for p in net.parameters()]
    assert all(a is b for a, b in zip(first, state.scratch("points", Weights.of(net)), strict=True))
    assert not any(a is b for a in first for b in state.scratch("direction", Weights.of(net)))
    net.double()
    assert [t.dtype for t in state.scratch("points", Weights.of(net))] == [torch.float64] * 2


def test_an_estimate_stays_as_it_is_while_somebody_holds_it() -> None:
    """Its memory is that of the next one only where nothing is left of it."""
    net, state, places = nn.Linear(3, 2), State(), []
    estimator, kept = ZerothOrder(seed=0), []
    for step in range(6):
        estimator.backward(lambda: net(torch.ones(1, 3)).sum(), net, step, state)
        gradient = net.weight.grad
        assert gradient is not None
        places.append(gradient.data_ptr())
        if step in (2, 3):
            kept.append((gradient[0], gradient[0].clone()))
        del gradient
        net.zero_grad()
    assert places[0] == places[1] == places[2]
    assert len({*places[2:5]}) == 3
    assert all(torch.equal(row, before) for row, before in kept)


def test_gradients_that_add_up_do_so_in_memory_of_their_own() -> None:
    net, state = nn.Linear(3, 2), State()
    estimator = ZerothOrder(seed=0)
    sums = [torch.zeros_like(p) for p in net.parameters()]
    for step in range(4):
        objective = Objective(lambda: net(torch.ones(1, 3)).sum(), net)
        for total, (_, gradient) in zip(sums, estimator.estimate(objective, net, step, State()).gradients, strict=True):
            total += gradient
        estimator.backward(objective, net, step, state)
    assert all(torch.equal(p.grad, total) for p, total in zip(net.parameters(), sums, strict=True))  # type: ignore[arg-type]


def test_a_copy_of_the_state_has_memory_of_its_own() -> None:
    net, state = nn.Linear(3, 2), State()
    ZerothOrder(seed=0).backward(lambda: net(torch.ones(1, 3)).sum(), net, 0, state)
    other = deepcopy(state)
    assert other.visible == state.visible
    assert other.scratch("points", Weights.of(net))[0] is not state.scratch("points", Weights.of(net))[0]


def test_a_loss_that_writes_into_weights_changes_none_at_any_offset() -> None:
    for stencil in (ForwardDifference(1e-3), CentralDifference(1e-3)):
        net = nn.Sequential(nn.Embedding(4, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6, 1))
        before = [p.detach().clone() for p in net.parameters()]
        ZerothOrder(stencil=stencil, seed=0).backward(lambda net=net: net(torch.tensor([[0, 1]])).sum(), net, 0)
        assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


class Writes(nn.Module):
    """A net whose pass writes into its input, and into a frozen weight, from some pass on."""

    def __init__(self, begins: int, frozen: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.count = nn.Parameter(torch.zeros(1), requires_grad=False) if frozen else torch.zeros(1)
        self.begins, self.passes = begins, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.passes >= self.begins:
            x.mul_(2.0)
            self.count += 1.0
        return self.layer(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("begins", [1, 4, 7])
def test_what_a_later_pass_begins_to_write_is_put_back(begins: int, frozen: bool) -> None:
    """Every pass of a step sees the input as it came, and the step leaves what its first pass left."""
    net, x = Writes(begins, frozen), torch.ones(4, 3)
    estimator = ZerothOrder(samples=2, seed=0)
    state = estimator.init(net)
    for step in range(4):
        came = x.clone()
        objective = Objective(lambda: net(x).square().mean(), net, inputs=[x])
        loss = estimator.backward(objective, net, step, state)
        with torch.no_grad():
            seen = came * 2.0 if net.passes >= begins + 4 else came
            here = net.layer(seen).square().mean()
        if net.passes >= begins + 4 or net.passes < begins:  # a step between sees both
            assert float(loss) == pytest.approx(float(here), rel=0.02)  # the mean of the probes, within mu of it
        assert torch.equal(x, came), "nothing is kept but by commit"


def test_passes_are_watched_only_until_a_step_has_shown_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []
    enter = DisplacedWeights.__enter__
    monkeypatch.setattr(DisplacedWeights, "__enter__", lambda self: watched.append(1) or enter(self))
    net = nn.Linear(3, 2)
    estimator = ZerothOrder(samples=2, seed=0)
    state = estimator.init(net)
    for step in range(3):
        estimator.backward(lambda: net(torch.ones(1, 3)).sum(), net, step, state)
    assert len(watched) == 4, "those of the first step"
    resumed = estimator.init(net)
    resumed.load_state_dict(state.state_dict())
    estimator.backward(lambda: net(torch.ones(1, 3)).sum(), net, 3, resumed)
    assert len(watched) == 4


@pytest.mark.parametrize(("stencil", "passes"), [(CentralDifference(), 4), (ForwardDifference(), 3)])
def test_a_step_is_of_compiled_passes_or_of_passes_as_they_were_written(stencil: Stencil, passes: int) -> None:
    """Compiled code may draw other masks: between two kinds of passes a difference would say nothing."""
    net, kinds = nn.Sequential(nn.Linear(3, 2)), []
    compiled: Any = torch.compile(net, backend="eager")

    def loss() -> Tensor:
        kinds.append(torch._dynamo.eval_frame._stance.stance)
        return compiled(torch.ones(1, 3)).sum()

    estimator = ZerothOrder(stencil=stencil, samples=2, seed=0)
    state = estimator.init(net)
    for step in range(2):
        estimator.backward(loss, net, step, state)
    assert kinds == ["force_eager"] * passes + ["default"] * passes
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_an_input_that_is_written_into_before_torchscript_is_put_back() -> None:
    """Though no use of a weight shows, what the loss writes into does."""
    plain, x = nn.Linear(3, 2), torch.ones(4, 3)
    scripted: Any = torch.jit.trace(plain, x)
    estimates = []
    for net in (plain, scripted):
        objective = Objective(lambda net=net: net(x.sub_(0.5)).square().mean(), net, inputs=[x])
        estimator = ZerothOrder(seed=0)
        estimator.backward(objective, net, 0, estimator.init(net))
        assert torch.equal(x, torch.ones(4, 3)), "nothing is kept but by commit"
        estimates.append([p.grad for p in net.parameters()])
        net.zero_grad()
    torch.testing.assert_close(*estimates)


def test_weights_come_back_where_a_watch_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("no stance")

    monkeypatch.setattr("zo_lightning.perturbed.weights.as_written", refuse)
    net = nn.Linear(3, 2)
    before = net.weight.clone()
    with pytest.raises(RuntimeError, match="no stance"), DisplacedWeights([net.weight], lambda k: before + 1, [0]):
        pass
    assert torch.equal(net.weight, before)


def test_gradients_that_a_loss_reads_are_those_of_the_step_before() -> None:
    """As a training step does that logs their norm: in every pass, of every step."""
    net, read = nn.Linear(3, 2), []

    def loss() -> Tensor:
        read.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
        return net(torch.ones(1, 3)).sum()

    estimator = ZerothOrder(samples=2, seed=0)
    state = estimator.init(net)
    for step in range(3):
        before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        estimator.backward(loss, net, step, state)
        assert len(read) == 4
        for seen in read:
            for here, there in zip(seen, before, strict=True):
                assert here is None if there is None else torch.equal(here, there)
        read.clear()


@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_net_is_the_same_watched_or_not_held_or_lean(make: Any) -> None:
    """The first step is watched, the second is not: slopes that round otherwise make a resumed run another one."""
    torch.manual_seed(0)
    net = make(6, 4, 2, batch_first=True, bidirectional=True)
    x = torch.randn(3, 5, 6)
    estimator = ZerothOrder(samples=3, seed=0)

    def slopes(lean: bool, step: int, begun: State) -> tuple[float, ...]:
        objective = Objective(lambda: net(x)[0].square().mean(), net)
        return estimator.estimate(objective, net, step, begun, lean).slopes

    state = estimator.init(net)
    for step in range(3):
        found = slopes(False, step, state)
        assert found == slopes(False, step, estimator.init(net)) == slopes(True, step, estimator.init(net))


def test_inputs_that_are_refilled_between_steps_stay_so() -> None:
    net, x = nn.Linear(3, 2), torch.zeros(4, 3)
    objective = Objective(lambda: net(x).square().mean(), net, inputs=[x])
    estimator = ZerothOrder(seed=0)
    state = estimator.init(net)
    for step in range(4):
        x.fill_(step)
        estimator.backward(objective, net, step, state)
        assert torch.equal(x, torch.full_like(x, step))
