"""Unmodified modules in automatic optimization, trained by the callback."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel, ManualOptimBoringModel
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from tests.callbacks.runs import automatic, batches, classifier, scalars, trainer, weights
from zo_lightning import (
    Backprop,
    CentralDifference,
    EstimatedGradient,
    ForwardGradient,
    GradientEstimator,
    GradientFree,
    PerExample,
    TrainingDiverged,
    ZerothOrder,
)
from zo_lightning.callbacks import Budget, GradientAlignment

ESTIMATORS = [Backprop(), ZerothOrder(samples=2, seed=0), ForwardGradient(seed=0), PerExample(seed=0)]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)


class Foreign(LightningModule):
    """Somebody's module: BatchNorm, dropout, a metric, a list of its own, a schedule, and losses of the examples."""

    def __init__(self, dropout: float = 0.3, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(144, 3)
        )
        self.accuracy = MulticlassAccuracy(3)
        self.seen: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self.net(batch[0])
        losses = F.cross_entropy(logits, batch[1], reduction="none")
        self.accuracy(logits, batch[1])
        self.seen.append(batch_idx)
        self.log("train_loss", losses.mean(), on_epoch=True, on_step=False)
        return {"loss": losses.mean(), "losses": losses}

    def configure_optimizers(self) -> Any:
        if self.plain:
            return torch.optim.SGD(self.parameters(), 0.1)
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]


def loader(inputs: Tensor, batch_size: int) -> DataLoader:
    return DataLoader(inputs, batch_size)  # type: ignore[arg-type]  # a tensor is all that a data set must be


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}], ids=str)
def test_law_6_backprop_equals_automatic_optimization_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    twins = Foreign(), Foreign()
    for module, callbacks in zip(twins, ([], [GradientFree(Backprop())]), strict=True):
        torch.manual_seed(1)
        trainer(tmp_path, *callbacks, **options).fit(module, batches())
    assert equal(*twins)


@every_estimator
def test_trains_and_gives_the_module_back(estimator: GradientEstimator, tmp_path: Path) -> None:
    module = Foreign(dropout=0.0)
    callback = GradientFree(estimator)
    fit = trainer(tmp_path, callback, max_epochs=30)
    fit.fit(module, batches())
    assert fit.callback_metrics["train_loss"] < 0.9  # log(3) = 1.1 at the start
    assert fit.global_step == 180
    assert not {"training_step", "backward"} & set(vars(module))
    assert type(module) is Foreign and module.training_step.__func__ is Foreign.training_step  # type: ignore[attr-defined]


@every_estimator
def test_equals_the_mixin_bit_for_bit(estimator: GradientEstimator, tmp_path: Path) -> None:
    """Weights, BatchNorm's statistics, and what else the module has seen; probes leave no trace in any of it."""

    class Mixed(EstimatedGradient, Foreign):
        pass

    mixed, plain, callback = Mixed(), Foreign(), GradientFree(estimator)
    mixed.estimator = estimator
    for module, callbacks in ((mixed, []), (plain, [callback])):
        torch.manual_seed(1)
        trainer(tmp_path, *callbacks).fit(module, batches())
    assert equal(mixed, plain)
    assert mixed.seen == plain.seen == list(range(6)) * 2
    assert mixed.accuracy._update_count == plain.accuracy._update_count == 12
    assert mixed.forward_passes == callback.forward_passes


