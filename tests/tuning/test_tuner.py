"""Tuning finds numbers that work, for any module, and says what it doubts."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zo_lightning as zo
from tests.tuning.modules import Bowl, Halved, Lit, ZOLit, loader, quiet


def test_rate_of_a_quadratic_by_backpropagation() -> None:
    """40 steps of constant rate come to (1 - h lr)⁸⁰, which is 0 at 1 / h, and below 1e-24 from half to 3/2 of that."""
    for curvature in (5.0, 100.0):
        suggestion = zo.tune(Bowl(curvature), loader(), steps=40, progress=False)
        assert suggestion.mu is None and suggestion.scan is None
        assert 0.5 <= suggestion.lr * curvature <= 1.5
        assert suggestion.factor == pytest.approx(suggestion.lr / 1e-3)


def test_mu_of_known_noise_and_curvature() -> None:
    """Central differences of a quadratic have noise alone for an error: any step that drowns it in slope will do.

    Along signs the slope is h Σ ± 1, of mean square 10 h², and a step's error s / √2 μ.
    """
    suggestion = zo.tune(Bowl(1.0, noise=1e-3), loader(), estimator=zo.ZerothOrder(seed=0), steps=8, progress=False)
    assert suggestion.mu is not None and 1e-3 / (2**0.5 * suggestion.mu * 10**0.5) < 0.01
    assert isinstance(suggestion.estimator, zo.ZerothOrder) and suggestion.estimator.mu == suggestion.mu


def test_mu_crosses_the_jumps_of_a_quantised_loss() -> None:
    """Stairs of 0.1 on slopes of about 3 want a step of many times 0.1 / 3."""
    suggestion = zo.tune(Bowl(1.0, jump=0.1), loader(), estimator=zo.ZerothOrder(seed=0), steps=8, progress=False)
    assert suggestion.mu is not None and suggestion.mu >= 0.1


def test_a_constant_loss_is_said() -> None:
    estimator = zo.ZerothOrder(zo.Rademacher(), zo.CentralDifference(0.02), seed=0)
    suggestion = zo.tune(Bowl(0.0), loader(), estimator=estimator, steps=8, progress=False)
    assert suggestion.mu == 0.02
    assert len(suggestion.warnings) == 2
    assert "the same, or infinite, at every mu" in suggestion.warnings[0]
    assert suggestion.warnings[1] == "no learning rate lowers the loss within 8 batches: 0.001 stays"
    assert suggestion.lr == 1e-3 and suggestion.factor == 1


def test_suggestion_trains() -> None:
    """From a rate a thousand times too small: most of the loss goes in 60 steps."""
    torch.manual_seed(0)
    module, data = ZOLit(1e-5), loader()
    trainer = quiet(max_epochs=5)
    suggestion = zo.tune(module, data, trainer, steps=100, progress=False)
    assert suggestion.batches_in_run == 100
    suggestion.apply(module)
    assert module.lr == pytest.approx(suggestion.lr) and module.estimator.mu == suggestion.mu
    trainer.fit(module, data)
    assert np.mean(module.seen[-20:]) < 0.3 * np.mean(module.seen[:20])


class Grouped(Bowl):
    def configure_optimizers(self) -> Any:
        self.bias = self.w
        optimizer = torch.optim.SGD(
            [{"params": [self.w], "lr": 1e-2}, {"params": [nn.Parameter(torch.ones(1))]}], lr=2e-3
        )
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def test_groups_are_scaled_alike() -> None:
    module = Grouped(5.0)
    suggestion = zo.tune(module, loader(), steps=8, progress=False)
    assert suggestion.lr == pytest.approx(1e-2 * suggestion.factor)
    with pytest.raises(MisconfigurationException, match="neither lr nor learning_rate: multiply the learning rates"):
        suggestion.apply(module)


def test_rate_of_a_schedule_that_rises_is_its_highest() -> None:
    class Rising(Bowl):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-9)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 50)}

    suggestion = zo.tune(Rising(5.0), loader(), steps=40, progress=False)
    assert suggestion.lr == pytest.approx(0.1 * suggestion.factor)


def test_classifier_is_set_by_its_factory() -> None:
    torch.manual_seed(0)
    module = zo.Classifier(zo.SmallCNN(), zo.ZerothOrder(), partial(zo.AdaMM, lr=1e-2))
    images = TensorDataset(torch.rand(96, 1, 28, 28), torch.arange(96) % 10)
    suggestion = zo.tune(module, DataLoader(images, batch_size=16), steps=4, progress=False)
    suggestion.apply(module)
    assert module.configure_optimizers().param_groups[0]["lr"] == pytest.approx(suggestion.lr)
    assert module.estimator.mu == suggestion.mu


def test_rate_among_the_hyperparameters_is_set() -> None:
    class Saved(Bowl):
        def __init__(self, learning_rate: float) -> None:
            super().__init__(5.0)
            self.save_hyperparameters()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])

    module = Saved(1e-3)
    suggestion = zo.tune(module, loader(), steps=8, progress=False)
    assert module.hparams["learning_rate"] == 1e-3
    suggestion.apply(module)
    assert module.hparams["learning_rate"] == pytest.approx(suggestion.lr)


def test_ranks_of_losses_have_the_mu_of_losses() -> None:
    scans = []
    for shaping in (None, zo.CentredRanks()):
        torch.manual_seed(0)
        estimator = zo.ZerothOrder(samples=4, seed=0, shaping=shaping)
        suggestion = zo.tune(Halved(), loader(), estimator=estimator, steps=4, progress=False)
        assert suggestion.estimator == estimator.with_mu(suggestion.mu or 0)
        scans.append(suggestion.scan)
    assert scans[0] == scans[1] is not None


def test_lean_slopes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    for large in (10**9, 1):
        monkeypatch.setattr("zo_lightning.modules.memory.LARGE", large)
        torch.manual_seed(0)
        scans.append(zo.tune(Halved(), loader(), estimator=zo.ZerothOrder(seed=0), steps=4, progress=False).scan)
    assert scans[0] == scans[1] is not None


def test_estimator_of_the_trainers_callback_is_set() -> None:
    trainer = quiet(callbacks=[free := zo.GradientFree(zo.ZerothOrder(seed=0))])
    module = Lit()
    suggestion = zo.tune(module, loader(), trainer, steps=4, progress=False)
    suggestion.apply(module, trainer)
    assert free.estimator.mu == suggestion.mu and module.lr == pytest.approx(suggestion.lr)


def test_module_with_data_of_its_own() -> None:
    class Own(Bowl):
        def train_dataloader(self) -> Any:
            return loader()

    assert 0.5 <= 5 * zo.tune(Own(5.0), steps=40, progress=False).lr <= 1.5


def test_black_box() -> None:
    """Nothing but numbers of NumPy: the loss has no graph."""

    class Box(Bowl):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.tensor(float(np.square(self.w.detach().numpy()).sum()))

    suggestion = zo.tune(Box(0.0), loader(), estimator=zo.ZerothOrder(seed=0), steps=40, progress=False)
    assert min(trial.loss for trial in suggestion.trials) < 0.5 * suggestion.start


def test_a_metric_as_the_loss_is_trained() -> None:
    """F1 of one in four, of docs/black_boxes.md: constant between jumps, and 0.19 before training there."""
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    y = (x[:, 0] + x[:, 1] > 1).long()

    class Metric(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.f1, self.lr = nn.Linear(5, 2), 0.0, 1e-4

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.f1 = float(f1_score(batch[1].numpy(), self.net(batch[0]).argmax(1).numpy()))
            return torch.tensor(1 - self.f1)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    module, data = Metric(), DataLoader(TensorDataset(x, y), batch_size=200)
    trainer = quiet(max_epochs=60, callbacks=[zo.GradientFree(zo.ZerothOrder(samples=4, seed=0))])
    suggestion = zo.tune(module, data, trainer, steps=40, progress=False)
    assert suggestion.mu is not None and 0.03 <= suggestion.mu <= 1
    suggestion.apply(module, trainer)
    trainer.fit(module, data)
    assert module.f1 > 0.8


def test_slopes_of_examples() -> None:
    class Losses(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            losses = (self.net(x)[:, 0] - y).square()
            return {"loss": losses.mean(), "losses": losses}

    torch.manual_seed(0)
    suggestion = zo.tune(Losses(), loader(), estimator=zo.PerExample(seed=0), steps=40, progress=False)
    assert suggestion.mu is not None and 1e-4 <= suggestion.mu <= 0.1
    assert min(trial.loss for trial in suggestion.trials) < 0.5 * suggestion.start


def test_bf16_wants_a_larger_step() -> None:
    """bfloat16 rounds numbers to 8 bits where float32 has 24, so that slopes at 1e-4 have no digit, and there some."""
    found = {}
    for precision in ("bf16-mixed", "32-true"):
        torch.manual_seed(0)
        suggestion = zo.tune(
            Halved(), loader(), quiet(precision=precision), estimator=zo.ZerothOrder(seed=0), steps=4, progress=False
        )
        assert suggestion.scan is not None
        found[precision] = suggestion.mu, dict(zip(suggestion.scan.grid, suggestion.scan.errors, strict=True))[1e-4]
    (wide, drowned), (full, clear) = found.values()
    assert wide is not None and full is not None and wide > full and wide >= 1e-2
    assert drowned > 0.5 and clear < 0.02


def test_few_batches_do() -> None:
    for count in (16, 32, 100):
        assert zo.tune(Bowl(5.0), loader(count), steps=8, progress=False).lr > 0


def test_picture(tmp_path: Any) -> None:
    suggestion = zo.tune(Bowl(5.0), loader(), estimator=zo.ZerothOrder(seed=0), steps=4, progress=False)
    figure = suggestion.plot()
    assert [axes.get_xlabel() for axes in figure.axes] == ["mu", "learning rate"]
    figure.savefig(tmp_path / "tune.png")
    assert [axes.get_xlabel() for axes in zo.tune(Bowl(5.0), loader(), steps=4, progress=False).plot().axes] == [
        "learning rate"
    ]


def test_what_cannot_be_tuned_is_refused() -> None:
    class Manual(Bowl):
        @property
        def automatic_optimization(self) -> bool:  # type: ignore[override]
            return False

    class Two(Bowl):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 1e-2), torch.optim.SGD(self.parameters(), 1e-2)], []

    class Still(Bowl):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    class Infinite(Bowl):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * torch.nan

    lazy = Bowl(1.0)
    lazy.net = nn.LazyLinear(2)
    for module, data, message in (
        (Manual(1.0), loader(), "Manual steps its optimizers itself: it cannot be tuned"),
        (Two(1.0), loader(), "Two.configure_optimizers gave 2 optimizers: tune takes one"),
        (Still(1.0), loader(), "the optimizer's learning rate is 0.0"),
        (Infinite(1.0), loader(), "no trial has a finite loss"),
        (lazy, loader(), "Bowl has weights without a shape"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            zo.tune(module, data, estimator=zo.ZerothOrder(seed=0), steps=4, progress=False)
    with pytest.raises(MisconfigurationException, match=r"set ZOLit\.estimator"):
        zo.tune(ZOLit(), loader(), estimator=zo.ZerothOrder())
    with pytest.raises(ValueError, match="steps must be a whole number of at least 4, got 3"):
        zo.tune(Bowl(1.0), loader(), steps=3)
