"""Which output of a net feedback starts from, whatever shape it has and whatever it is in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import PerExample
from zo_lightning.estimators.per_example import output as outputs
from zo_lightning.estimators.per_example.containers import replaced, tensors_of
from zo_lightning.estimators.per_example.output import Output, summed
from zo_lightning.estimators.per_example.state import PerExampleState
from zo_lightning.perturbed.layouts import FIRST, Layout

B, T, V = 5, 3, 4


@dataclass
class Result:
    logits: Tensor
    hidden: Tensor
    numbers: Tensor


class Pair(NamedTuple):
    mean: Tensor
    log_var: Tensor


class Net(nn.Module):
    """An encoder, and a head whose output is in some container."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.head = nn.Linear(5, V)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        z = self.encoder(x)
        return self.wrap(self.head(z), z)


x = torch.randn(B, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
sequence = torch.randn(B, T, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
y = torch.arange(B) % V
tokens = torch.arange(B * T).view(B, T) % V


def entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def of_tokens(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(B, T).mean(1)


def apart(net: Net) -> Tensor:
    return entropy(net.head(net.encoder(x)))


def penalized(net: Net) -> Tensor:
    z = net.encoder(x)
    return entropy(net.head(z)) + z.square().sum(1)


def twice(net: Net) -> Tensor:
    return (net(x)[0] - net(x.flip(1))[0]).square().sum(1)


def gaussian(net: Net) -> Tensor:
    mean, log_var = net(x)
    return (mean.square() / log_var.sum(1, keepdim=True).exp()).sum(1) + log_var.sum(1)


def plain(logits: Tensor, hidden: Tensor) -> Any:
    return logits, hidden


def pair(logits: Tensor, hidden: Tensor) -> Pair:
    return Pair(logits, 0.1 * hidden)


# How the head's output is returned, the losses, where the output is found, and in which layout.
CASES: dict[str, tuple[Callable[..., Any], Callable[[Net], Tensor], Output]] = {
    "tuple": (plain, lambda net: entropy(net(x)[0]), Output(("",), ((0, FIRST),))),
    "dictionary": (
        lambda logits, z: {"hidden": [z, None], "logits": logits},
        lambda net: entropy(net(x)["logits"]),
        Output(("",), ((1, FIRST),)),
    ),
    "dataclass": (
        lambda logits, z: Result(logits, z, torch.arange(3)),
        lambda net: entropy(net(x).logits),
        Output(("",), ((0, FIRST),)),
    ),
    "distribution": (
        lambda logits, z: torch.distributions.Categorical(logits=logits),
        lambda net: -net(x).log_prob(y),
        Output(("",), ((0, FIRST),)),
    ),
    "vector": (
        lambda logits, z: logits.sum(1),
        lambda net: (net(x) - 1).square(),
        Output(("",), ((0, FIRST),)),
    ),
    "sequence": (lambda logits, z: logits, lambda net: of_tokens(net(sequence)), Output(("",), ((0, FIRST),))),
    "sequence, examples second": (
        lambda logits, z: logits,
        lambda net: of_tokens(net(sequence.transpose(0, 1)).transpose(0, 1)),
        Output(("",), ((0, Layout(1)),)),
    ),
    "two tensors": (pair, gaussian, Output(("",), ((0, FIRST), (1, FIRST)))),
    "encoder and head apart": (plain, apart, Output(("encoder", "head"), ((1, FIRST),))),
    "a penalty on what is between": (plain, penalized, Output(("encoder", "head"), ((0, FIRST), (1, FIRST)))),
    "two calls": (plain, twice, Output(("", ""), ((0, FIRST), (2, FIRST)))),
}


def estimated(estimator: PerExample, name: str, steps: int) -> tuple[PerExampleState, Tensor, Tensor, int]:
    """A state after some steps, the next estimate, the gradient, and how often a layer ran in the last step."""
    wrap, losses, _ = CASES[name]
    torch.manual_seed(0)
    net = Net(wrap).double()
    state = estimator.init(net)
    for step in range(steps):
        net.zero_grad()
        estimator.backward(lambda: losses(net), net, step, state)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(losses(net).mean(), list(net.parameters()))])
    net.zero_grad()
    ran: list[Any] = []
    original = F.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", lambda *a, **k: (ran.append(1), original(*a, **k))[1])
        estimator.backward(lambda: losses(net), net, steps, state)
    return state, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), exact, len(ran)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["auto", "values"])
