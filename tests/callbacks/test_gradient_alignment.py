import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn

from tests.callbacks.runs import Linear, automatic, batches, classifier, first_order, net, scalars, trainer
from zo_lightning import (
    AutomaticClassifier,
    CentralDifference,
    Coordinate,
    DirectFeedbackAlignment,
    EstimatedGradient,
    ForwardDifference,
    ForwardGradient,
    GradientEstimator,
    PerExample,
    ZerothOrder,
)
from zo_lightning.callbacks import GradientAlignment
from zo_lightning.measures import cosine, true_gradient

ESTIMATORS: dict[str, GradientEstimator] = {
    "central": ZerothOrder(samples=2, seed=0),
    "forward": ZerothOrder(stencil=ForwardDifference(), seed=0),
    "coordinate": ZerothOrder(Coordinate(), seed=0),
    "forward_gradient": ForwardGradient(seed=0),
    "direct_feedback_alignment": DirectFeedbackAlignment(seed=0),
    "per_example": PerExample(seed=0),
    "activations": PerExample(seed=0, samples=2, space="activations"),
    "examples_forward": PerExample(ForwardDifference(1e-2), seed=0, space="weights"),
}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())


def smooth() -> nn.Module:
    """Batch normalisation and dropout, whose state and masks are easily disturbed; forward mode can do all of it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 3)
    )


@every_estimator
def test_training_is_bit_identical_with_and_without(estimator: GradientEstimator, tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [GradientAlignment(every_n_steps=2)]):
        torch.manual_seed(3)
        module = classifier(estimator, smooth())
        trainer(tmp_path, *callbacks).fit(module, batches())
        states.append((module.state_dict(), torch.rand(1), torch.tensor(module.forward_passes)))
    (a, *rest_a), (b, *rest_b) = states
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(x, y) for x, y in zip(rest_a, rest_b, strict=True))
    assert [step for step, _ in scalars(tmp_path)["vs_true_gradient/cosine/all"]] == [0, 2, 4, 6, 8, 10]


class Reference(Callback):
    """The cosine of the first step as anyone would compute it."""

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.gradient = true_gradient(lambda: nn.functional.cross_entropy(module.net(batch[0]), batch[1]), module)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            self.cosine = cosine({name: p.grad for name, p in module.named_parameters()}, self.gradient)


@every_estimator
def test_values(estimator: GradientEstimator, tmp_path: Path) -> None:
    reference = Reference()
    torch.manual_seed(0)
    of = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
    trainer(tmp_path, GradientAlignment(1), reference).fit(classifier(estimator, of), batches())
    logged = {tag.removeprefix("vs_true_gradient/"): [v for _, v in values] for tag, values in scalars(tmp_path).items()}
    for name, value in reference.cosine.items():
        if math.isnan(value):  # a coordinate lies in one weight; the others' estimate is zero
            assert isinstance(estimator, ZerothOrder) and isinstance(estimator.directions, Coordinate)
            continue
        assert logged[f"cosine/{name}"][0] == pytest.approx(value, rel=1e-4, abs=1e-6)
    seconds = logged["seconds"]
    assert seconds[0] > 0 and seconds == sorted(seconds)
    expected = logged.get("expected_cosine/all", [])
    if isinstance(estimator, DirectFeedbackAlignment):  # no theory says how well it is aligned
        assert not [tag for tag in logged if tag.startswith("expected_cosine")]
        assert logged["cosine/net.3.weight"] == [pytest.approx(1, abs=1e-5)] * 12, "the last layer's is exact"
    elif isinstance(estimator, PerExample):
        assert all(0 < value < 1 for value in expected)
        assert "expected_cosine/net.0.weight" not in logged
    else:
        q, d = estimator.samples, 112 + 435  # type: ignore[attr-defined]
        assert expected == [pytest.approx(math.sqrt(q / (d + q - 1)))] * 12
        if not isinstance(getattr(estimator, "directions", None), Coordinate):
            assert 0 < logged["expected_cosine/net.0.weight"][0] < 0.3
    assert ("slope_snr" in logged) == hasattr(estimator, "stencil")
    if hasattr(estimator, "stencil"):
        # In float32 the loss is known to about 1e-7, so at mu = 1e-3 or 1e-2 slopes of order 1 to three digits or more.
        assert 1e2 < min(logged["slope_snr"]) < 1e7
        mu = estimator.stencil.mu  # type: ignore[attr-defined]
        assert logged["noise_floor"][0] == pytest.approx(mu / logged["slope_snr"][0])


def test_cosine_is_near_what_theory_expects(tmp_path: Path) -> None:
    # The mean square of the cosine is q/d-like; 60 steps give it to √(2/60) = 0.18, its root to 0.09: three of these.
    estimator = ZerothOrder(samples=4, seed=0)
    trainer(tmp_path, GradientAlignment(1), max_epochs=10).fit(classifier(estimator), batches())
    logged = scalars(tmp_path)
    measured = torch.tensor([value for _, value in logged["vs_true_gradient/cosine/all"]]).square().mean().sqrt()
    assert logged["vs_true_gradient/expected_cosine/all"][0][1] == pytest.approx(float(measured), rel=0.27)


def test_a_mu_below_the_noise_floor_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"mu=1e-09 is below the noise floor of the finite difference, .*Try mu="):
        trainer(tmp_path, GradientAlignment(), max_epochs=1).fit(
            classifier(ZerothOrder(stencil=CentralDifference(1e-9), seed=0)), batches()
        )
    assert scalars(tmp_path)["vs_true_gradient/slope_snr"][0][1] < 1


@pytest.mark.parametrize("make", [automatic, first_order, Linear, lambda: Linear(torch.bfloat16)])
def test_where_the_gradient_is_true_it_is_1_and_nothing_is_asked_again(make: Any, tmp_path: Path) -> None:
    module = make()
    calls = 0
    original = module.training_step

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args)

    module.training_step = counted
    trainer(tmp_path, GradientAlignment(1), max_epochs=1).fit(module, batches())
    assert calls == 6
    logged = scalars(tmp_path)
    for tag in ("cosine", "norm_ratio", "expected_cosine"):
        assert [value for _, value in logged[f"vs_true_gradient/{tag}/all"]] == [pytest.approx(1)] * 6


class Accuracy(Linear):
    """A loss without a gradient."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return -(self.inner(batch[0][:, 0, 0]).argmax(1) == batch[1]).float().mean()


