"""Lightning's own callbacks and tuner, beside an estimator."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner.tuning import Tuner
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.modules.ways import WAYS, Net, batches, driver, fitted, made, trainer, weights
from zo_lightning import Backprop, GradientFree, ZerothOrder

every_way = pytest.mark.parametrize("way", WAYS)
ZO = ZerothOrder(samples=2, seed=0)


class Iterates(Callback):
    """All weights and buffers after every step, and the learning rate."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))


@every_way
def test_stochastic_weight_averaging_and_its_pass_for_batchnorms_statistics(way: str, tmp_path: Path) -> None:
    """The last weights are the mean of those at the starts of the averaged epochs; the extra pass trains nothing."""
    iterates = Iterates()
    module, callbacks = made(Net, way, ZO)
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    torch.manual_seed(7)
    trainer(tmp_path, *callbacks, iterates, averaging, max_epochs=4).fit(module)
    assert len(iterates.seen) == 5 * 8
    starts = torch.stack([iterates.seen[8 * epoch - 1] for epoch in (1, 2, 3)])
    mean = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(mean, starts.mean(0))
    assert driver(module, callbacks).forward_passes == 4 * 8 * 4 + 8
    # The statistics are the cumulative means over the last pass, with the mean weights.
    x = torch.cat([module.net[0](batch) for batch, _ in batches()]).unflatten(0, (8, 4))  # type: ignore[index,operator]
    torch.testing.assert_close(module.net[1].running_mean, x.mean(1).mean(0))  # type: ignore[union-attr,index]


@every_way
def test_averaging_with_backpropagation_equals_automatic_optimization(way: str, tmp_path: Path) -> None:
    ends = [
        weights(fitted(Net, one, Backprop(), tmp_path, averaging, max_epochs=4))
        for one in ("plain", way)
        for averaging in [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)]
    ]
    assert torch.equal(*ends)


@every_way
def test_exponential_averages(way: str, tmp_path: Path) -> None:
    iterates = Iterates()
    module = fitted(Net, way, ZO, tmp_path, iterates, EMAWeightAveraging(decay=0.5))
    expected = iterates.seen[0]
    for one in iterates.seen[1:]:
        expected = expected.lerp(one, 0.5)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in module.parameters()]), expected)


@every_way
def test_pruned_weights_stay_zero(way: str, tmp_path: Path) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False)
    module = fitted(Net, way, ZO, tmp_path, pruning, max_epochs=3)
    first: Any = module.net[0]  # type: ignore[index]
    start: Any = Net().net[0]
    assert 0.2 < float((first.weight == 0).float().mean()) < 0.8
    assert int((first.weight != 0).sum()) == int(((first.weight != 0) & (first.weight != start.weight)).sum()) > 0


class Backbone(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:-1], self.net[-1]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.head.parameters() if p.requires_grad], lr=0.01)


@every_way
def test_a_backbone_is_frozen_and_unfrozen(way: str, tmp_path: Path) -> None:
    iterates = Iterates()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False, backbone_initial_lr=0.01)
    module = fitted(Backbone, way, ZO, tmp_path, iterates, finetuning)
    of_backbone = sum(p.numel() for p in module.backbone[0].parameters())  # type: ignore[union-attr,index]
    moved = [
        not torch.equal(a[:of_backbone], b[:of_backbone])
        for a, b in zip(iterates.seen, iterates.seen[1:], strict=False)
    ]
    assert moved == [False] * 7 + [True] * 8
    assert len(module.trainer.optimizers[0].param_groups) == 2


@every_way
def test_accumulation_by_a_schedule(way: str, tmp_path: Path) -> None:
    module, callbacks = made(Net, way, ZO)
    fit = trainer(tmp_path, *callbacks, GradientAccumulationScheduler({0: 1, 1: 4}))
    fit.fit(module)
    assert fit.global_step == 8 + 2
    with pytest.raises(MisconfigurationException, match="memory='lean': accumulate_grad_batches adds up whole"):
        lean = GradientFree(ZO, memory="lean")
        trainer(tmp_path, lean, GradientAccumulationScheduler({0: 1, 1: 4})).fit(Net())


@every_way
def test_checkpoints_early_stopping_and_the_learning_rate(way: str, tmp_path: Path) -> None:
    class Halves(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    module, callbacks = made(Halves, way, ZO)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    stop = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    rate = LearningRateMonitor("epoch")
    logger = CSVLogger(tmp_path)
    options = {"max_epochs": 9, "enable_checkpointing": True, "logger": logger, "log_every_n_steps": 1}
    fit = trainer(tmp_path, *callbacks, best, stop, rate, **options)
    fit.fit(module)
    assert fit.current_epoch == 2
    assert Path(best.best_model_path).is_file()
    lines = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert {"lr-SGD", "lr", "mu", "budget/forward_passes", "train_loss_step"} <= set(lines.splitlines()[0].split(","))


@every_way
def test_the_tuner_finds_a_rate_and_a_batch_size(way: str, tmp_path: Path) -> None:
    class Tuned(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lr, self.batch_size = 1e-4, 2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def train_dataloader(self) -> DataLoader:
            return batches(64, self.batch_size)

    module, callbacks = made(Tuned, way, ZO)
    before = weights(module)
    tuner = Tuner(trainer(tmp_path, *callbacks))
    found: Any = tuner.lr_find(module, num_training=20)
    assert found.suggestion() == module.lr != 1e-4
    tuner.scale_batch_size(module, max_trials=2)
    assert module.batch_size == 4
    assert torch.equal(weights(module), before)
    assert driver(module, callbacks).forward_passes == 0


@every_way
def test_resumed_within_an_accumulation_goes_on_as_lightning_does(way: str, tmp_path: Path) -> None:
    """Lightning keeps no gradients: what was added up before the checkpoint is lost, for any way to train."""

    class Linear(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 2))

    def resumed(one: str) -> tuple[Tensor, int]:
        folder = tmp_path / one
        keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        options = {"enable_checkpointing": True, "accumulate_grad_batches": 3, "limit_val_batches": 0}
        fitted(Linear, one, Backprop(), tmp_path, keep, max_epochs=1, **options)
        module, own = made(Linear, one, Backprop())
        fit = trainer(tmp_path, *own, max_epochs=2, accumulate_grad_batches=3, limit_val_batches=0)
        fit.fit(module, ckpt_path=folder / "step=2.ckpt")
        return weights(module), fit.global_step

    plain, ours = resumed("plain"), resumed(way)
    assert torch.equal(plain[0], ours[0]) and plain[1] == ours[1]


@every_way
def test_what_was_spent_is_in_the_checkpoint(way: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}", save_top_k=-1)
    fitted(Net, way, ZO, tmp_path, keep, enable_checkpointing=True, limit_val_batches=0)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    ours = saved["estimated_gradient"] if way == "mixin" else saved["callbacks"]["GradientFree"]
    assert ours["forward_passes"] == 4 * 4
