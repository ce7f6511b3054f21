"""A run that was stopped, in whatever way, and goes on from last.ckpt ends as one that was never stopped."""

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zo_lightning as zo
from zo_lightning.callbacks.exact_resume import KEY
from zo_lightning.callbacks.last_checkpoint import LastCheckpoint
from zo_lightning.checkpoint_io import AtomicCheckpointIO, load_checked
from zo_lightning.curves import continue_curves
from zo_lightning.data import Digits

ESTIMATORS = {
    "Backprop": zo.Backprop(),
    "ZerothOrder": zo.ZerothOrder(samples=2),
    "PerExample": zo.PerExample(),
    "ForwardGradient": zo.ForwardGradient(),
}
STEPS = 4  # per epoch: 833 images in batches of 256
EVERY_BATCH: dict[str, Any] = {"every_seconds": 0.0}


class Stop(Callback):
    """Stops a run after so many steps."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def _now(self, trainer: Trainer, where: str) -> bool:
        return trainer.global_step == self.step and self.how.endswith(where) and not trainer.sanity_checking

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._now(trainer, "before the step"):
            raise RuntimeError("stopped")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._now(trainer, "after the step"):
            os.kill(os.getpid(), signal.SIGINT if "Ctrl-C" in self.how else signal.SIGTERM)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._now(trainer, "in validation"):
            if "error" in self.how:
                raise RuntimeError("stopped")
            os.kill(os.getpid(), signal.SIGTERM)


class Copy(Callback):
    """Keeps what a run has on disk at one moment, as if it had been killed then."""

    def __init__(self, step: int, run: Path, to: Path) -> None:
        self.step, self.run, self.to = step, run, to

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step + 1 and not self.to.exists():
            shutil.copytree(self.run, self.to)


def module(estimator: zo.GradientEstimator) -> zo.Classifier:
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10)
    )
    return zo.Classifier(
        net,
        estimator,
        lambda weights: torch.optim.Adam(weights, 1e-2),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3),
    )


def fit(
    folder: Path,
    estimator: zo.GradientEstimator,
    *callbacks: Callback,
    resume: Path | None = None,
    last: dict[str, Any] | None = None,
    **options: Any,
) -> LightningModule:
    seed_everything(1)
    trained = module(estimator)
    own = {"save_dir": folder, "name": "", "version": ""}
    options = {"max_epochs": 3, "log_every_n_steps": 1, "limit_val_batches": 3} | options
    trainer = Trainer(
        accelerator="cpu",
        logger=[TensorBoardLogger(**own), CSVLogger(**own)],
        callbacks=[
            LastCheckpoint(**(last or {"every_seconds": None})),
            *callbacks,
            ModelCheckpoint(monitor="val/acc", mode="max", filename="best"),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    if resume is not None:
        continue_curves(trainer.loggers, load_checked(resume)[KEY]["curves"], resume.parent.parent)
        torch.manual_seed(7)  # a new process is elsewhere in its numbers
        np.random.seed(7)
    trainer.fit(trained, Digits(batch_size=256, val_size=600, seed=0), ckpt_path=resume)
    return trained


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def assert_same(a: Path, b: Path, trained: LightningModule, again: LightningModule) -> None:
    """Weights, buffers, both kinds of curves, optimizer, schedule, estimator and spent passes."""
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert curves(a) == curves(b)
    tables = [pd.read_csv(folder / "metrics.csv").sort_index(axis=1) for folder in (a, b)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    ends = [load_checked(folder / "checkpoints" / "last.ckpt") for folder in (a, b)]
    for key in ("global_step", "epoch", "optimizer_states", "lr_schedulers", "estimated_gradient", "epoch_loss"):
        assert same(ends[0][key], ends[1][key]), key


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(autouse=True)
def writes_may_take_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_lightning.callbacks.last_checkpoint._SHARE", 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, LightningModule]]:
    """Runs that were never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: (folder / name, fit(folder / name, estimator)) for name, estimator in ESTIMATORS.items()}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("how", "step"),
    [
        ("SIGTERM after the step", 2),
        ("SIGTERM after the step", STEPS),
        ("SIGTERM in validation", STEPS),
        ("Ctrl-C after the step", 5),
        ("error before the step", 6),
        ("error in validation", 2 * STEPS),
    ],
)
def test_stopped_by_a_signal_or_an_error(
    tmp_path: Path, whole: dict[str, tuple[Path, LightningModule]], estimator: str, how: str, step: int
) -> None:
    with pytest.raises((SIGTERMException, RuntimeError)):
        fit(tmp_path, ESTIMATORS[estimator], Stop(step, how))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert load_checked(last)["global_step"] == step
    assert_same(whole[estimator][0], tmp_path, whole[estimator][1], fit(tmp_path, ESTIMATORS[estimator], resume=last))


