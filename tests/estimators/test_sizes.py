"""The part of the gradient along the weights themselves follows from what larger ones do to the net's output."""

from collections.abc import Callable
from typing import Any

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
    """A net that rules out a class of each example, by a large negative number or by minus infinity."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.first, self.last, self.value = nn.Linear(128, 9, bias=False), nn.Linear(9, C, bias=False), value

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        ruled_out = (torch.arange(len(images)).unsqueeze(1) + 1) % C == torch.arange(C)
        return self.last(self.first(images.flatten(1)).relu()).masked_fill(ruled_out, self.value)


def rectified() -> nn.Module:
    """A net that is homogeneous in the weights of each layer, whose biases are 0 but for the last."""
    net: Any = nn.Sequential(
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


def estimated(make: Callable[[], nn.Module], estimator: PerExample) -> tuple[Any, PerExampleState, list[Tensor]]:
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
        slope, shift, _ = state.sizes.lines[f"{name}.weight"]
        # With 12 examples a line is drawn to the one through the origin, by less than 1e-2 here; outputs that grow by
        # the square have a mean at 1 ± 1/16 times the size that is 2⁻⁸ larger; those of a step are displaced by 1e-2.
        assert float(slope) == pytest.approx(power, rel=1e-2)
        assert shift is not None and torch.allclose(shift, -power * last, rtol=0, atol=1e-2)
        assert along(net, name, found) == pytest.approx(along(net, name, truth), rel=2e-2)


def test_the_size_of_what_is_normalised_is_no_matter() -> None:
    net, state, exact = estimated(normalised, PerExample(seed=0))
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for name in ("0", "4"):
        slope = state.sizes.lines[f"{name}.weight"].slope
        assert abs(float(slope)) < 1e-2  # but for ε in the normalisation, and the bias that LayerNorm is moved by
        largest = max(float(p.detach().norm() * g.norm()) for p, g in zip(net.parameters(), exact, strict=True))
        assert abs(along(net, name, found)) < 1e-2 * largest


def test_what_is_unbiased_is_left_alone() -> None:
    assert not estimated(rectified, PerExample(correction=1.0, seed=0))[1].sizes.lines
    assert not estimated(rectified, PerExample(feedback=0.0, seed=0))[1].sizes.lines


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_outputs_that_the_loss_ignores_are_left_out(value: float) -> None:
    net, state, _ = estimated(lambda: Masked(value), PerExample(seed=0))
    assert state.output is not None and state.output.modules == ("",)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert float(state.sizes.lines["first.weight"].slope) == pytest.approx(1, rel=1e-6)


def test_what_has_no_gradient_gets_none() -> None:
    """Rows of an embedding that a batch does not ask for, and its padding."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Embedding(9, 6, padding_idx=0), nn.Flatten(), nn.Linear(18, C)).double()
    nn.init.normal_(net[0].weight)
    estimator, words = PerExample(seed=0), torch.arange(3 * B).view(B, 3) % 4  # 0 to 3 of 0 to 8
    state = estimator.init(net)
    for step in range(5):
        net.zero_grad()
        estimator.backward(lambda: cross_entropy(net(words), y, reduction="none"), net, step, state)
    assert "0.weight" in state.sizes.lines
    assert (net[0].weight.grad != 0).any(1).tolist() == [False, *[True] * 3, *[False] * 5]


def test_a_line_holds_while_weights_are_about_as_large() -> None:
    net, state, _ = estimated(rectified, PerExample(seed=0))
    weight = net[4].weight

    def change() -> float:
        """Of the gradient by a wrong line."""
        found = []
        for slope in (1.0, 3.0):
            state.sizes.lines["4.weight"] = state.sizes.lines["4.weight"]._replace(slope=torch.tensor(slope).double())
            again = PerExampleState()
            again.load_state_dict(state.state_dict())
            net.zero_grad()
            PerExample(seed=0).backward(lambda: cross_entropy(net(x), y, reduction="none"), net, 10, again)
            found.append(weight.grad.clone())
        return float((found[0] - found[1]).norm())

    assert change() > 0
    with torch.no_grad():
        weight.mul_(4)
    assert change() == 0


def test_a_loss_that_larger_weights_do_not_suit_is_trained() -> None:
    net = rectified().double()
    estimator, largest = PerExample(seed=0), 1.02 * float(net(x).detach().abs().max())
    state = estimator.init(net)

    def losses() -> Tensor:
        logits = net(x)
        if bool((logits.abs() > largest).any()):
            raise ValueError("too large")
        return cross_entropy(logits, y, reduction="none")

    for step in range(5):
        estimator.backward(losses, net, step, state)
    assert all(line.slope.isnan() for line in state.sizes.lines.values()) and len(state.sizes.lines) == 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_one_layer_a_step_is_measured_at_first() -> None:
    net = rectified().double()
    estimator = PerExample(seed=0)
    state, objective = estimator.init(net), Objective(lambda: cross_entropy(net(x), y, reduction="none"), net)
    passes = []
    for step in range(52):
        before, phase = objective.forward_passes, estimator.phase(state)
        estimator.backward(objective, net, step, state)
        passes.append((objective.forward_passes - before, phase))
    # A look; two layers once something is predicted; and one again in the first step that is a multiple of 50.
    assert [each for each, _ in passes] == [3, 2, 4, 4, *[2] * 46, 4, 2]
    assert [phase for _, phase in passes] == [
        (True, False), (False, False), *[(False, True)] * 2, *[(False, False)] * 46, (True, False), (False, False)
    ]  # fmt: skip


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
