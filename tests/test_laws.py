"""The laws that every component obeys, each asserted for every component in one table.

A new distribution or estimator gets all of these tests by adding a row.
"""

import gc
import math
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from zo_lightning import (
    Backprop,
    Batched,
    CentralDifference,
    Centred,
    Coordinate,
    DirectFeedbackAlignment,
    Directions,
    ForwardDifference,
    ForwardGradient,
    Gaussian,
    GradientEstimator,
    LowRank,
    NonFiniteLoss,
    Objective,
    PerExample,
    Rademacher,
    Sphere,
    ZerothOrder,
)
from zo_lightning.perturbed.weights import Weights

SHAPES = ((3, 2), (4,))
D = 10

# Each with the largest fourth moment E[uⱼ⁴] of its entries: normal 3, sphere 3d/(d+2), signs 1, one coordinate d, and
# for the sum of r products of normals over √r: (9r + 3r(r − 1)) / r² = 3 + 6/r.
DIRECTIONS: dict[str, tuple[Directions, float]] = {
    "gaussian": (Gaussian(), 3.0),
    "sphere": (Sphere(), 3 * D / (D + 2)),
    "rademacher": (Rademacher(), 1.0),
    "coordinate": (Coordinate(), D),
    "low_rank_1": (LowRank(rank=1), 9.0),
    "low_rank_2": (LowRank(rank=2), 6.0),
    "low_rank_lazy": (LowRank(rank=1, every=3), 3 * 9.0),  # three steps share B: a third as many are independent
    # Signs aⱼ zⱼ summed have the fourth moment 3 (Σ aⱼ²)² − 2 Σ aⱼ⁴: in rows of 4, with a = ¾ and thrice ¼, 1.03.
    "centred": (Centred(), 1.04),
}
WEIGHT_SPACE: dict[str, Callable[[Directions, int], GradientEstimator]] = {
    "central": lambda u, q: ZerothOrder(u, CentralDifference(1e-3), samples=q, seed=0),
    "forward": lambda u, q: ZerothOrder(u, ForwardDifference(1e-3), samples=q, seed=0),
    "forward_gradient": lambda u, q: ForwardGradient(u, samples=q, seed=0),
    "batched": lambda u, q: ZerothOrder(u, CentralDifference(1e-3), Batched(), samples=q, seed=0),
    "batched-forward": lambda u, q: ZerothOrder(u, ForwardDifference(1e-3), Batched(2), samples=q, seed=0),
}
Make = Callable[[int], GradientEstimator]
FORWARD_ONLY: dict[str, Make] = {
    **{
        f"{name}-{of}": lambda q, make=make, u=u: make(u, q)
        for name, make in WEIGHT_SPACE.items()
        for of, (u, _) in DIRECTIONS.items()
    },
    "per_example-outputs": lambda q: PerExample(samples=q, space="activations", seed=0),
    "per_example-weights": lambda q: PerExample(samples=q, space="weights", seed=0),
    "per_example-values": lambda q: PerExample(samples=q, loss_gradient="values", seed=0),
    "per_example-forward": lambda q: PerExample(ForwardDifference(1e-3), samples=q, seed=0),
    "per_example-no_feedback": lambda q: PerExample(samples=q, feedback=0, seed=0),
}
directions = pytest.mark.parametrize(("u", "kurtosis"), DIRECTIONS.values(), ids=DIRECTIONS.keys())
weight_space = pytest.mark.parametrize("make", WEIGHT_SPACE.values(), ids=WEIGHT_SPACE.keys())
forward_only = pytest.mark.parametrize("make", FORWARD_ONLY.values(), ids=FORWARD_ONLY.keys())
LAYERWISE: dict[str, Make] = {"direct_feedback_alignment": lambda q: DirectFeedbackAlignment(seed=0)}
PROBING = {**LAYERWISE, **FORWARD_ONLY}
probing = pytest.mark.parametrize("make", PROBING.values(), ids=PROBING.keys())
EVERY: dict[str, Make] = {"backprop": lambda q: Backprop(), **PROBING}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