def test_accumulated_batches_are_one_step_on_their_mean_loss(tmp_path: Path) -> None:
    """The same directions for all of them; in float64, as slopes are differences of losses."""
    ended = []
    for size, accumulate in ((4, 3), (12, 1)):
        module = Linearised()
        estimator = ZerothOrder(stencil=CentralDifference(1e-4), samples=4, seed=0)
        options = {"accumulate_grad_batches": accumulate, "max_epochs": 1}
        fit = trainer(tmp_path, GradientFree(estimator), **options)
        fit.fit(module, loader(torch.randn(24, 8, generator=torch.Generator().manual_seed(0)).double(), size))
        assert fit.global_step == 2
        ended.append(module)
    for a, b in zip(ended[0].parameters(), ended[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # 1e-16 of a loss near 1, divided by mu


class Linearised(LightningModule):
    """Takes the batch alone, and returns a bare loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8, dtype=torch.float64)

    def training_step(self, batch: Tensor) -> Tensor:
        return F.mse_loss(self.inner(batch).tanh(), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_clipping_is_lightnings_own(tmp_path: Path) -> None:
    module = Linearised()
    start = weights(module)
    fit = trainer(tmp_path, GradientFree(ZerothOrder(seed=0)), gradient_clip_val=1e-3, max_steps=1)
    fit.fit(module, loader(torch.ones(4, 8).double(), 4))
    moved = sum(float((p.detach() - start[name]).square().sum()) for name, p in module.named_parameters()) ** 0.5
    assert moved == pytest.approx(0.01 * 1e-3, rel=1e-3)  # lr times the norm; Lightning adds 1e-6 to the norm


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_law_7_resumed_equals_uninterrupted(estimator: GradientEstimator, tmp_path: Path) -> None:
    def fit(epochs: int, resume: Path | None = None) -> tuple[Foreign, GradientFree]:
        module, callback = Foreign(dropout=0.0), GradientFree(estimator)
        checkpoint = ModelCheckpoint(tmp_path / str(epochs), filename="end")
        options = {"max_epochs": epochs, "enable_checkpointing": True}
        trainer(tmp_path, callback, checkpoint, **options).fit(module, batches(), ckpt_path=resume)
        return module, callback

    whole, counted = fit(4)
    fit(2)
    resumed, recounted = fit(4, tmp_path / "2" / "end.ckpt")
    assert equal(whole, resumed)
    assert (counted.forward_passes, counted.flops) == (recounted.forward_passes, recounted.flops)


@pytest.mark.parametrize("estimator", ESTIMATORS[:2], ids=lambda e: type(e).__name__)
def test_a_loss_that_is_not_finite_skips_its_step(estimator: GradientEstimator, tmp_path: Path) -> None:
    class Sometimes(Linearised):
        def training_step(self, batch: Tensor) -> Tensor:
            return super().training_step(batch) * (torch.nan if self.global_step == 1 else 1.0)

    states = []

    class Remember(Budget):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            states.append(weights(pl_module)["inner.weight"])

    callback = GradientFree(estimator)
    trainer(tmp_path, callback, Remember(), max_epochs=1).fit(Sometimes(), loader(torch.ones(12, 8).double(), 4))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])
    assert callback.skipped_steps == 1


def test_diverged_training_ends_and_gives_the_module_back(tmp_path: Path) -> None:
    class Never(Linearised):
        def training_step(self, batch: Tensor) -> Tensor:
            return super().training_step(batch) * torch.nan

    module = Never()
    with pytest.raises(TrainingDiverged, match="the loss is nan for 3 batches in a row, at step 2"):
        data = loader(torch.ones(24, 8).double(), 4)
        trainer(tmp_path, GradientFree(max_skipped_in_a_row=3)).fit(module, data)
    assert not {"training_step", "backward"} & set(vars(module))


def test_no_loss_skips_the_batch_as_lightning_does(tmp_path: Path) -> None:
    class Half(Linearised):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            return None if batch_idx % 2 else super().training_step(batch)

    callback = GradientFree(ZerothOrder(seed=0))
    fit = trainer(tmp_path, callback, max_epochs=1)
    fit.fit(Half(), loader(torch.ones(16, 8).double(), 4))
    assert fit.global_step == 4
    assert callback.skipped_steps == 0 and callback.forward_passes == 2 * 2 + 2 * 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_precisions(precision: Any, tmp_path: Path) -> None:
    """The step along the estimate lies within rounding of that in float32: the scaler's factor is undone."""
    moved = []
    for chosen in ("32-true", precision):
        module = Foreign(dropout=0.0, plain=True)
        start = weights(module)
        estimator = ZerothOrder(stencil=CentralDifference(3e-2), samples=8, seed=0)
        trainer(tmp_path, GradientFree(estimator), max_steps=1, precision=chosen).fit(module, batches())
        moved.append(torch.cat([(p.detach() - start[n]).flatten() for n, p in module.named_parameters()]))
    # bf16 keeps 8 bits: losses near 1 err by 0.002, slopes by 0.002 / 0.06 against a gradient's norm near 1.
    assert F.cosine_similarity(moved[0], moved[1], dim=0) > 0.9
    assert float(moved[1].norm()) == pytest.approx(float(moved[0].norm()), rel=0.3)


def test_costs_and_alignment_are_those_of_the_estimator(tmp_path: Path) -> None:
    callback = GradientFree(ZerothOrder(samples=2, seed=0))
    budget = Budget()
    trainer(tmp_path, callback, budget, GradientAlignment(every_n_steps=4)).fit(Foreign(), batches())
    assert callback.forward_passes == budget.forward_passes == 12 * 4
    assert callback.flops == budget.flops > 0
    cosines = [value for _, value in scalars(tmp_path)["vs_true_gradient/cosine/all"]]
    assert len(cosines) == 3 and all(0 < abs(value) < 0.9 for value in cosines)


def test_boring_model(tmp_path: Path) -> None:
    """Lightning's own, whose batches are bare tensors, with its hooks, schedules and validation."""
    fit = trainer(tmp_path, GradientFree(ZerothOrder(seed=0)), limit_train_batches=4, limit_val_batches=1)
    module = BoringModel()
    start = weights(module)
    fit.fit(module)
    assert fit.global_step == 8
    assert not torch.equal(start["layer.weight"], module.layer.weight)


class TakesIterator(Linearised):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0])


@pytest.mark.parametrize(
    ("make", "callbacks", "message"),
    [
        (ManualOptimBoringModel, [GradientFree()], "ManualOptimBoringModel steps its optimizers itself"),
        (classifier, [GradientFree()], "Classifier has an estimator of its own: set Classifier.estimator"),
        (TakesIterator, [GradientFree()], "takes a dataloader_iter"),
        (automatic, [GradientFree(), GradientFree(Backprop())], "one GradientFree trains a module, got 2|state_key"),
    ],
    ids=["manual", "mixin", "iterator", "two"],
)
def test_refusals(make: Any, callbacks: list[GradientFree], message: str, tmp_path: Path) -> None:
    with pytest.raises((MisconfigurationException, RuntimeError), match=message):
        trainer(tmp_path, *callbacks).fit(make(), batches())


def test_bad_argument() -> None:
    with pytest.raises(ValueError, match="max_skipped_in_a_row must be at least 1, got 0"):
        GradientFree(max_skipped_in_a_row=0)