def test_the_output_is_found_and_teaches(name: str, way: Any) -> None:
    state, estimate, exact, ran = estimated(PerExample(loss_gradient=way, feedback=1.0, seed=0), name, 101)
    assert state.output == CASES[name][2]
    assert state.feedback.maps
    blind = estimated(PerExample(feedback=0, seed=0), name, 0)[1]
    cosine, without = (float(F.cosine_similarity(e, exact, 0)) for e in (estimate, blind))
    assert cosine > max(without, 0.8)
    calls = 2 if name == "two calls" else 1
    assert ran == 2 * 2 * calls, "two layers in two passes: no question about the loss alone runs one"


def test_probabilities_whose_loss_is_a_logarithm() -> None:
    """Moved by a step of a finite difference they may be negative, which is no loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Probabilities(5, V)).double()
    estimator = PerExample(feedback=1.0, seed=0)
    state = estimator.init(net)

    def losses() -> Tensor:
        return -net(x).gather(1, y.unsqueeze(1)).squeeze(1).log()

    for step in range(3):
        estimator.backward(losses, net, step, state)
    assert state.is_smooth and state.output == Output(("",), ((0, FIRST),))


class Probabilities(nn.Linear):
    """The softmax of large logits, most of it nearly 0."""

    def forward(self, z: Tensor) -> Tensor:
        return (20 * super().forward(z)).softmax(1)


def test_a_state_with_an_output_is_saved() -> None:
    state, *_ = estimated(PerExample(seed=0), "a penalty on what is between", 2)
    again = PerExampleState()
    again.load_state_dict(state.state_dict())
    assert again.output == state.output


def test_no_output_where_weights_are_used_outside_of_modules(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = Net(plain).double()
    estimator = PerExample(seed=0)
    state = estimator.init(net)
    estimator.backward(lambda: entropy(F.linear(net.encoder(x), net.head.weight)), net, 0, state)
    assert state.output is None
    assert "no feedback is learned" in caplog.text


def test_replaced_leaves_the_value_as_it_is() -> None:
    a, b, c = torch.zeros(2), torch.ones(2), torch.arange(2)
    value = {"a": [a, (b, None)], "pair": Pair(a, b), "result": Result(a, b, c), "text": "x"}
    changed = replaced(value, lambda t: t + 1)
    assert tensors_of(value) == [a, b, a, b, a, b]
    assert [float(t[0]) for t in tensors_of(changed)] == [1, 2] * 3
    assert isinstance(changed["pair"], Pair) and changed["result"].numbers is c and changed["text"] == "x"


def test_sums_of_a_large_output_keep_products() -> None:
    n = outputs.LARGEST + 1
    a, b = (torch.randn(200, n, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    assert summed(a[:, :-1]) is not None and summed(a[:, :-1]).shape == (200, n - 1)
    assert summed(a).shape == (200, outputs.SUMS)
    # <Ra, Rb> = <a, b> + noise of variance 2 ‖a‖² ‖b‖² / SUMS at most; 200 pairs share R, and five deviations hold.
    error = ((summed(a) * summed(b)).sum(1) - (a * b).sum(1)) / (a.norm(dim=1) * b.norm(dim=1))
    assert error.abs().max() < 5 * (2 / outputs.SUMS) ** 0.5
    assert summed(a).square().sum(1).mean() == pytest.approx(float(a.square().sum(1).mean()), rel=0.1)


def test_a_large_output_is_taken_in_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LARGEST", 8)
    monkeypatch.setattr(outputs, "SUMS", 16)
    state, estimate, exact, _ = estimated(PerExample(feedback=1.0, seed=0), "sequence", 100)
    assert {len(weight) for weight in state.feedback.maps.values()} == {16}
    assert F.cosine_similarity(estimate, exact, 0) > 0.7
