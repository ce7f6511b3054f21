import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel, RandomDataset
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from zo_lightning import (
    Backprop,
    CentralDifference,
    EstimatedGradient,
    ForwardDifference,
    ForwardGradient,
    TrainingDiverged,
    ZerothOrder,
)

FORWARD_ONLY = [ZerothOrder(), ZerothOrder(stencil=ForwardDifference(), samples=2), ForwardGradient()]
EVERY = [Backprop(), *FORWARD_ONLY]


class ZOBoring(EstimatedGradient, BoringModel):
    """Lightning's demo module, unchanged."""


class Net(LightningModule):
    """What somebody's module may look like: dropout, BatchNorm, metrics, logging, a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2))
        self.mean = MeanMetric()
        self.rates: list[float] = []
        self.plateau = False

    def training_step(self, batch: Tensor) -> Tensor:
        loss = F.mse_loss(self.net(batch), torch.ones(len(batch), 2))
        self.mean.update(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Tensor) -> None:
        self.log("val/loss", F.mse_loss(self.net(batch), torch.ones(len(batch), 2)))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        if self.plateau:
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        by_step = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step", "frequency": 3}
        return [optimizer], [by_epoch, by_step]

    def train_dataloader(self) -> DataLoader:
        torch.manual_seed(1)
        return DataLoader(RandomDataset(32, 64), batch_size=8)

    def val_dataloader(self) -> DataLoader:
        torch.manual_seed(2)
        return DataLoader(RandomDataset(32, 16), batch_size=8)


class Estimated(EstimatedGradient, Net):
    estimator = ZerothOrder(samples=2, seed=0)


def trainer(path: Path, **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=path, **{**defaults, **options})


def weights(module: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in module.state_dict().values()])


@pytest.mark.parametrize("estimator", EVERY, ids=lambda e: type(e).__name__)
def test_somebodys_module_unchanged(estimator: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ZOBoring()
    module.estimator = estimator
    before = weights(module)
    fit = trainer(tmp_path, limit_train_batches=10, limit_val_batches=2)
    fit.fit(module)
    assert fit.global_step == 20
    assert module.skipped_steps == 0
    assert not torch.equal(weights(module), before)
    fit.test(module, verbose=False)


def test_law_6_backprop_equals_automatic_optimization(tmp_path: Path) -> None:
    automatic, estimated = Net(), Estimated()
    estimated.estimator = Backprop()
    for module in (automatic, estimated):
        torch.manual_seed(7)
        trainer(tmp_path).fit(module)
    assert torch.equal(weights(automatic), weights(estimated))
    assert automatic.rates == estimated.rates
    assert automatic.trainer.callback_metrics.keys() <= estimated.trainer.callback_metrics.keys()
    for name, value in automatic.trainer.callback_metrics.items():
        assert torch.equal(value, estimated.trainer.callback_metrics[name]), name


def test_plateau_schedule_equals_that_of_automatic_optimization(tmp_path: Path) -> None:
    rates = []
    for module in (automatic := Net(), estimated := Estimated()):
        module.plateau = True
        trainer(tmp_path, max_epochs=5).fit(module)
        rates.append(module.rates)
    assert rates[0] == rates[1]
    assert rates[1][-1] < rates[1][0] == 1e-2
    assert automatic.automatic_optimization and not estimated.automatic_optimization


class Iterates(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append([p.detach().clone() for p in pl_module.parameters()])


def test_iterates_are_averaged_by_lightnings_own_callback(tmp_path: Path) -> None:
    runs = []
    for averaging in ([], [EMAWeightAveraging(decay=0.5)]):
        torch.manual_seed(7)
        module, iterates = Estimated(), Iterates()
        trainer(tmp_path, callbacks=[iterates, *averaging]).fit(module)
        runs.append((list(module.parameters()), iterates.seen))
    (_, plain), (averaged, same) = runs
    assert len(plain) == 16
    assert all(
        torch.equal(a, b) for one, other in zip(plain, same, strict=True) for a, b in zip(one, other, strict=True)
    )
    expected = plain[0]
    for weights_now in plain[1:]:
        expected = [a.lerp(b, 0.5) for a, b in zip(expected, weights_now, strict=True)]
    for ours, right, last in zip(averaged, expected, plain[-1], strict=True):
        torch.testing.assert_close(ours.detach(), right)
        assert not torch.allclose(ours, last)


@pytest.mark.parametrize("estimator", FORWARD_ONLY, ids=lambda e: type(e).__name__)
def test_law_4_one_update_of_buffers_metrics_and_logs_per_step(estimator: Any, tmp_path: Path) -> None:
    module = Estimated()
    module.estimator = estimator
    calls = []
    original = module.log
    module.log = lambda name, *a, **k: (calls.append(name), original(name, *a, **k))  # type: ignore[method-assign,assignment]
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module)
    assert module.net[1].num_batches_tracked.item() == 8  # type: ignore[union-attr,operator]
    assert calls.count("loss") == 8
    assert module.mean._update_count in (0, 8)  # 0 after Lightning has reset it at the end of the epoch


@pytest.mark.parametrize("estimator", EVERY, ids=lambda e: type(e).__name__)
def test_max_steps_and_checkpoints_by_step(estimator: Any, tmp_path: Path) -> None:
    module = Estimated()
    module.estimator = estimator
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit = trainer(tmp_path, max_steps=10, max_epochs=-1, enable_checkpointing=True, callbacks=[checkpoint])
    fit.fit(module)
    assert fit.global_step == 10
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["step=4.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("estimator", [Backprop(), ZerothOrder(seed=0)], ids=lambda e: type(e).__name__)
def test_early_stopping_and_the_best_checkpoint(estimator: Any, mode: str, tmp_path: Path) -> None:
    module = Estimated()
    module.estimator = estimator
    stop = EarlyStopping("val/loss", patience=1, mode=mode, min_delta=100.0)
    best = ModelCheckpoint(tmp_path / "ckpt", monitor="val/loss", mode=mode)
    fit = trainer(tmp_path, max_epochs=9, enable_checkpointing=True, callbacks=[stop, best])
    fit.fit(module)
    assert fit.current_epoch == 2
    assert Path(best.best_model_path).is_file()


def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(tmp_path: Path) -> None:
    def fit(max_steps: int, resume: Path | None = None) -> Estimated:
        module = Estimated()
        checkpoint = ModelCheckpoint(tmp_path / str(max_steps), every_n_train_steps=1, save_last=True)
        options = {"enable_checkpointing": True, "callbacks": [checkpoint], "limit_val_batches": 0}
        trainer(tmp_path, max_steps=max_steps, max_epochs=-1, **options).fit(module, ckpt_path=resume)
        return module

    whole = fit(6)
    fit(3)
    resumed = fit(6, tmp_path / "3" / "last.ckpt")
    # The loader of this module is not stateful, and starts its epoch again: weights differ, counts must not.
    assert resumed.forward_passes == whole.forward_passes == 24
    assert resumed.global_step == whole.global_step == 6


class Poisoned(EstimatedGradient, Net):
    bad: tuple[int, ...] = ()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx in self.bad:
            batch.fill_(math.nan)


@pytest.mark.parametrize("estimator", EVERY, ids=lambda e: type(e).__name__)
def test_a_step_with_a_non_finite_loss_is_skipped(estimator: Any, tmp_path: Path) -> None:
    module = Poisoned()
    module.net = nn.Sequential(nn.Linear(32, 2))
    module.estimator = estimator
    module.bad = (2, 5)
    fit = trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    fit.fit(module)
    assert fit.global_step == 8, "a skipped step counts, as one that is skipped in 16-bit precision does"
    assert module.skipped_steps == 2
    assert fit.callback_metrics["skipped_steps"].item() == 2
    assert weights(module).isfinite().all()


def test_training_that_diverges_stops_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    class FromTheFifth(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, module: LightningModule, batch: Tensor, batch_idx: int
        ) -> None:
            if trainer.global_step >= 5:
                batch.fill_(math.nan)

    module = Estimated()
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=5)
    options = {"enable_checkpointing": True, "limit_val_batches": 0, "callbacks": [FromTheFifth(), checkpoint]}
    with pytest.raises(TrainingDiverged, match="the loss is nan for 20 steps in a row, at step 24"):
        trainer(tmp_path, max_epochs=20, **options).fit(module)
    assert module.skipped_steps == 20
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_mu_follows_the_learning_rate_down_to_a_floor(tmp_path: Path) -> None:
    module = Estimated()
    module.estimator = ZerothOrder(stencil=CentralDifference(1e-3), seed=0)
    module.mu_follows_lr = True
    seen: list[float | None] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            seen.append(module.mu)

    module.plateau = True
    trainer(tmp_path, max_epochs=12, callbacks=[Watch()]).fit(module)
    assert seen == pytest.approx([1e-3 / 2**halvings for halvings in range(1, 10)] + 3 * [1e-6])


def test_gradient_clipping(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            norms.append(float(nn.utils.get_total_norm([p.grad for p in module.parameters()])))

    module = Estimated()
    module.gradient_clip_val = 0.5
    trainer(tmp_path, callbacks=[Watch()]).fit(module)
    assert max(norms) == pytest.approx(0.5, rel=1e-4)


def test_errors_name_what_does_not_fit(tmp_path: Path) -> None:
    class TwoOptimizers(Estimated):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)], []

    with pytest.raises(MisconfigurationException, match="exactly one optimizer, configure_optimizers gave 2"):
        trainer(tmp_path).fit(TwoOptimizers())
    module = Estimated()
    module.plateau = True
    module.validation_step = lambda batch: None  # type: ignore[method-assign,assignment]
    with pytest.raises(MisconfigurationException, match="watches 'val/loss', which was not logged"):
        trainer(tmp_path).fit(module)
