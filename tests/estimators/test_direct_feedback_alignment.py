"""Direct feedback alignment: the published rule by hand, what belongs to a layer, and that it trains."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from zo_lightning.counter import mix
from zo_lightning.data import Digits
from zo_lightning.estimators.direct_feedback_alignment import FeedbackMaps

BATCH, CLASSES = 6, 3
Y = torch.arange(BATCH) % CLASSES


def images() -> Tensor:
    return torch.randn(BATCH, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def estimated(net: nn.Module, output: Callable[[], Tensor], seed: int = 5, step: int = 0) -> dict[str, Tensor]:
    net.zero_grad()
    zo.DirectFeedbackAlignment(seed=seed).backward(lambda: F.cross_entropy(output(), Y), net, step)
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def backpropagated(net: nn.Module, output: Callable[[], Tensor]) -> dict[str, Tensor]:
    net.zero_grad()
    F.cross_entropy(output(), Y).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def feedback(net: nn.Module, weight: str, numbers: int, error: Tensor, use: int = 0, seed: int = 5) -> Tensor:
    """``B e`` for the input of the layer with a weight, [B, numbers]."""
    position = [name for name, _ in net.named_parameters()].index(weight)
    return error @ FeedbackMaps().of(mix(seed, position, use), (error.shape[1], numbers), error)


def error_at(logits: Tensor) -> Tensor:
    return (logits.softmax(1) - F.one_hot(Y, CLASSES)).detach() / BATCH


def test_it_is_the_published_rule() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    x = torch.randn(BATCH, 5)
    found = estimated(net, lambda: net(x))
    h1 = net[0](x).tanh()
    a2 = net[2](h1)
    error = error_at(net(x))
    delta1 = feedback(net, "2.weight", 7, error) * (1 - h1.square())
    delta2 = feedback(net, "4.weight", 4, error) * (a2 > 0)
    expected = {"0.weight": delta1.T @ x, "0.bias": delta1.sum(0), "2.weight": delta2.T @ h1, "2.bias": delta2.sum(0)}
    expected |= {"4.weight": error.T @ a2.relu(), "4.bias": error.sum(0)}
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


ONE_LAYER: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, CLASSES)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, CLASSES, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "normalised": lambda: nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, CLASSES, 3), nn.BatchNorm2d(CLASSES), nn.AdaptiveMaxPool2d(1), nn.Flatten()
    ),
}


@pytest.mark.parametrize("make", ONE_LAYER.values(), ids=ONE_LAYER.keys())
def test_one_layer_is_backpropagated_exactly(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = make(), images()
    found, exact = estimated(net, lambda: net(x)), backpropagated(net, lambda: net(x))
    # The normalisation before the layer gets feedback, as a layer would.
    same = [name for name in exact if len(exact) < 6 or not name.startswith("0.")]
    assert same and all(torch.equal(found[name], exact[name]) for name in same)


def test_what_follows_a_layer_is_differentiated_up_to_the_next() -> None:
    """Batch normalisation with its weights, a ReLU and a pooling belong to the convolution before."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
    net = nn.Sequential(first, nn.Flatten(), nn.Linear(48, CLASSES))
    x = images()
    found = estimated(net, lambda: net(x))
    told = feedback(net, "2.weight", 48, error_at(net(x))).view(BATCH, 3, 4, 4)
    expected = torch.autograd.grad(first(x), list(first.parameters()), told)
    for (name, _), gradient in zip(first.named_parameters(), expected, strict=True):
        assert torch.allclose(found[f"0.{name}"], gradient, atol=1e-6), name


def test_a_path_around_a_layer_brings_the_feedback_of_both_that_it_leads_to() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h + self.inner(h))

    torch.manual_seed(0)
    net, x = Residual(), torch.randn(BATCH, 5)
    error = error_at(net(x))
    told = feedback(net, "inner.weight", 4, error) + feedback(net, "last.weight", 4, error)
    assert torch.allclose(estimated(net, lambda: net(x))["first.weight"], told.T @ x, atol=1e-6)


def test_two_heads_send_their_errors_together() -> None:
    torch.manual_seed(0)
    body, heads = nn.Linear(5, 4), nn.ModuleList(nn.Linear(4, CLASSES) for _ in range(2))
    net, x = nn.ModuleList([body, heads]), torch.randn(BATCH, 5)

    def output() -> Tensor:
        h = body(x)
        return heads[0](h) + 2 * heads[1](h)

    error = error_at(output())
    both = torch.cat([error, 2 * error], 1)
    told = feedback(net, "1.0.weight", 4, both) + feedback(net, "1.1.weight", 4, both)
    assert torch.allclose(estimated(net, output)["0.weight"], told.T @ x, atol=1e-6)


def test_each_use_of_a_weight_has_a_matrix_of_its_own() -> None:
    """As each step of a recurrent net; also through what is computed from the weight alone."""
    torch.manual_seed(0)
    first, again, last = nn.Linear(5, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, CLASSES)
    net, x = nn.ModuleList([first, again, last]), torch.randn(BATCH, 5)

    def output() -> Tensor:
        h = F.linear(first(x), again.weight.exp())
        return last(F.linear(h, again.weight.exp()))

    error, h = error_at(output()), first(x)
    told = feedback(net, "1.weight", 4, error, use=1).T @ h
    told += feedback(net, "2.weight", 4, error).T @ F.linear(h, again.weight.exp())
    found = estimated(net, output)["1.weight"]
    assert torch.allclose(found, (told * again.weight.exp()).detach(), atol=1e-6)


