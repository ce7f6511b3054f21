import logging
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import (
    Backprop,
    CentralDifference,
    ForwardDifference,
    PerExample,
    ZerothOrder,
)
from zo_lightning.estimators import GradientEstimator
from zo_lightning.objective import NonFiniteLoss, Objective
from zo_lightning.perturbed.state import State

B = 6


class Tied(nn.Module):
    """An embedding that is also the output layer, a position embedding and attention in between."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.place = nn.Parameter(torch.randn(3, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.block(self.words(x) + self.place)[:, -1], self.words.weight)


class Residual(nn.Module):
    """Convolutions with strides and groups, group normalisation, a residual, ReLUs and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))
        self.inner = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.down = nn.Conv2d(4, 5, 2, stride=2, bias=False)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(self.down(x + self.inner(x).relu()).relu().flatten(2).mean(2))


class Opaque(nn.Module):
    """A weight that is written into another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.odd = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.new_zeros(len(x), *self.odd.shape)
        rows[:] = self.odd.exp()
        return torch.einsum("bij,bj->bi", rows, self.inner(x).tanh())


class Functions(nn.Module):
    """Functions without a rule of their own, on weights and on what is computed from weights."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    slope: Tensor
    token: Tensor

    def __init__(self) -> None:
        super().__init__()
        shapes = {"a": (3, 4), "b": (4,), "c": (4, 4), "slope": (4,), "token": (1, 1, 4), "d": (8, 3)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.up = nn.ConvTranspose1d(2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.addmm(self.b, x, self.a).tanh() @ self.c.softmax(0).T
        z = F.prelu(z, self.slope)
        z = torch.cat([self.token.expand(len(x), -1, -1), z.unsqueeze(1)], 1)
        return torch.einsum("bi,io->bo", self.up(z)[..., :4].flatten(1), self.d)


class Stats(nn.Module):
    """Batch normalisation between a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).tanh().flatten(1))


INPUTS: dict[type[nn.Module], Callable[[], Tensor]] = {
    Tied: lambda: torch.randint(5, (B, 3)),
    Residual: lambda: torch.randn(B, 1, 10, 10, dtype=torch.float64),
    Opaque: lambda: torch.randn(B, 3, dtype=torch.float64),
    Functions: lambda: torch.randn(B, 3, dtype=torch.float64),
    Stats: lambda: torch.randn(B, 1, 6, 6, dtype=torch.float64),
}


def problem(kind: type[nn.Module]) -> tuple[Any, Callable[[], Tensor]]:
    torch.manual_seed(0)
    net = kind().double()
    x, y = INPUTS[kind](), torch.randint(3, (B,))
    return net, lambda: F.cross_entropy(net(x), y, reduction="none")


def gradient(
    estimator: GradientEstimator,
    loss: Callable[[], Tensor],
    net: nn.Module,
    step: int = 0,
    state: State | None = None,
) -> Tensor:
    net.zero_grad()
    estimator.backward(loss, net, step, estimator.init(net) if state is None else state)
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def moments(estimator: GradientEstimator, loss: Callable[[], Tensor], net: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """The mean of n estimates, and its standard error."""
    state = estimator.init(net)
    draws = torch.stack([gradient(estimator, loss, net, step, state) for step in range(n)])
    return draws.mean(0), draws.std(0) / n**0.5


@pytest.mark.parametrize("kind", [Tied, Residual, Opaque, Functions])
@pytest.mark.parametrize("space", ["auto", "activations", "weights"])
@pytest.mark.parametrize("feedback", [0.0, 0.5])
def test_is_unbiased_whatever_the_feedback(kind: type[nn.Module], space: str, feedback: float) -> None:
    net, loss = problem(kind)
    exact = gradient(Backprop(), loss, net)
    estimator = PerExample(CentralDifference(1e-5), space=space, feedback=feedback, correction=1.0, seed=1)  # type: ignore[arg-type]
    mean, error = moments(estimator, loss, net, 1000 if kind is Residual and not feedback else 400)
    # Five standard errors hold for some 250 numbers with a probability of 0.9998. The step of 1e-2 by which the loss is
    # asked for the gradient of the net's output leaves 1e-4 / 6 of its third derivative, at most 0.2, times inputs.
    assert bool(((mean - exact).abs() <= 5 * error + 1e-5).all())
    assert error.norm() < exact.norm(), "or the test could not fail"


def test_the_error_of_the_slopes_is_quadratic_in_mu() -> None:
    """Of the last bias, which the inputs of no displaced layer enter: ten times the step, a hundred times the error."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(B, 3, dtype=torch.float64), torch.randint(3, (B,))

    def last_bias(mu: float) -> Tensor:
        estimator = PerExample(CentralDifference(mu), space="activations", feedback=0.0, correction=1.0, seed=0)
        return gradient(estimator, lambda: F.cross_entropy(net(x), y, reduction="none"), net)[-3:]

    exact = last_bias(1e-5)
    errors = [float((last_bias(mu) - exact).norm()) for mu in (1e-3, 1e-2)]
    assert errors[1] / errors[0] == pytest.approx(100, rel=0.1)


def test_forward_difference_is_unbiased_to_first_order() -> None:
    net, loss = problem(Residual)
    exact = gradient(Backprop(), loss, net)
    mean, error = moments(PerExample(ForwardDifference(1e-6), correction=1.0, seed=1), loss, net, 400)
    assert bool(((mean - exact).abs() <= 5 * error + 1e-5).all())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, 0))


