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
from torchmetrics.wrappers import Running

from tests.modules.ways import trainer
from zo_lightning import (
    Backprop,
    CentralDifference,
    EstimatedGradient,
    ForwardDifference,
    ForwardGradient,
    NormalizedSGD,
    Rademacher,
    Sphere,
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
    assert automatic.automatic_optimization and estimated.automatic_optimization


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
    with pytest.raises(TrainingDiverged, match="the loss is nan for 20 batches in a row, at step 24"):
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
        def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
            seen.append(module.mu_in_use)

    module.plateau = True
    trainer(tmp_path, max_epochs=12, callbacks=[Watch()]).fit(module)
    assert seen == pytest.approx([1e-3 / 2**halvings for halvings in range(10)] + 2 * [1e-6])


def test_mu_has_no_rate_to_follow_where_that_begins_at_zero(tmp_path: Path) -> None:
    class FromZero(Estimated):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = FromZero()
    module.mu_follows_lr = True
    trainer(tmp_path, max_epochs=1).fit(module)
    assert module.mu_in_use == module.estimator.mu


def test_what_the_training_step_keeps_grows_once_a_step(tmp_path: Path) -> None:
    class Step(Net):
        def __init__(self) -> None:
            super().__init__()
            self.outputs: list[Tensor] = []
            self.by_sign: dict[bool, int] = {}
            self.calls, self.smooth = 0, torch.zeros(())
            self.running: Any = Running(MeanMetric(), window=3)

        def training_step(self, batch: Tensor) -> Tensor:
            loss = super().training_step(batch)
            self.outputs.append(loss.detach())
            self.by_sign[bool(loss > 0)] = self.by_sign.get(bool(loss > 0), 0) + 1
            self.calls += 1
            self.smooth = 0.9 * self.smooth + 0.1 * loss.detach()
            self.running.update(loss)
            return loss

    class Both(EstimatedGradient, Step):
        estimator = ZerothOrder(samples=2, seed=0)

    module = Both()
    trainer(tmp_path, max_epochs=1).fit(module)
    assert len(module.outputs) == module.calls == sum(module.by_sign.values()) == 8
    smooth = torch.zeros(())
    for loss in module.outputs:
        smooth = 0.9 * smooth + 0.1 * loss
    assert torch.equal(module.smooth, smooth)
    assert module.running._num_vals_seen == 8
    assert torch.allclose(module.running.compute(), torch.stack(module.outputs[-3:]).mean())


def test_a_simulator_that_fails_for_many_directions_is_trained_all_the_same(tmp_path: Path) -> None:
    """Every step draws a direction of its own, after a failure too: twenty in a row are then next to impossible."""

    class Simulator(Net):
        def training_step(self, batch: Tensor) -> Tensor:
            loss = F.mse_loss(self.net(batch), torch.ones(len(batch), 2))
            first: Any = self.net[0]
            chance = float((first.weight.detach() * 1e4).frac().abs().sum()) % 1  # as good as drawn anew
            return loss * (math.nan if chance < 0.17 else 1.0)  # in one of two probes: 31 %

    class Estimated(EstimatedGradient, Simulator):
        estimator = ZerothOrder(Sphere(), seed=0)  # signs would move weights by whole multiples of 1e-4

    module = Estimated()
    fit = trainer(tmp_path, max_epochs=40, limit_val_batches=0)
    fit.fit(module)
    assert fit.global_step == 320
    assert 50 < module.skipped_steps < 150


def test_lbfgs_asks_again_at_other_weights(tmp_path: Path) -> None:
    class Quasi(EstimatedGradient, Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    for estimator in (Backprop(), ZerothOrder(samples=4, seed=0)):
        module = Quasi()
        module.net = nn.Sequential(nn.Linear(32, 2))
        module.estimator = estimator
        fit = trainer(tmp_path, max_epochs=1)
        fit.fit(module)
        assert fit.global_step == 8
        assert module.forward_passes > 8 * (3 if module.estimator.is_exact else 8)
        assert weights(module).isfinite().all()


class Large(EstimatedGradient, Net):
    estimator = ZerothOrder(Rademacher(), samples=2, seed=0)
    rule: Any = staticmethod(lambda params: torch.optim.Adam(params, lr=1e-2))

    def configure_optimizers(self) -> Any:
        rule: Any = self.rule
        return rule(self.parameters())


def test_lean_memory_gives_the_same_weights_and_never_holds_all_of_grad(tmp_path: Path) -> None:
    class Watched(torch.optim.Adam):
        held: list[int]

        def step(self, closure: Any = None) -> Any:
            self.held.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
            return super().step(closure)

    ends = []
    for memory in ("full", "lean"):
        module: Any = Large()
        module.memory = memory
        if memory == "lean":
            module.rule = lambda params: _renamed(Watched)(params, lr=1e-2)
            Watched.held = []
        fit = trainer(tmp_path)
        fit.fit(module)
        assert fit.global_step == 16
        ends.append(weights(module))
    assert max(Watched.held) == 1 and sum(Watched.held) == 16 * len(list(module.parameters()))
    assert torch.equal(*ends)


def _renamed(rule: Any) -> Any:
    """A rule that passes for PyTorch's own."""
    rule.__module__, rule.__name__ = "torch.optim.adam", "Adam"
    return rule


def test_lean_memory_is_chosen_by_size_where_nothing_needs_all_of_grad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Looks(Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            pass

    def chosen(**changes: Any) -> bool:
        module = Large()
        callbacks = changes.pop("callbacks", [])
        for name, value in changes.items():
            setattr(module, name, value)
        trainer(tmp_path, max_steps=1, max_epochs=-1, callbacks=callbacks, limit_val_batches=0).fit(module)
        return module._driver._lean

    assert not chosen(), "a small net"
    assert chosen(memory="lean")
    monkeypatch.setattr("zo_lightning.modules.memory.LARGE", 100)
    assert chosen()
    assert not chosen(memory="full")
    against = {
        "NormalizedSGD is not known to update each weight": {"rule": lambda params: NormalizedSGD(params)},
        "Backprop has no lean form": {"estimator": Backprop()},
        "on_before_optimizer_step of Looks may ask": {"callbacks": [Looks()]},
    }
    for reason, changes in against.items():
        assert not chosen(**changes)
        with pytest.raises(MisconfigurationException, match=f"memory='lean': .*{reason}.* Take memory='full'"):
            chosen(memory="lean", **changes)
    with pytest.raises(MisconfigurationException, match="memory must be 'auto', 'lean' or 'full', got 'small'"):
        chosen(memory="small")


def test_gradient_clipping(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            norms.append(float(nn.utils.get_total_norm([p.grad for p in module.parameters()])))

    trainer(tmp_path, callbacks=[Watch()], gradient_clip_val=0.5).fit(Estimated())
    assert max(norms) == pytest.approx(0.5, rel=1e-4)


def test_errors_name_what_does_not_fit(tmp_path: Path) -> None:
    class TwoOptimizers(Estimated):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)], []

    with pytest.raises(MisconfigurationException, match="by one optimizer, TwoOptimizers.configure_optimizers gave 2"):
        trainer(tmp_path).fit(TwoOptimizers())
    module = Estimated()
    module.plateau = True
    module.validation_step = lambda batch: None  # type: ignore[method-assign,assignment]
    with pytest.raises(MisconfigurationException, match="conditioned on metric val/loss which is not available"):
        trainer(tmp_path).fit(module)


class OwnStep(EstimatedGradient, Net):
    """The way most people would write it: the mixin and a training step in one class."""

    estimator = ZerothOrder(samples=2, seed=0)

    def training_step(self, batch: Tensor) -> Tensor:
        loss = F.mse_loss(self.net(batch), torch.ones(len(batch), 2))
        self.log("loss", loss)
        return loss


class Further(OwnStep):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step(batch) + 0.0


@pytest.mark.parametrize("kind", [OwnStep, Further])
def test_a_training_step_of_the_class_itself_is_estimated(kind: type[OwnStep], tmp_path: Path) -> None:
    class Step(Net):
        def training_step(self, batch: Tensor) -> Tensor:
            return F.mse_loss(self.net(batch), torch.ones(len(batch), 2))

    class Usual(EstimatedGradient, Step):
        estimator = ZerothOrder(samples=2, seed=0)

    ends = []
    for module in (kind(), Usual()):
        torch.manual_seed(7)
        trainer(tmp_path).fit(module)
        assert module.forward_passes == 16 * 4
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_the_mixin_comes_first() -> None:
    with pytest.raises(TypeError, match=r"write EstimatedGradient first, class Wrong\(EstimatedGradient, Net\)"):
        type("Wrong", (Net, EstimatedGradient), {})


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {"barebones": True}])
def test_a_trainer_that_logs_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    barebones = {"enable_checkpointing": False, "logger": False, "max_epochs": 1, "accelerator": "cpu", **options}
    module = Estimated()
    Trainer(default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, **barebones).fit(module)
    assert module.global_step == 8