def params() -> list[Tensor]:
    return [torch.zeros(shape) for shape in SHAPES]


def kept(u: Directions, tensors: list[Tensor]) -> list[Tensor]:
    """The part of some tensors in the space of the directions: all of it, but for ``Centred``."""
    if not isinstance(u, Centred):
        return tensors
    return [t - t.flatten(1).mean(1).view(-1, *[1] * (t.ndim - 1)) if t.ndim > 1 else t for t in tensors]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


class Noisy(nn.Module):
    """A net with everything that a probe might disturb: BatchNorm, dropout, a tied weight, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.inner = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.inner.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.first(x)).tanh(), 0.5, self.training)
        return self.last(self.frozen(self.tied(self.inner(x).tanh())).tanh())


def problem() -> tuple[Noisy, Callable[[], Tensor]]:
    net = Noisy()
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    return net, lambda: F.cross_entropy(net(x), y, reduction="none")  # per example; others take the mean


def estimated(estimator: GradientEstimator, loss: Callable[[], Tensor], net: nn.Module, step: int = 0) -> Tensor:
    """The estimate as one vector, from a state that knows nothing yet."""
    net.zero_grad()
    estimator.backward(loss, net, step, estimator.init(net))
    return flat([p.grad for p in net.parameters() if p.grad is not None])


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_unchanged(net: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def is_batched(estimator: GradientEstimator) -> bool:
    return isinstance(estimator, ZerothOrder) and isinstance(estimator.evaluation, Batched)


@directions
def test_law_1_second_moment_is_the_identity_or_a_projection(u: Directions, kurtosis: float) -> None:
    n = 4000
    draws = torch.stack([flat(u.draw(params(), 0, step, 0).tensors()) for step in range(n)]).double()
    # An entry of the mean of uuᵀ has variance at most E[uᵢ²uⱼ²] / n ≤ kurtosis / n; five of its standard deviations.
    tolerance = 5 * math.sqrt(kurtosis / n)
    basis = torch.eye(D, dtype=torch.float64)
    second = torch.stack([flat(kept(u, [e[:6].view(3, 2), e[6:]])) for e in basis])
    assert torch.allclose(draws.T @ draws / n, second, rtol=0, atol=tolerance)
    assert draws.square().sum(1).mean().item() == pytest.approx(second.trace().item(), rel=tolerance)


@directions
@weight_space
def test_law_1_the_mean_estimate_tends_to_the_gradient(
    make: Callable[[Directions, int], GradientEstimator], u: Directions, kurtosis: float
) -> None:
    torch.manual_seed(1)
    net, q = nn.Linear(4, 2), 2000
    x, y = torch.randn(16, 4), torch.randn(16, 2)

    def loss() -> Tensor:
        return F.mse_loss(net(x).tanh(), y)

    estimated(Backprop(), loss, net)
    g = flat(kept(u, [p.grad for p in net.parameters() if p.grad is not None]))
    estimate = estimated(make(u, q), loss, net)
    # E‖ĝ − g‖² ≤ kurtosis · d ‖g‖² / q, whence cos ≥ 1/√(1 + that); twice the variance allows for chance.
    assert F.cosine_similarity(g, estimate, 0).item() > 1 / math.sqrt(1 + 2 * kurtosis * len(g) / q)
    assert (estimate.norm() / g.norm()).item() == pytest.approx(1, abs=2 * math.sqrt(kurtosis * len(g) / q))


@directions
def test_law_2_replay(u: Directions, kurtosis: float) -> None:
    keys = [(seed, step, index) for seed in (0, 1, 2**40) for step in (0, 1) for index in (0, 7)]
    drawn = {key: flat(u.draw(params(), *key).tensors()) for key in keys}
    torch.manual_seed(99)
    for key in reversed(keys):
        assert torch.equal(flat(u.draw(params(), *key).tensors()), drawn[key])
        direction = u.draw(params(), *key)
        assert torch.equal(flat([direction[1], direction[0]][::-1]), drawn[key]), "a tensor at a time, in any order"
    if not isinstance(u, Coordinate):  # of which there are only d
        assert len({tuple(value.tolist()) for value in drawn.values()}) == len(keys)


@weight_space
def test_law_2_without_a_seed_it_is_that_of_pytorch(make: Callable[[Directions, int], GradientEstimator]) -> None:
    """In all directions of a step, though probes set PyTorch's seed for their own random numbers."""
    seeded: Any = make(Gaussian(), 3)
    ends = []
    for seed in (7, None):
        net, loss = problem()
        torch.manual_seed(7)
        ends.append(estimated(replace(seeded, seed=seed), loss, net))
    assert torch.equal(*ends)


