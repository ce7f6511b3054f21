"""Tuning finds numbers that work, for any module, and leaves everything as it was."""

import random
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import zo_lightning as zo
from zo_lightning.random_states import random_states
from zo_lightning.tuning.stage import Stage


class Lit(LightningModule):
    """A regression with what a module can have beside its weights."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
        self.mean = MeanMetric()
        self.seen: list[float] = []
        self._count = 0
        self.moving = torch.zeros(1)
        self.broken_after: int | None = None
        self.error: type[BaseException] = KeyboardInterrupt

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x)[:, 0], y)
        self.mean.update(loss.detach())
        self.log("train/loss", loss)
        self.seen.append(float(loss))
        self._count += 1
        self.moving += 1
        if self._count == self.broken_after:
            raise self.error
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Halved(Lit):
    """Nothing random, and nothing that couples the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class ZOLit(zo.EstimatedGradient, Lit):
    estimator = zo.ZerothOrder(samples=2, seed=1)


def regression(count: int = 320) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, x @ torch.tensor([1.0, -2.0, 0.5, 0.0]))


def loader(count: int = 320) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(regression(count), batch_size=16, shuffle=True, generator=generator)


def everything(module: LightningModule) -> Callable[[], None]:
    """Notes all about a module; what is returned asserts that it is the same."""
    objects = {
        name: (p, p.data_ptr(), p.detach().clone(), p.grad, p.requires_grad) for name, p in module.named_parameters()
    }
    buffers = {name: (b, b.clone()) for name, b in module.named_buffers()}
    attributes = {id(one): dict(vars(one)) for one in module.modules()}
    lists = {id(one): [(v, list(v)) for v in vars(one).values() if isinstance(v, list)] for one in module.modules()}
    modes = [one.training for one in module.modules()]
    states = random_states()

    def check() -> None:
        for name, p in module.named_parameters():
            was, address, numbers, grad, requires_grad = objects[name]
            assert p is was and p.data_ptr() == address and torch.equal(p, numbers)
            assert p.grad is grad and p.requires_grad == requires_grad
        for name, b in module.named_buffers():
            assert b is buffers[name][0] and torch.equal(b, buffers[name][1])
        for one in module.modules():
            held = attributes[id(one)]
            assert vars(one).keys() == held.keys()
            for key, value in vars(one).items():
                assert value is held[key] or key in ("sum_value", "weight", "mean_value"), (
                    key
                )  # a metric's, checked below
            assert all(value == content for value, content in lists[id(one)])
        assert [one.training for one in module.modules()] == modes
        now = random_states()
        assert torch.equal(now["torch"], states["torch"]) and now["python"] == states["python"]
        assert torch.equal(now["numpy"][1], states["numpy"][1])

    return check