def both(step: Any, path: Path, **options: Any) -> tuple[Any, Any]:
    """A module with a training step of its own, trained by one direction, and the same without what it does besides."""

    class Own(EstimatedGradient, Net):
        estimator = ZerothOrder(seed=0)
        training_step = step

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

    class Plain(EstimatedGradient, Net):
        estimator = ZerothOrder(seed=0)

        def training_step(self, batch: Tensor) -> Tensor:
            return F.mse_loss(self.net(batch), torch.ones(len(batch), 2))

    modules: Any = Own(), Plain()
    for module in modules:
        torch.manual_seed(7)
        trainer(path, max_epochs=1, limit_val_batches=0, **options).fit(module)
    return modules


def test_a_loss_that_reads_what_it_changes_is_the_same_at_all_points(tmp_path: Path) -> None:
    def step(self: Any, batch: Tensor) -> Tensor:
        self.calls += 1
        self.mean.update(torch.tensor(float(self.calls)))
        drift = self.calls + self.mean.compute()  # equal at both points, so that no slope sees it
        return F.mse_loss(self.net(batch), torch.ones(len(batch), 2)) + drift

    own, plain = both(step, tmp_path)
    assert own.calls == 8
    # Losses are up to 15 larger, and rounded to 2e-6 in place of 1e-7; a slope is divided by 2e-3, a step is 1e-2.
    assert torch.allclose(weights(own), weights(plain), rtol=0, atol=5e-3)