@directions
@weight_space
@pytest.mark.parametrize("lean", [False, True])
def test_law_2_an_estimate_is_rebuilt_from_its_slopes(
    make: Callable[[Directions, int], GradientEstimator], u: Directions, kurtosis: float, lean: bool
) -> None:
    net, loss = problem()
    estimator = make(u, 3)
    estimate = estimator.estimate(Objective(loss, net), net, 7, estimator.init(net), lean)
    gradients = [(p, g.clone()) for p, g in estimate.gradients]
    slopes, weights = estimate.slopes, Weights.of(net)
    value = float(estimate.loss)
    again = estimator.replay(weights, 7, value, slopes, estimator.init(net), lean)
    assert float(again.loss) == value and len(slopes) == 3
    for (p, g), (q, h) in zip(gradients, again.gradients, strict=True):
        assert p is q and torch.equal(g, h)


def test_law_2_what_slopes_do_not_make_says_so() -> None:
    net, _ = problem()
    with pytest.raises(NotImplementedError, match="PerExample cannot be replayed"):
        PerExample().replay(Weights.of(net), 0, 1.0, (1.0,), PerExample().init(net))


@probing
def test_law_3_weights_and_buffers_come_back(make: Make) -> None:
    net, loss = problem()
    before, objects, versions = state(net), list(net.parameters()), [p._version for p in net.parameters()]
    estimated(make(3), loss, net)
    assert_unchanged(net, before)
    assert all(p is q and type(p) is nn.Parameter for p, q in zip(net.parameters(), objects, strict=True))
    assert [p._version for p in net.parameters()] == versions, "a probe never writes to a weight"


@every
def test_law_3_a_module_that_is_reachable_by_two_names_keeps_its_parameters(make: Make) -> None:
    net, loss = problem()
    net.again = net.first  # type: ignore[assignment]
    objects = dict(net.named_parameters(remove_duplicate=False))
    for step in range(2):
        assert estimated(make(1), loss, net, step).any()
    assert all(p is objects[name] for name, p in net.named_parameters(remove_duplicate=False))
    assert all(p.requires_grad == (not name.startswith("frozen")) for name, p in objects.items())


@every
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), NonFiniteLoss(math.nan)])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_law_3_also_after_an_error(make: Make, error: BaseException, at: int) -> None:
    estimator = make(3)
    at = 1 if estimator.is_exact or isinstance(estimator, DirectFeedbackAlignment) else at  # which ask once
    at = min(at, 2) if is_batched(estimator) else at  # once alone, and once for all others
    net, loss = problem()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before, randomness = state(net), random_state()
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        value = loss()
        if calls == at:
            raise error
        return value

    with pytest.raises(type(error)):
        estimator.backward(failing, net, 0, estimator.init(net))
    assert_unchanged(net, before)
    assert random_state()[: 1 if estimator.is_exact else 3] == randomness[: 1 if estimator.is_exact else 3]
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in net.parameters())


def random_state() -> tuple[bytes, object, bytes]:
    return bytes(torch.get_rng_state().tolist()), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]


LEAN = {name: make for name, make in FORWARD_ONLY.items() if make(1).can_be_lean}