@pytest.mark.parametrize("steps", [1, 3, STEPS, 6])
@pytest.mark.parametrize("by", ["max_epochs", "max_steps"])
def test_stopped_by_max_steps_and_continued_elsewhere(
    tmp_path: Path, whole: dict[str, tuple[Path, LightningModule]], steps: int, by: str
) -> None:
    fit(tmp_path / "a", zo.Backprop(), max_steps=steps)
    limit: dict[str, Any] = {"max_epochs": 3} if by == "max_epochs" else {"max_epochs": -1, "max_steps": 3 * STEPS}
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    assert load_checked(last)["global_step"] == steps
    again = fit(tmp_path / "b", zo.Backprop(), resume=last, **limit)
    assert_same(whole["Backprop"][0], tmp_path / "b", whole["Backprop"][1], again)
    best = [load_checked(folder / "checkpoints" / "best.ckpt") for folder in (whole["Backprop"][0], tmp_path / "b")]
    assert best[0]["global_step"] == best[1]["global_step"]
    assert same(best[0]["state_dict"], best[1]["state_dict"])


@pytest.mark.parametrize("step", [1, STEPS, 6, 7])
def test_killed(tmp_path: Path, whole: dict[str, tuple[Path, LightningModule]], step: int) -> None:
    fit(tmp_path / "a", zo.Backprop(), Copy(step, tmp_path / "a", tmp_path / "b"), last=EVERY_BATCH)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    assert load_checked(last)["global_step"] == step
    shutil.rmtree(tmp_path / "a")  # the run was moved
    again = fit(tmp_path / "b", zo.Backprop(), resume=last)
    assert_same(whole["Backprop"][0], tmp_path / "b", whole["Backprop"][1], again)


@pytest.mark.parametrize("step", [2, 5, 6])
def test_validation_within_epochs(tmp_path: Path, step: int) -> None:
    options: dict[str, Any] = {"val_check_interval": 2, "log_every_n_steps": 3}
    trained = fit(tmp_path / "whole", zo.Backprop(), **options)
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "a", zo.Backprop(), Stop(step, "SIGTERM after the step"), **options)
    again = fit(tmp_path / "a", zo.Backprop(), resume=tmp_path / "a" / "checkpoints" / "last.ckpt", **options)
    assert_same(tmp_path / "whole", tmp_path / "a", trained, again)


class Foreign(LightningModule):
    """A module of somebody else, who logs over the epoch, draws NumPy's numbers and watches a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0] + 0.1 * np.random.rand()), batch[1])
        self.log("mean", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/acc", "frequency": 2}}


class Loader(Digits):
    """Data of somebody else: PyTorch's own loader, whose order is one of the global random numbers."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self._subset("train")), 256, shuffle=True, collate_fn=_scaled)


def _scaled(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    images, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return [images.float() / 255, labels]


@pytest.mark.parametrize("data", [Digits, Loader])
@pytest.mark.parametrize("step", [3, STEPS, 5, 2 * STEPS])
def test_module_and_loader_of_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, data: type[Digits]
) -> None:
    monkeypatch.setitem(globals(), "module", lambda _: Foreign())
    monkeypatch.setitem(globals(), "Digits", data)
    options: dict[str, Any] = {"check_val_every_n_epoch": 2, "max_epochs": 4}
    trained = fit(tmp_path / "whole", zo.Backprop(), **options)
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "a", zo.Backprop(), Stop(step, "SIGTERM after the step"), **options)
    again = fit(tmp_path / "a", zo.Backprop(), resume=tmp_path / "a" / "checkpoints" / "last.ckpt", **options)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert curves(tmp_path / "whole") == curves(tmp_path / "a")


