import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import (
    Backprop,
    CentralDifference,
    Coordinate,
    Directions,
    ForwardGradient,
    Gaussian,
    Objective,
    PerExample,
    Rademacher,
    Sphere,
    ZerothOrder,
)
from zo_lightning.measures import (
    cosine,
    gradient_spread,
    l2_distance,
    loss_noise,
    match_filters,
    matched,
    norm,
    norm_ratio,
    true_gradient,
)


class Noisy(nn.Module):
    """Everything that measuring might disturb: BatchNorm, dropout, a tied weight, a frozen and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.inner = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.inner.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.first(x)).tanh(), 0.5, self.training)
        return self.frozen(self.tied(self.inner(x).tanh()))


def problem() -> tuple[Noisy, Callable[[], Tensor]]:
    net = Noisy()
    x, y = torch.randn(8, 5), torch.randint(4, (8,))
    return net, lambda: F.cross_entropy(net(x), y)


def state(net: nn.Module) -> dict[str, Tensor]:
    grads = {f"{name}.grad": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: value.clone() for name, value in {**net.state_dict(), **grads}.items()} | {
        "random state": torch.get_rng_state(),
        "modes": torch.tensor([module.training for module in net.modules()]),
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_values_per_tensor_and_whole() -> None:
    a = {"w": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([4.0])}
    b = {"w": torch.tensor([[0.0, 1.0]]), "b": torch.tensor([2.0])}
    assert norm(a) == {"w": 3.0, "b": 4.0, "all": 5.0}
    assert cosine(a, b) == {"w": 0.0, "b": 1.0, "all": pytest.approx(8 / (5 * math.sqrt(5)))}
    assert l2_distance(a, b) == {"w": pytest.approx(math.sqrt(10)), "b": 2.0, "all": pytest.approx(math.sqrt(14))}
    assert norm_ratio(a, b) == {"w": 3.0, "b": 2.0, "all": pytest.approx(math.sqrt(5))}


def test_nothing_is_lost_in_the_precision_of_the_tensors() -> None:
    big = torch.full((1000,), 1000.0, dtype=torch.float16)  # whose squares overflow
    assert cosine({"w": big}, {"w": big})["all"] == pytest.approx(1)
    assert math.isnan(cosine({"w": big}, {"w": big * 0})["w"])
    assert math.isnan(norm_ratio({"w": big}, {"w": big * 0})["w"])


@pytest.mark.parametrize("measure", [cosine, l2_distance, norm_ratio, matched])
def test_what_cannot_be_compared_is_named(measure: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"w has shape \(2,\) in the first and \(3,\) in the second"):
        measure({"w": torch.ones(2)}, {"w": torch.ones(3)})
    with pytest.raises(ValueError, match="only the second has v"):
        measure({"w": torch.ones(2)}, {"w": torch.ones(2), "v": torch.ones(2)})


def test_filters_that_swapped_roles_are_found() -> None:
    torch.manual_seed(0)
    a, order = torch.randn(6, 2, 3, 3), torch.tensor([3, 1, 5, 0, 2, 4])
    b = a[order]
    assert torch.equal(b[match_filters(a, b)], a)
    weights = ({"conv": a, "fc": torch.ones(2, 2)}, {"conv": b, "fc": torch.ones(2, 2)})
    assert cosine(*weights)["conv"] < 0.5
    assert matched(*weights) == {"conv": pytest.approx(1)}  # a linear layer has no filters


def test_true_gradient_is_that_of_backprop_with_the_same_masks() -> None:
    net, loss = problem()
    objective = Objective(loss, net, seed=3)
    gradient = true_gradient(objective, net)
    torch.manual_seed(3)  # as the objective does
    Backprop().backward(loss, net, 0)
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
    assert_same(gradient, {name: expected[name] for name in gradient})
    assert {name.partition(".")[0] for name in expected} - {name.partition(".")[0] for name in gradient} == {"frozen"}
    assert not gradient["unused.weight"].any()
    assert objective.forward_passes == 0


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("measure", ["gradient", "spread", "noise"])
def test_measuring_leaves_no_trace(measure: str, with_grad: bool) -> None:
    net, loss = problem()
    net.inner.eval()
    if with_grad:
        loss().backward()
    objective = Objective(loss, net, seed=1)
    before = state(net)
    grads = [p.grad for p in net.parameters()]
    if measure == "gradient":
        true_gradient(objective, net)
    elif measure == "spread":
        gradient_spread(lambda: loss() * torch.ones(3), net)
    else:
        loss_noise(objective, net, 1e-5)
    assert_same(state(net), before)
    assert all(p.grad is grad for p, grad in zip(net.parameters(), grads, strict=True))
    assert objective.forward_passes == 0


def test_measuring_leaves_what_the_step_gave_to_the_buffers() -> None:
    """An objective's own guard would put back those from before the step."""
    net, loss = problem()
    objective = Objective(loss, net, seed=1)
    objective()
    objective.commit()
    before = state(net)
    true_gradient(objective, net)
    loss_noise(objective, net, 1e-5)
    assert_same(state(net), before)
    assert net.norm.num_batches_tracked == 1