@pytest.mark.parametrize("make", LEAN.values(), ids=LEAN.keys())
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam, zo.AdaMM, zo.SignSGD])
def test_law_5_the_lean_update_is_the_ordinary_one(make: Make, q: int, rule: type[torch.optim.Optimizer]) -> None:
    ends = []
    for lean in (False, True):
        net, loss = problem()
        optimizer, estimator = rule(net.parameters(), lr=1e-2), make(q)  # type: ignore[call-arg]
        state = estimator.init(net)
        for step in range(3):
            if lean:
                estimator.update(optimizer, loss, net, step, state)
            else:
                estimator.backward(loss, net, step, state)
                optimizer.step()
                optimizer.zero_grad()
        ends.append(flat(list(net.parameters())))
    assert torch.equal(*ends)


@probing
def test_law_4_a_probe_leaves_the_global_random_state(make: Make) -> None:
    net, loss = problem()
    before = random_state()

    def noisy() -> Tensor:
        return loss() + random.random() + np.random.rand() + torch.rand(())

    estimated(make(2), noisy, net)
    assert random_state() == before


@forward_only
def test_law_4_probes_of_one_step_share_python_and_numpy_random_numbers(make: Make) -> None:
    """Or differences of the loss would be divided noise: 1 / 2e-3 times larger than the slopes here."""
    net, loss = problem()
    net.eval()

    def noisy() -> Tensor:
        return loss() + random.random() + float(np.random.rand())

    plain, shifted = (estimated(make(1), f, net) for f in (loss, noisy))
    assert torch.allclose(plain, shifted, rtol=1e-2, atol=1e-2 * float(plain.norm()))


def test_law_4_probes_of_one_step_share_their_dropout_masks() -> None:
    net, loss = problem()
    first, again, other = Objective(loss, net, seed=1), Objective(loss, net, seed=1), Objective(loss, net, seed=2)
    assert first() == first() == again() != other()


def test_law_4_a_tied_weight_is_perturbed_once() -> None:
    net, loss = problem()
    seen: list[Tensor] = []

    def spy() -> Tensor:
        seen.append(net.tied.weight.detach().clone())  # a use sees the displaced weight
        return loss()

    estimated(ZerothOrder(Rademacher(), CentralDifference(0.25), seed=0), spy, net)
    for perturbed in seen:
        assert torch.allclose((perturbed - net.tied.weight).abs(), torch.tensor(0.25))
    assert net.tied.weight.grad is net.inner.weight.grad is not None


@probing
def test_law_4_frozen_weights_are_left_alone(make: Make) -> None:
    net, loss = problem()
    estimated(make(1), loss, net)
    assert net.frozen.weight.grad is None
    assert net.first.weight.grad is not None


def asks_autograd_for_the_loss(estimator: GradientEstimator) -> bool:
    return isinstance(estimator, PerExample) and estimator.loss_gradient == "auto" and estimator.feedback > 0


STRICT = {name: make for name, make in FORWARD_ONLY.items() if not asks_autograd_for_the_loss(make(1))}
LOSS_ALONE = {name: make for name, make in FORWARD_ONLY.items() if name not in STRICT}


@pytest.mark.parametrize("make", STRICT.values(), ids=STRICT.keys())
def test_no_graph_is_built(make: Make) -> None:
    net, loss = problem()

    def watched() -> Tensor:
        assert not torch.is_grad_enabled()
        value = loss()
        assert value.grad_fn is None
        return value

    def fail(tensor: Tensor) -> Tensor:
        raise AssertionError("autograd saved a tensor")

    with torch.autograd.graph.saved_tensors_hooks(fail, lambda tensor: tensor):
        estimated(make(2), watched, net)


@pytest.mark.parametrize("make", LOSS_ALONE.values(), ids=LOSS_ALONE.keys())
def test_no_graph_is_built_through_the_net(make: Make) -> None:
    net, loss = problem()

    def in_a_layer(layer: nn.Module, args: object) -> None:
        assert not torch.is_grad_enabled()

    def of_the_loss(tensor: Tensor) -> Tensor:
        assert tensor.numel() <= 8 * 3, "the graph is that of the loss as a function of the logits"
        return tensor

    for layer in net.children():
        layer.register_forward_pre_hook(in_a_layer)
    with torch.autograd.graph.saved_tensors_hooks(of_the_loss, lambda tensor: tensor):
        estimated(make(2), loss, net)