@pytest.mark.parametrize("kind", [Tied, Residual])
def test_feedback_learns_to_predict_the_gradient(kind: type[nn.Module]) -> None:
    net, loss = problem(kind)
    exact = gradient(Backprop(), loss, net)
    estimator = PerExample(seed=0)
    state = estimator.init(net)
    first = cosine(gradient(estimator, loss, net, 0, state), exact)
    for step in range(1, 299):
        estimator.backward(loss, net, step, state)
    assert cosine(gradient(estimator, loss, net, 299, state), exact) > max(first, 0.7)


def test_the_gradient_of_the_last_layer_is_known() -> None:
    net, loss = problem(Residual)
    gradient(Backprop(), loss, net)
    exact = net.out.weight.grad.clone()
    for way, tolerance in (("auto", 1e-5), ("values", 1e-3)):
        gradient(PerExample(CentralDifference(1e-6), loss_gradient=way, seed=0), loss, net)  # type: ignore[arg-type]
        # Inputs are displaced by 1e-6; values are differences with a step of 1e-2: 1e-4 / 6 times a third derivative.
        assert torch.allclose(net.out.weight.grad, exact, rtol=tolerance, atol=tolerance / 100)


def test_beats_directions_in_weight_space_at_equal_cost() -> None:
    net, loss = problem(Residual)
    exact = gradient(Backprop(), loss, net)
    plain = [cosine(gradient(ZerothOrder(seed=0), loss, net, step), exact) ** 2 for step in range(100)]
    ours = [cosine(gradient(PerExample(feedback=0, seed=0), loss, net, step), exact) ** 2 for step in range(100)]
    assert sum(ours) > 3 * sum(plain)  # B = 6 slopes in place of one; the rest is ReLUs' and poolings' masks


@pytest.mark.parametrize("space", ["activations", "weights"])
def test_batch_normalization(space: str) -> None:
    """Right before the statistics the gradient through them is put back; the estimate is then unbiased for it."""
    net, loss = problem(Stats)
    exact = gradient(Backprop(), loss, net)
    estimator = PerExample(CentralDifference(1e-5), layers={"*": space}, feedback=0, correction=1.0, seed=1)  # type: ignore[dict-item]
    mean, error = moments(estimator, loss, net, 400)
    others = slice(net.conv.weight.numel() + net.conv.bias.numel(), None)
    assert bool(((mean - exact).abs() <= 5 * error + 1e-6)[others].all())
    if space == "activations":
        assert bool(((mean - exact).abs() <= 5 * error + 1e-6).all())