def test_weights_come_back_when_the_loss_fails() -> None:
    net, loss = problem()
    before = state(net)
    calls = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return loss()

    with pytest.raises(RuntimeError, match="broken"):
        loss_noise(failing, net, 1e-5)
    assert_same(state(net), before)


def test_a_loss_without_gradient_is_refused() -> None:
    net, loss = problem()
    with pytest.raises(ValueError, match="needs the graph of the loss"):
        true_gradient(lambda: loss().detach(), net)


@pytest.mark.parametrize("q", [1, 5, 40])
@pytest.mark.parametrize("u", [Sphere(), Rademacher(), Coordinate(), Gaussian()], ids=lambda u: type(u).__name__)
def test_expected_cosine_of_isotropic_directions(u: Directions, q: int) -> None:
    d, n = 40, 2000 // q
    g = torch.linspace(-1, 1, d)
    params = [torch.zeros(10), torch.zeros(30)]
    estimates = []
    for step in range(n):
        directions = torch.stack([torch.cat(u.draw(params, 0, step, index).tensors()) for index in range(q)])
        estimates.append((directions @ g) @ directions / q)
    estimate = torch.stack(estimates)
    estimator = ZerothOrder(u, samples=q)
    # ‖ĝ‖² is about the mean of q values d c² with c near normal, so a mean of n has a relative deviation of
    # √(2 / nq) = 0.03, and its root half of that; the Gaussian's ‖u‖² adds 2/d. 5 % are three deviations.
    layers = ((slice(0, d), d), (slice(0, 10), 10))
    for part, d_part in layers[:1] if isinstance(u, Coordinate) else layers:
        share = float(g[part].square().sum() / g.square().sum())
        measured = g[part].norm() / estimate[:, part].square().sum(1).mean().sqrt()
        assert estimator.expected_cosine(d_part, share) == pytest.approx(float(measured), rel=0.05)
    assert estimator.expected_cosine(10**6) == pytest.approx(math.sqrt(q / 1e6), rel=1e-4)
    assert ForwardGradient(u, samples=q).expected_cosine(d) == estimator.expected_cosine(d)


def test_expected_cosine_of_backpropagation() -> None:
    assert Backprop().expected_cosine(100) == 1


def test_expected_cosine_with_a_direction_for_every_example() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(20, 3), torch.randn(16, 20), torch.randint(3, (16,))

    def losses() -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    estimator = PerExample(CentralDifference(1e-2), samples=2, feedback=0, seed=0, space="weights")
    gradient = true_gradient(losses, net)
    n, cosines, state = 200, [], estimator.init(net)
    for step in range(n):
        net.zero_grad()
        estimator.backward(losses, net, step, state)
        cosines.append(cosine(gradient, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}))
    spread = sum(gradient_spread(losses, net, seed) for seed in range(50)) / 50
    expected = estimator.expected_cosine(63, examples=16, spread=spread)
    # The mean of n cosines with standard deviation of at most 0.15 each, and of 50 spreads: within a tenth.
    assert sum(c["all"] for c in cosines) / n == pytest.approx(expected, rel=0.1)


def test_expected_cosine_where_most_of_the_gradient_is_known() -> None:
    expected = [PerExample(space="weights").expected_cosine(1000, share, examples=10) for share in (1.0, 0.1, 0.0)]
    assert expected == [pytest.approx(1 / math.sqrt(1 + 99.9)), pytest.approx(1 / math.sqrt(1 + 9.99)), 1.0]


def test_gradient_spread_of_equal_and_of_opposite_examples() -> None:
    w = nn.Linear(1, 1, bias=False)
    mean = sum(gradient_spread(lambda: w.weight.flatten() * torch.ones(8), w, seed) for seed in range(2000)) / 2000
    assert mean == pytest.approx(1.48, rel=0.1)  # E max(1, χ²₁), with a deviation of 1.1 / √2000
    alike = torch.tensor([1.0, -1.0, 1.0, -0.5])
    values = [gradient_spread(lambda: w.weight.flatten() * alike, w, seed) for seed in range(2000)]
    exact = float(alike.square().mean() / alike.mean() ** 2)
    assert sum(values) / 2000 == pytest.approx(exact, rel=0.15)  # relative deviation of one √2, and of 2000 0.03


@pytest.mark.parametrize("scale", [1e-6, 1e-3])
def test_loss_noise_is_found_under_a_smooth_loss(scale: float) -> None:
    torch.manual_seed(0)
    net, generator = nn.Linear(6, 2).double(), torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        noise = scale * torch.randn((), generator=generator, dtype=torch.float64)
        return net.weight.sin().sum() + noise

    measured = [loss_noise(loss, net, 1e-6) for _ in range(50)]
    # Each is from four correlated squares; the mean of fifty is within a fifth.
    assert sum(measured) / 50 == pytest.approx(scale, rel=0.2)


def test_loss_noise_of_float32_is_near_its_precision() -> None:
    net, loss = problem()
    noise = loss_noise(loss, net, 1e-5)
    assert 1e-8 < noise < 1e-6
    assert 1e-3 < loss_noise(lambda: loss().bfloat16(), net, 1e-5) < 1e-1  # seven probes of a coarse loss