@pytest.mark.parametrize("estimator", ["ZerothOrder", "ForwardGradient"])
def test_module_of_somebody_else_driven_by_the_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    monkeypatch.setitem(globals(), "module", lambda _: Foreign())

    def driven(folder: Path, *callbacks: Callback, resume: Path | None = None) -> LightningModule:
        driver = zo.GradientFree(ESTIMATORS[estimator])
        return fit(folder, zo.Backprop(), driver, *callbacks, resume=resume, check_val_every_n_epoch=2, max_epochs=4)

    trained = driven(tmp_path / "whole")
    with pytest.raises(SIGTERMException):
        driven(tmp_path / "a", Stop(5, "SIGTERM after the step"))
    again = driven(tmp_path / "a", resume=tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert same(dict(trained.state_dict()), dict(again.state_dict()))
    assert curves(tmp_path / "whole") == curves(tmp_path / "a")


def test_a_run_goes_on_from_its_best_checkpoint(tmp_path: Path, whole: dict[str, tuple[Path, LightningModule]]) -> None:
    fit(tmp_path / "a", zo.Backprop(), max_steps=STEPS + 3)
    best = tmp_path / "a" / "checkpoints" / "best.ckpt"
    assert load_checked(best)["global_step"] == STEPS
    again = fit(tmp_path / "b", zo.Backprop(), resume=best)
    assert_same(whole["Backprop"][0], tmp_path / "b", whole["Backprop"][1], again)


def test_error_after_weights_were_written_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path, zo.Backprop(), Fails(), last=EVERY_BATCH)
    assert load_checked(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2


@pytest.mark.parametrize(("every", "at"), [(3600.0, [1, 3 * STEPS]), (None, [3 * STEPS])])
def test_written_after_the_first_step_in_intervals_and_once_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float | None, at: list[int]
) -> None:
    written: list[tuple[str, int]] = []
    save = Trainer.save_checkpoint
    monkeypatch.setattr(
        Trainer,
        "save_checkpoint",
        lambda t, f, *a, **k: (written.append((Path(f).name, t.global_step)), save(t, f, *a, **k)),
    )
    fit(tmp_path, zo.Backprop(), last={"every_seconds": every})
    assert [step for name, step in written if name == "last.ckpt"] == at


def test_another_run_keeps_its_file(tmp_path: Path) -> None:
    fit(tmp_path, zo.Backprop(), max_epochs=1)
    fit(tmp_path, zo.Backprop(), max_epochs=2)
    steps = {path.name: load_checked(path)["global_step"] for path in (tmp_path / "checkpoints").glob("last*")}
    assert steps == {"last.ckpt": STEPS, "last-v1.ckpt": 2 * STEPS}


@pytest.mark.parametrize("every", [-1.0, math.inf, math.nan])
def test_interval_must_be_finite(every: float) -> None:
    with pytest.raises(ValueError, match=f"every_seconds must be a finite number of at least 0, or null, got {every}"):
        LastCheckpoint(every)


class StopAccumulating(Callback):
    """Stops a run at its sixth batch, the second of three whose gradients are accumulated."""

    def __init__(self, how: str) -> None:
        self.how = how

    def _stop(self, trainer: Trainer, how: str) -> None:
        if how == self.how and trainer.fit_loop.total_batch_idx == 5:
            raise RuntimeError("stopped")

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._stop(trainer, "before the step")

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        self._stop(trainer, "after its backward")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.how == "SIGTERM" and trainer.fit_loop.total_batch_idx == 5:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("estimator", ["Backprop", "ZerothOrder", "PerExample"])
@pytest.mark.parametrize(
    ("how", "batches"),
    [("SIGTERM", 6), ("before the step", 5), ("after its backward", STEPS)],
    ids=lambda how: str(how),
)
def test_stopped_while_gradients_are_accumulated(tmp_path: Path, how: str, batches: int, estimator: str) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "last": EVERY_BATCH}
    trained = fit(tmp_path / "whole", ESTIMATORS[estimator], **options)
    with pytest.raises((SIGTERMException, RuntimeError)):
        fit(tmp_path / "a", ESTIMATORS[estimator], StopAccumulating(how), **options)
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    state = load_checked(last)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == batches
    assert bool(state[KEY]["gradients"]) == (batches > STEPS)  # not between two epochs
    again = fit(tmp_path / "a", ESTIMATORS[estimator], resume=last, **options)
    assert_same(tmp_path / "whole", tmp_path / "a", trained, again)


@pytest.mark.parametrize("data", [Digits, Loader])
@pytest.mark.parametrize("step", [1, 6])
def test_a_run_goes_on_from_what_somebody_else_saved_within_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, data: type[Digits]
) -> None:
    monkeypatch.setitem(globals(), "Digits", data)

    def saves(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder, "{step}", every_n_train_steps=step, save_top_k=-1)

    trained = fit(tmp_path / "whole", zo.ZerothOrder(samples=2), saves(tmp_path / "saved"))
    saved = tmp_path / "saved" / f"step={step}.ckpt"
    again = fit(tmp_path / "again", zo.ZerothOrder(samples=2), saves(tmp_path / "other"), resume=saved)
    assert same(dict(trained.state_dict()), dict(again.state_dict()))
