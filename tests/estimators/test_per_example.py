import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import (
    ActivationPerturbation,
    Backprop,
    CentralDifference,
    ExampleDirections,
    ForwardDifference,
    PerExample,
    ZerothOrder,
)
from zo_lightning.estimators import GradientEstimator
from zo_lightning.objective import NonFiniteLoss

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
    """A weight that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.odd = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh() @ self.odd.exp().T


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
    Stats: lambda: torch.randn(B, 1, 6, 6, dtype=torch.float64),
}


def problem(kind: type[nn.Module]) -> tuple[Any, Callable[[], Tensor]]:
    torch.manual_seed(0)
    net = kind().double()
    x, y = INPUTS[kind](), torch.randint(3, (B,))
    return net, lambda: F.cross_entropy(net(x), y, reduction="none")


def gradient(estimator: GradientEstimator, loss: Callable[[], Tensor], net: nn.Module, step: int = 0) -> Tensor:
    estimator.backward(loss, net, step)
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def moments(estimator: GradientEstimator, loss: Callable[[], Tensor], net: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """The mean of n estimates, and its standard error."""
    draws = torch.stack([gradient(estimator, loss, net, step) for step in range(n)])
    return draws.mean(0), draws.std(0) / n**0.5


@pytest.mark.parametrize("kind", [Tied, Residual, Opaque])
@pytest.mark.parametrize("space", ["auto", "activations", "weights"])
@pytest.mark.parametrize("feedback", [0.0, 0.5])
def test_is_unbiased_whatever_the_feedback(kind: type[nn.Module], space: str, feedback: float) -> None:
    net, loss = problem(kind)
    exact = gradient(Backprop(), loss, net)
    estimator = PerExample(CentralDifference(1e-5), space=space, feedback=feedback, correction=1.0, seed=1)  # type: ignore[arg-type]
    mean, error = moments(estimator, loss, net, 400)
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
        estimator = ActivationPerturbation(CentralDifference(mu), feedback=0.0, correction=1.0, balance=False, seed=0)
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
    first = cosine(gradient(estimator, loss, net, 0), exact)
    for step in range(1, 299):
        estimator.backward(loss, net, step)
    assert cosine(gradient(estimator, loss, net, 299), exact) > max(first, 0.7)


def test_the_gradient_of_the_last_layer_is_known() -> None:
    net, loss = problem(Residual)
    Backprop().backward(loss, net, 0)
    exact = net.out.weight.grad.clone()
    PerExample(CentralDifference(1e-6), seed=0).backward(loss, net, 0)
    # Central differences of the loss by the net's output, with a step of 1e-2: 1e-4 / 6 times its third derivative.
    assert torch.allclose(net.out.weight.grad, exact, rtol=1e-3, atol=1e-5)


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


def test_what_no_rule_covers_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    net, loss = problem(Opaque)
    estimator = PerExample(seed=0)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            estimator.backward(loss, net, step)
    assert [r.getMessage() for r in caplog.records if "odd" in r.getMessage()] == [
        "PerExample: no rule covers the use of odd: one direction for the whole batch, as in ZerothOrder"
    ]


def test_a_weight_that_is_not_used_gets_a_zero_gradient() -> None:
    net: Any = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    x, y = torch.randn(B, 3), torch.randint(3, (B,))
    PerExample(seed=0).backward(lambda: F.cross_entropy(net["b"](net["a"](x)), y, reduction="none"), net, 0)
    grad = net["unused"].weight.grad
    assert grad is not None and not grad.any()
    assert net["a"].weight.grad.any()


def test_weights_may_be_frozen_and_unfrozen_between_steps() -> None:
    net, loss = problem(Residual)
    estimator = PerExample(seed=0)
    for step, trains in enumerate((True, False, True)):
        net.inner.requires_grad_(trains)
        net.inner.weight.grad = None
        estimator.backward(loss, net, step)
        grad = net.inner.weight.grad
        assert (grad is not None and bool(grad.any())) is trains


def test_a_net_that_uses_its_weights_more_often_than_at_first_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x, y, depth = torch.randn(B, 3), torch.randint(3, (B,)), 2

    def loss() -> Tensor:
        z = x
        for _ in range(depth):
            z = net(z)
        return F.cross_entropy(z, y, reduction="none")

    estimator = PerExample(seed=0)
    estimator.backward(loss, net, 0)
    depth = 1
    estimator.backward(loss, net, 1)
    depth = 3
    with pytest.raises(ValueError, match="needs to see all uses of weights in its first step: 0.weight:2 is new"):
        estimator.backward(loss, net, 2)


def test_a_use_without_a_rule_that_is_new_is_refused() -> None:
    layer = nn.Linear(3, 3, bias=False)
    x, y, ruled = torch.randn(B, 3), torch.randint(3, (B,)), True

    def loss() -> Tensor:
        return F.cross_entropy(layer(x) if ruled else x @ layer.weight.T, y, reduction="none")

    estimator = PerExample(seed=0)
    estimator.backward(loss, layer, 0)
    ruled = False
    with pytest.raises(ValueError, match="all uses of weights in its first step: weight is new"):
        estimator.backward(loss, layer, 1)


def test_a_first_step_that_failed_is_repeated() -> None:
    net, loss = problem(Residual)
    estimator, factor = PerExample(seed=0), float("nan")
    with pytest.raises(NonFiniteLoss):
        estimator.backward(lambda: loss() * factor, net, 0)
    factor = 1.0
    estimator.backward(lambda: loss() * factor, net, 1)
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
    PerExample(seed=0).backward(loss, net, 0)  # and the default, which measures bias and noise


def test_a_relu_that_is_changed_in_place_keeps_its_mask() -> None:
    def shifted(x: Tensor, in_place: bool) -> Tensor:
        z = net[0](x).relu()
        return net[1](z.sub_(1.0) if in_place else z - 1.0)

    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)]).double()
    x, y = torch.randn(B, 3, dtype=torch.float64), torch.randint(3, (B,))
    grads = [
        gradient(
            ActivationPerturbation(feedback=0, seed=0),
            lambda way=way: F.cross_entropy(shifted(x, way), y, reduction="none"),
            net,
        )
        for way in (True, False)
    ]
    torch.testing.assert_close(*grads)


def test_outputs_that_are_not_of_examples_are_refused_when_it_shows() -> None:
    """One row per place, as many places as examples: nothing tells them apart until a smaller batch comes."""
    words, places, out = nn.Embedding(5, 4), nn.Embedding(B, 4), nn.Linear(4, 3)
    x, y = torch.randint(5, (B, B)), torch.randint(3, (B,))
    net = nn.ModuleList([words, places, out])

    def loss(n: int) -> Tensor:
        return F.cross_entropy(out((words(x[:n]) + places(torch.arange(B))).tanh().mean(1)), y[:n], reduction="none")

    estimator = PerExample(seed=0)
    estimator.backward(lambda: loss(B), net, 0)
    with pytest.raises(ValueError, match=r"output of 1.weight has 6 rows for 3 examples"):
        estimator.backward(lambda: loss(3), net, 1)
    fresh = PerExample(seed=0)
    for n in (3, B):
        fresh.backward(lambda n=n: loss(n), net, n)


def test_a_layer_that_sees_nothing_at_first_gets_its_scale_later() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3)).double()
    y = torch.randint(3, (B,))
    estimator = ExampleDirections(balance=False, seed=0)
    for step, x in enumerate((torch.zeros(B, 3), torch.ones(B, 3))):
        estimator.backward(lambda x=x: F.cross_entropy(net(x.double()), y, reduction="none"), net, step)
    layer = estimator.state_dict(net)["layers"]["0.weight"]
    assert layer["scale"] ** 2 * layer["power"] == pytest.approx(1.0)
    assert layer["power"] == pytest.approx(3.0, rel=1.0)  # the square of a sum of three signs, 1 or 9


def test_random_numbers_behind_the_net_are_the_same_in_every_question() -> None:
    """Each difference of the loss by the net's output sees one draw, or it would be divided noise."""
    net, _ = problem(Residual)
    x, y = INPUTS[Residual](), torch.randint(3, (B,))

    def loss() -> Tensor:
        share = torch.rand(B)
        return share * F.cross_entropy(net(x), y, reduction="none")

    PerExample(seed=0).backward(loss, net, 0)
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

    PerExample(CentralDifference(0.1), seed=0).backward(loss, net, 0)
    ours = net.out.weight.grad
    assert ours.dtype == net.out.weight.dtype
    Backprop().backward(loss, net, 0)
    # The last layer's gradient is known up to rounding of 2^-8, in a few places one after the other.
    assert cosine(ours.float().flatten(), net.out.weight.grad.float().flatten()) > 0.98