def test_matrices_never_change_and_the_seed_decides_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    x = torch.randn(BATCH, 5)
    first = estimated(net, lambda: net(x))
    again, other = estimated(net, lambda: net(x), step=9), estimated(net, lambda: net(x), seed=6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert torch.equal(first["2.weight"], other["2.weight"]), "the last layer's gradient is exact"


def test_a_resumed_run_has_the_same_matrices() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    x, estimator = torch.randn(BATCH, 5), zo.DirectFeedbackAlignment(seed=5)
    state = estimator.init(net)
    estimator.backward(lambda: F.cross_entropy(net(x), Y), net, 0, state)
    resumed = estimator.init(net)
    resumed.load_state_dict(state.state_dict())
    gradients = []
    for one in (state, resumed):
        net.zero_grad()
        estimator.backward(lambda: F.cross_entropy(net(x), Y), net, 1, one)
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_entries_have_variance_one_by_the_number_of_outputs() -> None:
    b = FeedbackMaps().of(1, (10, 1000), torch.empty(0))
    # The variance of 10,000 normal numbers has a relative standard deviation of √(2 / 10,000) = 0.014.
    assert b.var().item() == pytest.approx(0.1, rel=5 * 0.014)
    assert abs(b.mean().item()) < 5 * math.sqrt(0.1 / 10_000)


def test_losses_may_come_one_by_one() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES)), torch.randn(BATCH, 5)
    mean = estimated(net, lambda: net(x))
    net.zero_grad()
    objective = zo.Objective(lambda: F.cross_entropy(net(x), Y, reduction="none"), net)
    zo.DirectFeedbackAlignment(seed=5).backward(objective, net, 0)
    assert all(p.grad is not None and torch.allclose(p.grad, mean[name]) for name, p in net.named_parameters())
    assert objective.forward_passes == 2, "the pass, and as much for the gradients by the weights"


class Recurrent(nn.Module):
    """Examples are second in what the LSTM is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.last = nn.Embedding(11, 4), nn.LSTM(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(self.embed(x.T))[0][-1])


class Attentive(nn.Module):
    """A transformer, whose layers see tokens of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layer, self.last = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.embed(x)).mean(1))


@pytest.mark.parametrize("make", [Recurrent, Attentive])
def test_layers_for_sequences_learn(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = make(), torch.randint(11, (BATCH, 7))
    found = estimated(net, lambda: net(x))
    for name, p in net.named_parameters():
        assert found[name].shape == p.shape and bool(found[name].isfinite().all() and found[name].any()), name


def test_what_cannot_be_told_apart_is_refused() -> None:
    torch.manual_seed(0)
    first, joining, last = nn.Linear(5, 4), nn.Linear(BATCH * 4, 4), nn.Linear(4, CLASSES)
    net, x = nn.ModuleList([first, joining, last]), torch.randn(BATCH + 1, 5)

    def output() -> Tensor:
        return last(joining(first(x)[:BATCH].reshape(1, -1)).expand(BATCH, -1))

    with pytest.raises(ValueError, match=r"the input of 1.weight's layer, \(1, 24\), does not hold the 6 examples"):
        estimated(net, output)


def test_layers_that_cannot_be_seen_are_refused() -> None:
    x = torch.randn(BATCH, 5)
    traced: Any = torch.jit.trace(nn.Linear(5, 4), x)
    net = nn.Sequential(traced, nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match=r"cannot see the layer of 0.weight: TorchScript hides it"):
        estimated(net, lambda: net(x))


NETS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": zo.SmallCNN,
    "fully_connected": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())
def test_hidden_layers_learn_more_than_random_features_give(make: Callable[[], nn.Module]) -> None:
    data = Digits(val_size=0, seed=0)
    data.setup()
    x, y = data._subset("train")
    held, labels = data._subset("test")

    def accuracy(estimator: zo.GradientEstimator, last_alone: bool) -> float:
        torch.manual_seed(0)
        net = make()
        for p in list(net.parameters())[:-2] if last_alone else ():
            p.requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3)
        state, draws = estimator.init(net), torch.Generator().manual_seed(1)
        for step in range(150):
            chosen = torch.randint(len(x), (128,), generator=draws)
            optimizer.zero_grad()
            estimator.backward(lambda at=chosen: F.cross_entropy(net(x[at]), y[at]), net, step, state)
            optimizer.step()
        with torch.no_grad():
            return float((net(held).argmax(1) == labels).float().mean())

    alone = accuracy(zo.Backprop(), last_alone=True)
    # Accuracies of 364 images, about 0.8, have a standard deviation of 0.021, their difference one of 0.03 at most.
    assert accuracy(zo.DirectFeedbackAlignment(seed=0), last_alone=False) > alone + 2 * 0.03
