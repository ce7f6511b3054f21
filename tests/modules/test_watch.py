"""A run says, once, that its finite differences find nothing; and what would help."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from tests.modules.ways import WAYS, Net, driver, fitted, made, trainer, weights
from zo_lightning import (
    Backprop,
    CentralDifference,
    ForwardDifference,
    ForwardGradient,
    PerExample,
    ZerothOrder,
)
from zo_lightning.modules.watch import _change, _share_of_equal

every_way = pytest.mark.parametrize("way", WAYS)


class Halved(Net):
    """Nothing couples the examples, so that each has a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = F.mse_loss(self.net(batch[0]), batch[1], reduction="none").mean(1)
        return {"loss": losses.mean(), "losses": losses}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class Counted(Halved):
    """The share of examples that are wrong: 0 or 1 for each."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = (self.net(batch[0])[:, 0].sign() != batch[1][:, 0].sign()).float()
        return {"loss": losses.mean(), "losses": losses}


def said(kind: Any, way: str, estimator: Any, path: Path, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(kind, way, estimator, path, limit_val_batches=0, **options)
    return [str(one.message) for one in caught if "mu" in str(one.message)]


@pytest.mark.parametrize(
    ("precision", "mu"),
    [("bf16-mixed", 1e-4), ("bf16-true", 1e-3), ("16-true", 1e-4), ("bf16-true", 1e-8)],
)
@every_way
def test_a_mu_that_rounding_drowns_is_named_with_one_that_would_do(
    precision: str, mu: float, way: str, tmp_path: Path
) -> None:
    (message,) = said(Halved, way, ZerothOrder(stencil=CentralDifference(mu), seed=0), tmp_path, precision=precision)
    assert message.startswith(f"mu={mu:g} drowns in the rounding of precision {precision}: doubled, it changes")
    assert message.endswith("precision='32-true'")
    found = float(message.split("Take mu=")[1].split(",")[0])
    assert said(Halved, way, ZerothOrder(stencil=CentralDifference(found), seed=0), tmp_path, precision=precision) == []


def test_where_no_mu_would_do_none_is_named(tmp_path: Path) -> None:
    """Noise of deviation 10 on a loss of about 1, another one in each pass."""
    noise = torch.Generator().manual_seed(0)

    class Noisy(Halved):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss + 10 * torch.randn((), generator=noise).to(loss)

    estimator = ZerothOrder(stencil=CentralDifference(1e-3), seed=0)
    (message,) = said(Noisy, "mixin", estimator, tmp_path, precision="bf16-mixed")
    assert "No mu up to 1 would do: take precision='32-true'" in message


@pytest.mark.parametrize("stencil", [CentralDifference(1e-2), ForwardDifference(1e-2)], ids=str)
def test_nothing_is_said_where_all_is_well(stencil: Any, tmp_path: Path) -> None:
    for precision in ("bf16-mixed", "16-true", "32-true", "64-true"):
        assert said(Halved, "mixin", ZerothOrder(stencil=stencil, seed=0), tmp_path, precision=precision) == []
    for estimator in (PerExample(seed=0), ForwardGradient(seed=0), Backprop()):
        assert said(Halved, "mixin", estimator, tmp_path) == []


@every_way
def test_looking_changes_and_counts_nothing(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr("zo_lightning.modules.watch.Watch.look", lambda *_: None)
        module, callbacks = made(Net, way, ZerothOrder(samples=2, seed=0))  # with BatchNorm and dropout
        torch.manual_seed(7)
        trainer(tmp_path, *callbacks, precision="bf16-mixed").fit(module)
        ends.append((weights(module), driver(module, callbacks).forward_passes, driver(module, callbacks).flops))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:] == (64, ends[0][2])


@every_way
def test_a_metric_without_slope_is_named(way: str, tmp_path: Path) -> None:
    (message,) = said(Counted, way, ZerothOrder(stencil=CentralDifference(1e-6), seed=0), tmp_path)
    assert message.startswith("all losses of a step are equal, at each point that mu=1e-06 reaches, for 10 batches")
    assert said(Counted, way, ZerothOrder(stencil=CentralDifference(0.5), seed=0), tmp_path) == []


@every_way
def test_losses_of_0_and_1_for_each_example_are_named(way: str, tmp_path: Path) -> None:
    (message,) = said(Counted, way, PerExample(seed=0), tmp_path)
    assert message.startswith(
        "most examples have equal losses in all passes of a step, mu=0.01, for 10 batches in a row"
    )
    assert "PerExample learns nothing from losses that are constant piece by piece" in message


def test_examples_that_are_learned_already_do_not_count_as_flat() -> None:
    wrong, right = torch.tensor([2.0, 2.1]), torch.zeros(98)
    assert _share_of_equal([torch.cat([wrong, right]), torch.cat([wrong + 0.1, right])]) == 0
    assert _share_of_equal([torch.tensor([0.0, 1.0, 1.0, 1.0])] * 2) == 1


def test_change_of_slopes() -> None:
    assert _change(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) == 0
    assert _change(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])) == 1
    assert _change(torch.zeros(2), torch.zeros(2)) == 1


LEARNS = [
    Backprop(),
    ZerothOrder(stencil=CentralDifference(2e-2), samples=8, seed=0),
    ForwardGradient(samples=8, seed=0),
    PerExample(seed=0),
]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("estimator", LEARNS, ids=lambda e: type(e).__name__)
def test_every_precision_learns(estimator: Any, precision: str, tmp_path: Path) -> None:
    """The loss of 2.8 at the start falls below half of it, as in float32."""
    losses: list[Tensor] = []

    class Watched(Halved):
        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:  # type: ignore[override]
            losses.append(outputs["loss"].detach().float())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    module = fitted(Watched, "mixin", estimator, tmp_path, precision=precision, max_epochs=8, limit_val_batches=0)
    assert float(torch.stack(losses[:8]).mean()) > 1.5
    assert float(torch.stack(losses[-8:]).mean()) < 1.2
    dtypes = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    assert {p.dtype for p in module.parameters()} == {dtypes.get(precision, torch.float32)}


class Poisoned(Halved):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return {**output, "loss": output["loss"] * (torch.nan if batch_idx == 3 else 1.0)}


@pytest.mark.parametrize("estimator", LEARNS[:3], ids=lambda e: type(e).__name__)
@every_way
def test_the_factor_of_a_grad_scaler_is_undone(way: str, estimator: Any, tmp_path: Path) -> None:
    """On the CPU Lightning makes none, but takes PyTorch's. Weights are those without; a skipped step lowers it."""
    ends = []
    for scaled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14) if scaled else None
        plugin = MixedPrecision("16-mixed", "cpu", scaler) if scaled else None
        module, callbacks = made(Halved, way, estimator)
        options = {"plugins": [plugin]} if scaled else {"precision": "32-true"}
        trainer(tmp_path, *callbacks, max_steps=2, gradient_clip_val=0.1, **options).fit(module)
        ends.append(weights(module))
        if scaler is not None:
            module, callbacks = made(Poisoned, way, estimator)
            trainer(tmp_path, *callbacks, max_epochs=1, plugins=[plugin]).fit(module)
            assert driver(module, callbacks).skipped_steps == 1
            assert scaler.get_scale() == 2.0**13
            assert weights(module).isfinite().all()
    # Two steps of 0.02 along a gradient of norm 0.1; float16 keeps 11 bits, of which a difference loses some.
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=2e-4)