def test_what_cannot_be_displaced_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    net, loss = problem(Opaque)
    estimator = PerExample(seed=0)
    state = estimator.init(net)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            estimator.backward(loss, net, step, state)
    assert [r.getMessage() for r in caplog.records if "odd" in r.getMessage()] == [
        "PerExample: 1 of 3 weights, 43 % of the numbers, get one direction for the whole batch, as in ZerothOrder: "
        "odd (__setitem__ writes it into a tensor)"
    ]


def test_a_script_module_gets_one_direction(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    inner = torch.jit.script(nn.Linear(3, 4))
    net = nn.Sequential(inner, nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(B, 3, dtype=torch.float64), torch.randint(3, (B,))

    def loss() -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    exact = gradient(Backprop(), loss, net)
    before = [p.detach().clone() for p in net.parameters()]
    mean, error = moments(PerExample(CentralDifference(1e-5), correction=1.0, seed=1), loss, net, 400)
    assert bool(((mean - exact).abs() <= 5 * error + 1e-5).all())
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
    assert "0.bias, 0.weight" in caplog.text


def test_a_weight_that_is_not_used_gets_a_zero_gradient() -> None:
    net: Any = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    x, y = torch.randn(B, 3), torch.randint(3, (B,))
    gradient(PerExample(seed=0), lambda: F.cross_entropy(net["b"](net["a"](x)), y, reduction="none"), net)
    grad = net["unused"].weight.grad
    assert grad is not None and not grad.any()
    assert net["a"].weight.grad.any()


def test_weights_may_be_frozen_and_unfrozen_between_steps() -> None:
    net, loss = problem(Residual)
    estimator = PerExample(seed=0)
    state = estimator.init(net)
    for step, trains in enumerate((True, False, True)):
        net.inner.requires_grad_(trains)
        net.inner.weight.grad = None
        estimator.backward(loss, net, step, state)
        grad = net.inner.weight.grad
        assert (grad is not None and bool(grad.any())) is trains


def test_a_net_that_uses_its_weights_more_often_than_at_first_is_looked_at_again() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x, y, depth = torch.randn(B, 3), torch.randint(3, (B,)), 2

    def loss() -> Tensor:
        z = x
        for _ in range(depth):
            z = net(z)
        return F.cross_entropy(z, y, reduction="none")

    estimator = PerExample(feedback=0, correction=1.0, space="activations", seed=0)
    state = estimator.init(net)
    estimator.backward(loss, net, 0, state)
    depth = 1
    estimator.backward(loss, net, 1, state)
    depth = 3
    again = gradient(estimator, loss, net, 2, state)
    assert torch.equal(again, gradient(estimator, loss, net, 2)), "as from a state that has seen nothing else"


def test_passes_of_one_step_that_use_different_weights_are_refused() -> None:
    net, calls = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), 0
    x, y = torch.randn(B, 3), torch.randint(3, (B,))

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        z = x
        for _ in range(calls):
            z = net(z)
        return F.cross_entropy(z, y, reduction="none")

    with pytest.raises(ValueError, match=r"the same weights, and 0.weight:3 comes and goes"):
        gradient(PerExample(feedback=0, seed=0), loss, net)


def test_a_use_that_cannot_be_displaced_and_is_new_gets_one_direction() -> None:
    layer = nn.Linear(3, 3, bias=False)
    x, y, is_use = torch.randn(B, 3), torch.randint(3, (B,)), True

    def loss() -> Tensor:
        if is_use:
            return F.cross_entropy(layer(x), y, reduction="none")
        rows = torch.zeros(3, 3)
        rows[:] = layer.weight
        return F.cross_entropy(x @ rows, y, reduction="none")

    estimator = PerExample(seed=0)
    state = estimator.init(layer)
    estimator.backward(loss, layer, 0, state)
    is_use = False
    estimator.backward(loss, layer, 1, state)
    assert state.shared == {"weight": "__setitem__ writes it into a tensor"}


def test_a_first_step_that_failed_is_repeated() -> None:
    net, loss = problem(Residual)
    estimator, factor = PerExample(seed=0), float("nan")
    state = estimator.init(net)
    with pytest.raises(NonFiniteLoss):
        estimator.backward(lambda: loss() * factor, net, 0, state)
    factor = 1.0
    estimator.backward(lambda: loss() * factor, net, 1, state)
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


class Odd(nn.Module):
    """A class token that is written into a tensor, an input that is a weight, a scalar, and a shifted ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.latent, self.gain = (nn.Parameter(torch.randn(shape)) for shape in ((4,), (1, 3), ()))
        self.inner, self.out = nn.Linear(3, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        rows = x.new_zeros(len(x), 3, 4)
        rows[:, 0] = self.token
        rows[:, 1] = z + self.inner(self.latent)
        rows[:, 2] = z.relu()
        rows -= 1.0
        return self.out(rows.tanh().flatten(1) * self.gain)


def test_weights_in_unusual_places_are_unbiased_too() -> None:
    torch.manual_seed(0)
    net = Odd().double()
    x, y = torch.randn(B, 3, dtype=torch.float64), torch.randint(3, (B,))

    def loss() -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    exact = gradient(Backprop(), loss, net)
    mean, error = moments(PerExample(CentralDifference(1e-5), correction=1.0, seed=1), loss, net, 400)
    assert bool(((mean - exact).abs() <= 5 * error + 1e-5).all())
    assert bool((error > 0).all()), "every weight is estimated"
    gradient(PerExample(seed=0), loss, net)  # and the default, which measures bias and noise


def test_a_relu_that_is_changed_in_place_keeps_its_mask() -> None:
    def shifted(x: Tensor, in_place: bool) -> Tensor:
        z = net[0](x).relu()
        return net[1](z.sub_(1.0) if in_place else z - 1.0)

    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)]).double()
    x, y = torch.randn(B, 3, dtype=torch.float64), torch.randint(3, (B,))
    grads = [
        gradient(
            PerExample(space="activations", feedback=0, seed=0),
            lambda way=way: F.cross_entropy(shifted(x, way), y, reduction="none"),
            net,
        )
        for way in (True, False)
    ]
    torch.testing.assert_close(*grads)


def test_outputs_that_are_not_of_examples_get_one_direction_when_it_shows() -> None:
    """One row per place, as many places as examples: nothing tells them apart until a smaller batch comes."""
    words, places, out = nn.Embedding(5, 4), nn.Embedding(B, 4), nn.Linear(4, 3)
    x, y, numbers = torch.randint(5, (B, B)), torch.randint(3, (B,)), torch.tensor(range(B))
    net = nn.ModuleList([words, places, out])

    def loss(n: int) -> Tensor:
        return F.cross_entropy(out((words(x[:n]) + places(numbers)).tanh().mean(1)), y[:n], reduction="none")

    estimator = PerExample(seed=0)
    state = estimator.init(net)
    estimator.backward(lambda: loss(B), net, 0, state)
    assert not state.shared
    estimator.backward(lambda: loss(2), net, 1, state)
    why = "no dimension of the output (6, 4) of embedding holds the 2 examples"
    assert state.shared == {"1.weight": why} == estimator.shared_weights(lambda: loss(2), net)
    state = estimator.init(net)
    for n in (3, B):
        estimator.backward(partial(loss, n), net, n, state)


def test_a_layer_that_sees_nothing_at_first_gets_its_scale_later() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3)).double()
    y = torch.randint(3, (B,))
    estimator = PerExample(space="weights", seed=0)
    state = estimator.init(net)
    for step, x in enumerate((torch.zeros(B, 3), torch.ones(B, 3))):
        estimator.backward(lambda x=x: F.cross_entropy(net(x.double()), y, reduction="none"), net, step, state)
    # The mean square of a sum of three signs, which is 1 or 9.
    assert state.layers["0.weight"].scale ** -2 == pytest.approx(3.0, rel=1.0)


def test_random_numbers_behind_the_net_are_the_same_in_every_question() -> None:
    """Each difference of the loss by the net's output sees one draw, or it would be divided noise."""
    net, _ = problem(Residual)
    x, y = INPUTS[Residual](), torch.randint(3, (B,))

    def loss() -> Tensor:
        share = torch.rand(B)
        return share * F.cross_entropy(net(x), y, reduction="none")

    gradient(PerExample(seed=0), loss, net)
    # The gradient by a logit is below 1, times inputs.
    assert net.out.weight.grad.norm() < x.norm()
    assert net.out.bias.grad.abs().max() < 1


def test_changes_of_the_output_in_place_are_seen() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(B, 3, dtype=torch.float64), torch.randint(3, (B,))

    def loss() -> Tensor:
        return F.cross_entropy(net(x).mul_(3.0), y, reduction="none")

    exact = gradient(Backprop(), loss, net)
    mean, error = moments(PerExample(CentralDifference(1e-5), correction=1.0, seed=1), loss, net, 400)
    # The loss is asked with steps of 1e-2 before the factor 3: an error of 27 · 1e-4 / 6 times its third derivative.
    assert bool(((mean - exact).abs() <= 5 * error + 1e-3).all())


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    net, _ = problem(Residual)
    net = net.float() if autocast else net.bfloat16()
    x, y = INPUTS[Residual]().to(next(net.parameters()).dtype), torch.randint(3, (B,))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.cross_entropy(net(x), y, reduction="none")

    gradient(PerExample(CentralDifference(0.1), seed=0), loss, net)
    ours = net.out.weight.grad
    assert ours.dtype == net.out.weight.dtype
    gradient(Backprop(), loss, net)
    # The last layer's gradient is known up to rounding of 2^-8, in a few places one after the other.
    assert cosine(ours.float().flatten(), net.out.weight.grad.float().flatten()) > 0.98


def test_spaces_are_chosen_by_dimension_and_overridden_by_pattern() -> None:
    net, loss = problem(Residual)

    def spaces(estimator: PerExample) -> dict[str, bool]:
        state = estimator.init(net)
        estimator.backward(loss, net, 0, state)
        return {key: layer.in_weights for key, layer in state.layers.items()}

    # Convolutions are noisy at their outputs; out: 18 weights and 3 outputs.
    names = [f"{name}.weight" for name in ("stem.0", "stem.1", "inner", "down", "out")]
    assert spaces(PerExample(seed=0)) == dict(zip(names, (False, True, False, False, False), strict=True))
    assert spaces(PerExample(space="weights", seed=0)) == dict.fromkeys(names, True)
    assert spaces(PerExample(space="activations", layers={"inn*": "weights"}, seed=0))["inner.weight"]
    tokens, sequences = nn.Linear(2, 3, bias=False).double(), torch.randn(B, 9, 2, dtype=torch.float64)
    state = (estimator := PerExample(seed=0)).init(tokens)
    estimator.backward(lambda: tokens(sequences).square().sum((1, 2)), tokens, 0, state)
    assert state.layers["weight"].in_weights, "6 weights, 27 outputs"


def test_the_loss_is_asked_for_its_values_where_autograd_does_not_give_its_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 20).double()
    x, y = torch.randn(B, 4, dtype=torch.float64), torch.randint(20, (B,))

    def losses(kind: str) -> Tensor:
        loss = F.cross_entropy(net(x), y, reduction="none")
        if kind == "numpy":
            return torch.from_numpy(loss.detach().numpy().copy())
        return loss + (loss - loss.detach()) if kind == "wrong" else loss

    exact = gradient(Backprop(), lambda: losses("plain"), net)
    for kind, smooth in (("plain", True), ("numpy", False), ("wrong", False)):
        estimator = PerExample(seed=1)
        state = estimator.init(net)
        draws = torch.stack([gradient(estimator, lambda k=kind: losses(k), net, step, state) for step in range(200)])
        assert state.is_smooth is smooth
        error = draws.std(0) / 200**0.5
        # Sixteen random directions stand for twenty outputs; a step of 1e-2 has an error of 1e-4 / 6 times x.
        assert bool(((draws.mean(0) - exact).abs() <= 5 * error + 1e-4).all())
        assert bool(error.any()) is not smooth


