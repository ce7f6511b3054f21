from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from tests.callbacks.runs import automatic, batches, classifier, events, first_order, scalars, trainer, validation
from zo_lightning.callbacks import Budget
from zo_lightning.callbacks.budget import peak_memory


@pytest.mark.parametrize(("make", "per_step"), [(classifier, 2), (first_order, 3), (automatic, 3)])
def test_every_curve_also_against_forward_passes(make: Any, per_step: int, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit = trainer(tmp_path, Budget(), logger=logger)
    fit.fit(make(), batches(), validation())
    seen = events(Path(logger.log_dir))
    tags = {tag for tag in seen.Tags()["scalars"] if not tag.startswith("by_") and tag != "epoch"}
    copies = {tag.removeprefix("by_forward_passes/") for tag in seen.Tags()["scalars"] if tag.startswith("by_")}
    assert copies == tags - {"budget/forward_passes"} >= {"train/loss", "val/acc", "budget/seconds"}
    for tag in copies:
        by_steps, by_passes = seen.Scalars(tag), seen.Scalars(f"by_forward_passes/{tag}")
        assert [event.value for event in by_steps] == [event.value for event in by_passes], tag
    assert [event.step for event in seen.Scalars("by_forward_passes/val/acc")] == [6 * per_step, 12 * per_step]
    assert [event.step for event in seen.Scalars("by_forward_passes/train/loss")] == [
        per_step * step for step in (2, 4, 6, 8, 10, 12)
    ]
    assert [event.value for event in seen.Scalars("budget/forward_passes")][-1] == 12 * per_step
    assert [event.value for event in seen.Scalars("budget/examples")] == [8, 16, 24, 32, 40, 48]
    assert fit.loggers == [logger]  # the second one was for the run


def test_seconds_memory_and_speed(tmp_path: Path) -> None:
    trainer(tmp_path, Budget()).fit(automatic(), batches())
    logged = {tag: [value for _, value in values] for tag, values in scalars(tmp_path).items()}
    assert logged["budget/seconds"] == sorted(logged["budget/seconds"]) and logged["budget/seconds"][0] > 0
    # two steps lie between two readings of the clock
    between = [2 / (b - a) for a, b in zip(logged["budget/seconds"], logged["budget/seconds"][1:], strict=False)]
    assert logged["budget/steps_per_second"][1:] == pytest.approx(between, rel=0.01)
    assert 50 < logged["budget/peak_memory_mb"][0] < 100_000
    before = peak_memory(torch.device("cpu"))
    assert peak_memory(torch.device("cpu")) >= before + (torch.ones(1 << 26).sum() < 0)


def test_it_goes_on_counting_after_a_resume(tmp_path: Path) -> None:
    class Wait(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            budget = next(c for c in trained.callbacks if isinstance(c, Budget))  # type: ignore[attr-defined]
            budget._since -= 10  # as if the batch had taken ten seconds

    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4)
    trained: Trainer = trainer(tmp_path / "a", Budget(), Wait(), checkpoint, max_steps=4, enable_checkpointing=True)
    trained.fit(automatic(), batches())
    trainer(tmp_path / "b", Budget()).fit(automatic(), batches(), ckpt_path=checkpoint.best_model_path)
    logged = scalars(tmp_path / "b")
    assert logged["budget/examples"][0] == (6, 24)
    assert logged["budget/forward_passes"][0] == (6, 18)
    assert 40 < logged["budget/seconds"][0][1] < 60


def test_a_run_after_one_that_failed_draws_each_curve_once(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if not trainer.global_step:
                trainer.callbacks.remove(self)  # type: ignore[attr-defined]
                raise RuntimeError("broken")

    fit = trainer(tmp_path, Budget(), Fails(), logger=TensorBoardLogger(tmp_path))
    with pytest.raises(RuntimeError, match="broken"):
        fit.fit(automatic(), batches())
    fit.fit(automatic(), batches())
    assert len(fit.loggers) == 1
    assert len(events(Path(fit.log_dir or "")).Scalars("by_forward_passes/budget/examples")) == 6


def test_a_logger_without_pictures_gets_the_columns(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, Budget(), logger=logger).fit(automatic(), batches())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"budget/forward_passes", "budget/examples", "train/loss"} <= set(header)
    assert not any(tag.startswith("by_") for tag in header)


def test_batches_of_unknown_size_count_as_none() -> None:
    from zo_lightning.callbacks.budget import _size

    assert _size((torch.ones(5, 2), torch.ones(5))) == 5
    assert _size(object()) == 0
