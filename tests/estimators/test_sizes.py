"""The part of the gradient along the weights themselves follows from what larger ones do to the net's output."""

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from zo_lightning.estimators.per_example import PerExample
from zo_lightning.estimators.per_example.state import PerExampleState
from zo_lightning.objective import Objective

B, C = 12, 5
x = torch.randn(B, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
y = torch.arange(B) % C


class Twice(nn.Module):
    """One layer, used twice, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(128, 128, bias=False), nn.Linear(128, C)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.last(self.inner(self.inner(images.flatten(1)).relu()).relu())


class Masked(nn.Module):
    """A net that rules out its last class."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(128, 9), nn.ReLU(), nn.Linear(9, C + 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.net(images).masked_fill(torch.arange(C + 1) == C, -torch.inf)


def rectified() -> nn.Module:
    """A net that is homogeneous in the weights of each layer, whose biases are 0 but for the last."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, C)
    )
    nn.init.zeros_(net[0].bias)
    nn.init.zeros_(net[4].bias)
    return net


def normalised() -> nn.Module:
    """A net with normalisations after its convolution, and before its last layer."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 9),
        nn.LayerNorm(9),
        nn.Linear(9, C),
    )


def estimated(make: Callable[[], nn.Module], estimator: PerExample) -> tuple[nn.Module, PerExampleState, list[Tensor]]:
    """A net in float64, a state after some steps at the same weights, and the gradients."""
    torch.manual_seed(1)
    net = make().double()
    state = estimator.init(net)
    for step in range(10):
        net.zero_grad()
        estimator.backward(lambda: cross_entropy(net(x), y, reduction="none"), net, step, state)
    return net, state, list(torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters())))


def along(net: nn.Module, name: str, grads: dict[str, Tensor]) -> float:
    """``<p, g>`` of the weights of a layer."""
    return sum(
        float((p.detach() * grads[key]).sum()) for key, p in net.named_parameters() if key.startswith(f"{name}.")
    )


@pytest.mark.parametrize(("make", "layers", "power"), [(rectified, ["0", "4"], 1), (Twice, ["inner"], 2)])
def test_is_exact_where_outputs_are_homogeneous(make: Callable[[], nn.Module], layers: list[str], power: int) -> None:
    """By Euler's theorem, twice as much for weights that are used twice; ``h`` alone is far off."""
    net, state, exact = estimated(make, PerExample(seed=0))
    truth = dict(zip(dict(net.named_parameters()), exact, strict=True))
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    last = list(net.parameters())[-1]
    for name in layers:
        slope, shift = state.sizes.lines[f"{name}.weight"]
        # Exact, but for the output they are fitted to: the mean of two that are displaced by 1e-2, off by some 1e-4.
        assert float(slope) == pytest.approx(power, rel=1e-2)
        assert shift is not None and torch.allclose(shift, -power * last, rtol=1e-2, atol=1e-2)
        assert along(net, name, found) == pytest.approx(along(net, name, truth), rel=1e-2)


def test_the_size_of_what_is_normalised_is_no_matter() -> None:
    net, state, exact = estimated(normalised, PerExample(seed=0))
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for name in ("0", "4"):
        slope, _ = state.sizes.lines[f"{name}.weight"]
        assert abs(float(slope)) < 1e-2  # but for ε in the normalisation, and the bias that LayerNorm is moved by
        largest = max(float(p.detach().norm() * g.norm()) for p, g in zip(net.parameters(), exact, strict=True))
        assert abs(along(net, name, found)) < 1e-2 * largest


def test_what_is_unbiased_is_left_alone() -> None:
    assert not estimated(rectified, PerExample(correction=1.0, seed=0))[1].sizes.lines
    assert not estimated(rectified, PerExample(feedback=0.0, seed=0))[1].sizes.lines


def test_an_output_of_minus_infinity_is_left_out() -> None:
    net, state, _ = estimated(Masked, PerExample(seed=0))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert float(state.sizes.lines["net.1.weight"][0]) == pytest.approx(1, rel=0.2)  # of a net with small biases


def test_one_layer_a_step_is_measured_at_first() -> None:
    net = rectified().double()
    estimator = PerExample(seed=0)
    state, objective = estimator.init(net), Objective(lambda: cross_entropy(net(x), y, reduction="none"), net)
    passes = []
    for step in range(52):
        before = objective.forward_passes
        estimator.backward(objective, net, step, state)
        passes.append(objective.forward_passes - before)
    # A look; two layers once something is predicted; and one again in the first step that is a multiple of 50.
    assert passes == [3, 4, 4, *[2] * 47, 4, 2]
    assert not state.sizes.left


def test_weights_do_not_run_away() -> None:
    """At a rate that backpropagation bears, at 0.1; with ``h`` alone the loss was above 5 by then, and rising."""
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = interpolate(((images - images.mean()) / images.std()).float().view(-1, 1, 8, 8), size=(14, 14))

    def trained(estimator: PerExample | None) -> float:
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)),
        )
        optimizer = torch.optim.Adam(net.parameters(), 0.03, (0.9, 0.99))
        state = None if estimator is None else estimator.init(net)
        generator, losses = torch.Generator().manual_seed(0), []
        for step in range(400):
            at = torch.randint(len(images), (64,), generator=generator)
            optimizer.zero_grad()

            def of_examples(at: Tensor = at) -> Tensor:
                return cross_entropy(net(images[at]), labels[at], reduction="none")

            if estimator is None:
                loss = of_examples().mean()
                loss.backward()
            else:
                loss = estimator.backward(of_examples, net, step, state)
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[-100:]) / 100

    assert trained(PerExample(seed=0)) < 5 * trained(None)