def test_the_loss_alone_is_asked_as_often_whatever_the_number_of_outputs() -> None:
    asked = {}
    for classes in (20, 1000):
        net, x, y = nn.Linear(4, classes), torch.randn(B, 4), torch.randint(classes, (B,))
        for way in ("auto", "values"):
            calls = 0

            def loss(net: nn.Module = net, x: Tensor = x, y: Tensor = y) -> Tensor:
                nonlocal calls
                calls += 1
                return F.cross_entropy(net(x), y, reduction="none")

            estimator = PerExample(loss_gradient=way, seed=0)  # type: ignore[arg-type]
            state = estimator.init(net)
            estimator.backward(loss, net, 0, state)
            calls = 0
            estimator.backward(loss, net, 1, state)
            asked[classes, way] = calls
    assert asked == {(20, "auto"): 3, (1000, "auto"): 3, (20, "values"): 34, (1000, "values"): 34}


@pytest.mark.parametrize("kind", [Tied, Residual, Stats, Opaque, Functions])
def test_steps_repeat_exactly_from_a_saved_state(kind: type[nn.Module]) -> None:
    net, loss = problem(kind)
    estimator = PerExample(seed=0)
    state, again = estimator.init(net), estimator.init(net)
    for step in range(12):  # beyond one in which bias and noise are measured
        estimator.backward(loss, net, step, state)
    saved = pickle.loads(pickle.dumps(state.state_dict()))
    expected = [gradient(estimator, loss, net, step, state) for step in range(12, 22)]
    again.load_state_dict(saved)
    for step, g in enumerate(expected, 12):
        assert torch.equal(gradient(estimator, loss, net, step, again), g)
    assert again.state_dict().keys() == state.state_dict().keys()