@every
def test_law_8_gradients_accumulate(make: Make) -> None:
    net, loss = problem()
    net.eval()
    estimator = make(2)
    first, second = (estimated(estimator, loss, net, step) for step in (0, 1))
    net.zero_grad()
    for step in (0, 1):
        estimator.backward(loss, net, step, estimator.init(net))
    assert torch.equal(flat([p.grad for p in net.parameters() if p.grad is not None]), first + second)


@every
def test_gradients_have_the_strides_of_the_weights(make: Make) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net[3].weight = nn.Parameter(torch.randn(12, 3).T)
    x, y = torch.randn(4, 2, 4, 4), torch.randint(3, (4,))
    estimated(make(2), lambda: F.cross_entropy(net(x), y, reduction="none"), net)
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.stride() == p.stride(), name


class Held(nn.Module):
    """A net whose weights are used by functions alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b, self.v = (nn.Parameter(torch.randn(shape)) for shape in ((4, 5), (4,), (3, 4)))


PLAIN: dict[str, Callable[[list[Tensor]], object]] = {
    "list": lambda tensors: tensors,
    "tuple": tuple,
    "generator": iter,
    "dict": lambda tensors: dict(zip("wbv", tensors, strict=True)),
    "nested": lambda tensors: {"first": tensors[:2], "last": {"v": tensors[2]}},
    "named": lambda tensors: zip("wbv", tensors, strict=True),
}


def functional(w: Tensor, b: Tensor, v: Tensor) -> Callable[[], Tensor]:
    x, y = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    return lambda: F.cross_entropy(F.linear(F.linear(x, w, b).tanh(), v), y, reduction="none")


@every
@pytest.mark.parametrize("form", PLAIN.values(), ids=PLAIN.keys())
def test_law_9_plain_tensors_are_trained_as_those_of_a_module(
    make: Make, form: Callable[[list[Tensor]], object]
) -> None:
    net, estimator = Held(), make(2)
    estimated(estimator, functional(net.w, net.b, net.v), net)
    tensors = [p.detach().clone().requires_grad_() for p in net.parameters()]
    before = [t.detach().clone() for t in tensors]
    estimator.backward(functional(*tensors), form(tensors), 0, estimator.init(form(tensors)))  # type: ignore[arg-type]
    for tensor, p, start in zip(tensors, net.parameters(), before, strict=True):
        assert tensor.grad is not None and p.grad is not None and torch.equal(tensor.grad, p.grad)
        assert torch.equal(tensor, start) and not isinstance(tensor, nn.Parameter)


@pytest.mark.parametrize("make", LEAN.values(), ids=LEAN.keys())
def test_law_9_the_lean_update_takes_plain_tensors(make: Make) -> None:
    ends = []
    for lean in (False, True):
        tensors = {name: p.detach().clone().requires_grad_() for name, p in Held().named_parameters()}
        optimizer, estimator = torch.optim.Adam(tensors.values(), lr=1e-2), make(2)
        loss, known = functional(**tensors), estimator.init(tensors)
        if lean:
            estimator.update(optimizer, loss, tensors, 0, known)
        else:
            estimator.backward(loss, tensors, 0, known)
            optimizer.step()
        ends.append(flat(list(tensors.values())))
    assert torch.equal(*ends)


ZEROTH_ORDER = {name: make for name, make in FORWARD_ONLY.items() if not isinstance(make(1), ForwardGradient)}
GRAPH = {name: make for name, make in EVERY.items() if name not in ZEROTH_ORDER}
OUTSIDE: dict[str, Callable[[Tensor], object]] = {
    "array": lambda losses: losses.detach().numpy(),
    "numpy_scalar": lambda losses: losses.detach().numpy().mean(),
    "float": lambda losses: losses.mean().item(),
}


@pytest.mark.parametrize("make", ZEROTH_ORDER.values(), ids=ZEROTH_ORDER.keys())
@pytest.mark.parametrize("outside", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_law_10_losses_may_be_numbers_and_arrays(make: Make, outside: Callable[[Tensor], object]) -> None:
    net, loss = problem()
    estimator = make(2)
    if is_batched(estimator):
        with pytest.raises(ValueError, match=r"Batched cannot evaluate .*\. Take OneByOne\(\)"):
            estimated(estimator, lambda: outside(loss()), net)  # type: ignore[arg-type,return-value]
        return
    if estimator.needs_example_losses and isinstance(outside(torch.ones(2)), float | np.floating):
        with pytest.raises(ValueError, match="needs the loss of each example"):
            estimated(estimator, lambda: outside(loss()), net)  # type: ignore[arg-type,return-value]
        return
    inside = (
        estimated(replace(estimator, loss_gradient="values"), loss, net)
        if isinstance(estimator, PerExample)
        else estimated(estimator, loss, net)
    )
    found = estimated(estimator, lambda: outside(loss()), net)  # type: ignore[arg-type,return-value]
    assert found.dtype == inside.dtype
    # The mean in float64, or by NumPy, rounds float32 losses of order 1 by 1e-7: slopes by 3e-4 at most, since mu is
    # 1e-3, times entries of u up to √d (Coordinate).
    assert torch.allclose(found, inside, atol=3e-4 * math.sqrt(len(inside)), rtol=0)


@pytest.mark.parametrize("make", GRAPH.values(), ids=GRAPH.keys())
@pytest.mark.parametrize("outside", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_law_10_derivatives_need_a_graph(make: Make, outside: Callable[[Tensor], object]) -> None:
    net, loss = problem()
    before = state(net)
    with pytest.raises(ValueError, match="ZerothOrder needs values alone"):
        estimated(make(1), lambda: outside(loss()), net)  # type: ignore[arg-type,return-value]
    if not make(1).is_exact:
        assert_unchanged(net, before)


@every
def test_an_estimate_leaves_nothing_behind_that_holds_the_module(make: Make) -> None:
    """No reference in a circle: the memory of a large net would stay until Python looks for such."""
    net, loss = problem()
    estimated(make(2), loss, net)  # PyTorch imports some of its parts at the first call, and they hold frames
    del net, loss
    gc.collect()
    gc.disable()
    try:
        net, loss = problem()
        estimated(make(2), loss, net)
        module = weakref.ref(net)
        del net, loss
        assert module() is None
    finally:
        gc.enable()


COMPILED = (
    "central-rademacher",
    "forward-centred",
    "forward_gradient-gaussian",
    "batched-forward-gaussian",
    "direct_feedback_alignment",
    "per_example-outputs",
    "per_example-weights",
)


@pytest.mark.parametrize("by", ["module", "method", "forward", "loss", "step"])
@pytest.mark.parametrize("name", COMPILED)
def test_law_11_a_compiled_net_has_the_estimate_of_the_net(name: str, by: str) -> None:
    """Whatever was compiled, and from the second step on, when no pass has to be watched, too."""

    def three_steps(loss: Callable[[], Tensor], run: Callable[[Any], Any] = lambda function: function) -> list[Tensor]:
        estimator, found = EVERY[name](2), []
        known = estimator.init(net)
        backward = run(lambda step: estimator.backward(loss, net, step, known))
        for step in range(3):
            net.zero_grad()
            backward(step)
            found.append(flat([p.grad for p in net.parameters() if p.grad is not None]))
        return found

    net, loss = problem()
    plain, before, run = three_steps(loss), state(net), partial(torch.compile, backend="eager")
    if by == "module":
        net.inner = run(net.inner)  # pyright: ignore[reportAttributeAccessIssue]
    elif by == "method":
        net.compile(backend="eager")
    elif by == "forward":
        net.inner.forward = run(net.inner.forward)
    elif by == "loss":
        loss = run(loss)
    again = three_steps(loss, run) if by == "step" else three_steps(loss)
    # Losses of about 1 are rounded by 1e-7, and their differences divided by 1e-3.
    torch.testing.assert_close(again, plain, rtol=0, atol=2e-3)
    assert_unchanged(net, dict(zip(net.state_dict(), before.values(), strict=True)))
    torch._dynamo.reset()