def test_spaces_are_chosen_by_dimension_and_overridden_by_pattern() -> None:
    net, loss = problem(Residual)

    def spaces(estimator: PerExample) -> dict[str, bool]:
        estimator.backward(loss, net, 0)
        return {k: layer["in_weights"] for k, layer in estimator.state_dict(net)["layers"].items()}

    # inner: 76 weights and at most 4 x 4 x 4 outputs; down: 80 weights and 20 outputs; out: 18 and 3. Of stem.0's
    # 4 x 8 x 8 outputs the pooling lets 64 through at most, and ReLU about half of them, against 40 weights.
    names = [f"{name}.weight" for name in ("stem.0", "stem.1", "inner", "down", "out")]
    auto = spaces(PerExample(seed=0))
    assert auto == dict(zip(names, (auto["stem.0.weight"], True, False, False, False), strict=True))
    assert spaces(ExampleDirections(seed=0)) == dict.fromkeys(names, True)
    assert spaces(ActivationPerturbation(layers={"inn*": "weights"}, seed=0))["inner.weight"]


def test_scales_balance_the_layers() -> None:
    net, loss = problem(Residual)
    estimator = PerExample(seed=0)
    for step in range(20):
        estimator.backward(loss, net, step)
    layers = estimator.state_dict(net)["layers"].values()
    ratios = [layer["scale"] ** 2 * layer["norm"] ** 0.5 / layer["dims"] ** 0.5 for layer in layers if layer["power"]]
    assert ratios == pytest.approx([ratios[0]] * 4)
    assert max(layer["scale"] ** 2 * layer["power"] for layer in layers) == pytest.approx(1.0)