def test_forward_passes_are_counted() -> None:
    net, loss = problem(Tied)
    objective = Objective(loss, net)
    estimator = PerExample(samples=3, seed=0)
    state = estimator.init(net)
    estimator.backward(objective, net, 0, state)
    assert objective.forward_passes == 1 + 6  # one look at the net
    estimator.backward(objective, net, 1, state)
    assert objective.forward_passes == 1 + 12


def test_needs_the_loss_of_each_example() -> None:
    net, loss = problem(Tied)
    with pytest.raises(ValueError, match="needs the loss of each example"):
        gradient(PerExample(seed=0), lambda: loss().mean(), net)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"space": "nowhere"}, "space must be one of auto, activations, weights, got 'nowhere'"),
        ({"layers": {"conv*": "x"}}, "space must be one of auto, activations, weights, got 'x'"),
        ({"feedback": 2.0}, r"feedback must be in \[0, 2\), got 2.0"),
        ({"correction": 1.5}, r"correction must be 'auto' or in \[0, 1\], got 1.5"),
        ({"correction": "none"}, r"correction must be 'auto' or in \[0, 1\], got 'none'"),
        ({"correction": 0, "feedback": 0}, "leaves no estimate"),
        ({"loss_gradient": "guess"}, "loss_gradient must be one of auto, values, got 'guess'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerExample(**arguments)  # type: ignore[arg-type]