def test_every_pass_gets_the_batch_as_it_was(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def step(self: Any, batch: Tensor) -> Tensor:
        seen.append(batch.clone())
        loss = F.mse_loss(self.net(batch), torch.ones(len(batch), 2))
        batch.mul_(2.0)
        return loss

    own, plain = both(step, tmp_path)
    assert len(seen) == 16
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert torch.equal(weights(own), weights(plain))


def test_a_batch_that_is_taken_apart_is_whole_for_every_pass(tmp_path: Path) -> None:
    class Pops(EstimatedGradient, Net):
        estimator = ZerothOrder(seed=0)

        def training_step(self, batch: list[Tensor]) -> Tensor:
            x = batch.pop()
            assert not batch
            return F.mse_loss(self.net(x), torch.ones(len(x), 2))

        def train_dataloader(self) -> Any:
            return DataLoader(RandomDataset(32, 32), batch_size=8, collate_fn=lambda rows: [torch.stack(rows)])

    fit = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    fit.fit(Pops())
    assert fit.global_step == 4


def test_a_validation_step_may_call_the_training_step(tmp_path: Path) -> None:
    class Shares(EstimatedGradient, Net):
        estimator = ZerothOrder(seed=0)

        def training_step(self, batch: Tensor) -> Tensor:
            return F.mse_loss(self.net(batch), torch.ones(len(batch), 2))

        def validation_step(self, batch: Tensor) -> None:
            before = weights(self.net)
            self.log("val/loss", self.training_step(batch))
            assert torch.equal(weights(self.net), before)

    module = Shares()
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(module)
    assert fit.global_step == 8
    trainer(tmp_path).validate(module, verbose=False)


def test_a_training_step_without_a_loss_leaves_the_batch_out(tmp_path: Path) -> None:
    class Some(EstimatedGradient, Net):
        estimator = ZerothOrder(seed=0)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 2 else F.mse_loss(self.net(batch), torch.ones(len(batch), 2))

        def on_train_batch_start(self, *args: Any) -> None:
            self.before = weights(self.net)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert torch.equal(weights(self.net), self.before) is bool(batch_idx % 2)

    module = Some()
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module)
    assert module.skipped_steps == 0


def test_a_hook_of_the_class_itself_stands_against_lean_memory(tmp_path: Path) -> None:
    class Looks(Large):
        memory = "lean"

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    with pytest.raises(MisconfigurationException, match="on_before_optimizer_step of Looks may ask"):
        trainer(tmp_path, max_epochs=1).fit(Looks())


@pytest.mark.parametrize(
    ("options", "monitor", "form"),
    [
        ({"val_check_interval": 2}, "val/loss", "dict"),
        ({}, "loss_epoch", "dict"),
        ({}, "val/loss", "list"),
    ],
)
def test_plateaus_are_looked_for_when_automatic_optimization_does(
    options: dict[str, Any], monitor: str, form: str, tmp_path: Path
) -> None:
    class Plateau(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)
            one = {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
            return [one] if form == "list" else one

    class Ours(EstimatedGradient, Plateau):
        estimator = Backprop()

    rates = []
    for module in (Plateau(), Ours()):
        trainer(tmp_path, max_epochs=4, **options).fit(module)
        rates.append(module.rates)
    assert rates[0] == rates[1]
    assert rates[0][-1] < 1e-2


def test_a_module_may_have_a_mu_of_its_own(tmp_path: Path) -> None:
    class Variational(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mu = nn.Linear(2, 2)

        def training_step(self, batch: Tensor) -> Tensor:
            return self.mu(self.net(batch)).square().mean()

    class Ours(EstimatedGradient, Variational):
        estimator = ZerothOrder(seed=0)

    module = Ours()
    assert module.mu_in_use == 1e-3
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module)
    assert module.global_step == 8