def check_that_steps_repeat_from_a_saved_state(kind: type[nn.Module]) -> dict[str, Any]:
    net, loss = problem(kind)
    estimator = PerExample(seed=0)
    for step in range(5):
        estimator.backward(loss, net, step)
    saved = pickle.loads(pickle.dumps(estimator.state_dict(net)))
    expected = [gradient(estimator, loss, net, step) for step in (5, 6)]
    again = PerExample(seed=0)
    again.load_state_dict(net, saved)
    for step, g in zip((5, 6), expected, strict=True):
        assert torch.equal(gradient(again, loss, net, step), g)
    return saved


def test_steps_repeat_exactly_from_a_saved_state() -> None:
    check_that_steps_repeat_from_a_saved_state(Tied)


@pytest.mark.parametrize("kind", [Tied, Residual, Stats])
def test_bias_and_noise_are_measured_on_a_sample_of_large_weights(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_lightning.estimators.per_example._SAMPLE", 8)
    monkeypatch.setattr("zo_lightning.estimators.per_example._LEAST_ROWS", 1)
    means = check_that_steps_repeat_from_a_saved_state(kind)["shrinkage"]["means"]
    rows = {name: len(p) for name, p in kind().named_parameters()}
    sampled = {key for key, (mean, *_) in means.items() if len(mean) < rows[key.partition(":")[0]]}
    assert sampled
    assert "words.weight" not in sampled, "an embedding's rows are of different examples"


def test_a_copy_of_an_estimator_has_learned_nothing() -> None:
    net, loss = problem(Tied)
    estimator = PerExample(seed=0)
    estimator.backward(loss, net, 0)
    for twin in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        assert twin == estimator
        assert twin.state_dict(net)["layers"] == {}


def test_forward_passes_are_counted() -> None:
    from zo_lightning import Objective

    net, loss = problem(Tied)
    objective = Objective(loss, net)
    estimator = PerExample(samples=3, seed=0)
    estimator.backward(objective, net, 0)
    assert objective.forward_passes == 1 + 6  # one look at the net
    estimator.backward(objective, net, 1)
    assert objective.forward_passes == 1 + 12


def test_needs_the_loss_of_each_example() -> None:
    net, loss = problem(Tied)
    with pytest.raises(ValueError, match="needs the loss of each example"):
        PerExample(seed=0).backward(lambda: loss().mean(), net, 0)


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
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerExample(**arguments)  # type: ignore[arg-type]