def used(module: Any) -> Any:
    """A module in the middle of something."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    module.seen.append(0.5)
    module.mean.update(torch.tensor(2.0))
    module.net[0].weight.grad = torch.ones(8, 4)
    module.net[4].bias.requires_grad_(False)
    module.net[1].eval()
    return module


@pytest.mark.parametrize(
    ("make", "trainer", "estimator"),
    [
        (ZOLit, lambda: None, None),
        (Lit, lambda: None, None),
        (Lit, lambda: None, zo.ZerothOrder()),
        (Lit, lambda: quiet(callbacks=[zo.GradientFree(zo.ForwardGradient())], precision="bf16-true"), None),
        (Lit, lambda: quiet(accumulate_grad_batches=2, gradient_clip_val=1.0), zo.Backprop()),
    ],
)
def test_all_is_left_as_found(make: Any, trainer: Any, estimator: Any) -> None:
    module = used(make())
    trainer, data = trainer(), loader()
    generator = data.generator
    assert generator is not None
    check, order = everything(module), generator.get_state()
    optimizers, callbacks = (None, None) if trainer is None else (trainer.optimizers, list(trainer.callbacks))
    suggestion = zo.tune(module, data, trainer, estimator=estimator, steps=8, progress=False)
    check()
    assert float(module.mean.compute()) == 2 and float(module.moving) == 0
    assert torch.equal(generator.get_state(), order)
    assert suggestion.lr > 0
    if trainer is not None:
        assert trainer.optimizers == optimizers and trainer.callbacks == callbacks and trainer.global_step == 0


@pytest.mark.parametrize("make", [ZOLit, Lit])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("after", [3, 150])
def test_all_is_left_as_found_when_stopped(make: Any, error: type[BaseException], after: int) -> None:
    module = used(make())
    module.broken_after, module.error = after, error
    check, handler = everything(module), signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        zo.tune(module, loader(), estimator=zo.ZerothOrder() if make is Lit else None, steps=40, progress=False)
    check()
    assert signal.getsignal(signal.SIGINT) is handler


def quiet(**options: Any) -> Trainer:
    return Trainer(
        **{"max_epochs": 3, **options},
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Bowl(LightningModule):
    """½ h ‖w‖², the mean over examples of a loss that all share."""

    def __init__(self, curvature: float, noise: float = 0.0, jump: float = 0.0, cubic: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(10, dtype=torch.float64))
        self.curvature, self.noise, self.jump, self.cubic = curvature, noise, jump, cubic
        self._noise = np.random.default_rng(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = 0.5 * self.curvature * self.w.square().sum() + self.cubic * self.w.pow(3).sum()
        if self.noise:
            loss = loss + self.noise * self._noise.standard_normal()
        return torch.floor(loss / self.jump) * self.jump if self.jump else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


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
        monkeypatch.setattr("zo_lightning.tuning.tuner.LARGE", large)
        torch.manual_seed(0)
        scans.append(zo.tune(Halved(), loader(), estimator=zo.ZerothOrder(seed=0), steps=4, progress=False).scan)
    assert scans[0] == scans[1] is not None


def test_estimator_of_the_trainers_callback_is_set() -> None:
    trainer = quiet(callbacks=[free := zo.GradientFree(zo.ZerothOrder(seed=0))])
    module = Lit()
    suggestion = zo.tune(module, loader(), trainer, steps=4, progress=False)
    suggestion.apply(module, trainer)
    assert free.estimator.mu == suggestion.mu and module.lr == pytest.approx(suggestion.lr)


class Data(LightningDataModule):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def setup(self, stage: str) -> None:
        print("setup")

    def train_dataloader(self) -> Any:
        return loader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return 2 * x, 2 * y


def test_data_module_is_set_up_once_and_keeps_its_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    data, module = Data(), Bowl(5.0)
    seen: list[float] = []
    own = module.training_step
    module.training_step = lambda batch, batch_idx: (seen.append(float(batch[0].std())), own(batch, batch_idx))[1]  # type: ignore[method-assign]
    before = dict(vars(data))
    zo.tune(module, data, steps=4, progress=False)
    assert capsys.readouterr().out.count("setup") == 1
    assert vars(data) == before
    assert np.mean(seen) == pytest.approx(2, rel=0.1)  # standard normal, doubled


def test_passes_are_counted() -> None:
    """All of them: Lightning's own are counted by the module, three for each batch that is differentiated."""
    for estimator in (None, zo.ZerothOrder(seed=0)):
        module = Bowl(5.0)
        asked: list[bool] = []
        own = module.training_step
        module.training_step = lambda batch, batch_idx, own=own, asked=asked: (  # type: ignore[method-assign]
            asked.append(torch.is_grad_enabled()),
            own(batch, batch_idx),
        )[1]
        suggestion = zo.tune(module, loader(), estimator=estimator, steps=8, progress=False)
        # The looks at losses are under no_grad in both cases, and so are the passes of an estimator.
        assert suggestion.forward_passes == asked.count(False) + 3 * asked.count(True)


def test_nothing_is_trained_while_batches_are_drawn() -> None:
    module = Lit()
    module.broken_after = 1
    stage = Stage(module, loader(), quiet(limit_train_batches=7))
    assert len(stage.batches(100)) == 7 and stage.batches_in_run == 21


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
    with pytest.raises(ValueError, match="steps must be at least 4, got 3"):
        zo.tune(Bowl(1.0), loader(), steps=3)