class EstimatedAccuracy(EstimatedGradient, Accuracy):
    estimator = ZerothOrder(stencil=CentralDifference(0.1), seed=0)


def test_a_loss_without_gradient_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="GradientAlignment does nothing: backpropagation needs the graph of the loss"):
        trainer(tmp_path, GradientAlignment(1)).fit(EstimatedAccuracy(), batches())
    assert not (tmp_path / "scalars.csv").exists()


class Flat(Linear):
    """A loss that is zero, and so is its gradient."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.inner(batch[0][:, 0, 0]).mean() * 0


class EstimatedFlat(EstimatedGradient, Flat):
    estimator = ZerothOrder(seed=0)


def test_a_gradient_of_zero(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trainer(tmp_path, GradientAlignment(1), max_epochs=1).fit(EstimatedFlat(), batches())
    assert scalars(tmp_path).keys() == {"vs_true_gradient/seconds", "vs_true_gradient/expected_cosine/all"}
    assert not [warning for warning in recwarn if "GradientAlignment" in str(warning.message)]


class EstimatedHalf(EstimatedGradient, Linear):
    estimator = ZerothOrder(stencil=CentralDifference(1e-2), seed=0)


def test_weights_of_low_precision_have_a_high_noise_floor(tmp_path: Path) -> None:
    for name, dtype in (("half", torch.bfloat16), ("single", torch.float32)):
        trainer(tmp_path / name, GradientAlignment(1), max_epochs=1).fit(EstimatedHalf(dtype), batches())
    floors = [scalars(tmp_path / name)["vs_true_gradient/noise_floor"][0][1] for name in ("half", "single")]
    assert floors[0] > 100 * floors[1]  # the precisions are 2^-8 and 2^-24


def test_a_step_that_is_skipped_is_left_out(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                batch[0].fill_(math.nan)

    module = classifier(of=nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    trainer(tmp_path, GradientAlignment(1), Poison(), max_epochs=1).fit(module, batches())
    assert [step for step, _ in scalars(tmp_path)["vs_true_gradient/cosine/all"]] == [0, 2, 3, 4, 5]
    assert module.estimated_objective is None


def test_its_cost_goes_on_after_a_resume() -> None:
    callback, other = GradientAlignment(7), GradientAlignment(7)
    callback.seconds = 3.0
    other.load_state_dict(callback.state_dict())
    assert other.seconds == 3.0
    assert callback.state_key == other.state_key != GradientAlignment(8).state_key


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        GradientAlignment(0)


class Detached(AutomaticClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return {**output, "losses": output["losses"].detach()}


class EstimatedDetached(EstimatedGradient, Detached):
    estimator = PerExample(seed=0)


def test_losses_that_are_detached_count_as_alike(tmp_path: Path) -> None:
    module = EstimatedDetached(net(), lambda p: torch.optim.SGD(p, 0.01), num_classes=3)
    trainer(tmp_path, GradientAlignment(1), max_epochs=1).fit(module, batches())
    assert 0 < scalars(tmp_path)["vs_true_gradient/expected_cosine/all"][0][1] < 1
