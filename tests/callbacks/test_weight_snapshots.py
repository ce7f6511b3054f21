from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from tests.callbacks.runs import Linear, batches, classifier, events, scalars, trainer, validation, weights
from zo_lightning.callbacks import WeightSnapshots
from zo_lightning.snapshots import read_snapshots


def steps(folder: Path) -> list[int]:
    return [snapshot.step for snapshot in read_snapshots(folder)]


def test_every_epoch_and_the_initialisation(tmp_path: Path) -> None:
    module = classifier()
    before = weights(module)
    trainer(tmp_path, WeightSnapshots()).fit(module, batches())
    found = read_snapshots(tmp_path)
    assert [(s.epoch, s.step, s.within_epoch) for s in found] == [(0, 0, False), (1, 6, False), (2, 12, False)]
    for snapshot, expected in ((found[0], before), (found[-1], weights(module))):
        assert all(torch.equal(value, expected[name]) for name, value in snapshot.load().items())
    assert set(scalars(tmp_path)) == {f"weight_norm/{name}" for name in (*before, "all")}


def test_every_n_steps_and_epochs(tmp_path: Path) -> None:
    trainer(tmp_path / "steps", WeightSnapshots(None, every_n_steps=4)).fit(classifier(), batches())
    assert [(s.step, s.epoch, s.within_epoch) for s in read_snapshots(tmp_path / "steps")] == [
        (0, 0, False),
        (4, 0, True),
        (8, 1, True),
        (12, 2, False),
    ]
    trainer(tmp_path / "epochs", WeightSnapshots(2), max_epochs=5).fit(classifier(), batches())
    assert steps(tmp_path / "epochs") == [0, 12, 24]


@pytest.mark.parametrize(("keep", "left"), [(1, [0, 30]), (2, [0, 24, 30]), (9, [0, 6, 12, 18, 24, 30])])
def test_disk_is_bounded(keep: int, left: list[int], tmp_path: Path) -> None:
    trainer(tmp_path, WeightSnapshots(keep=keep), max_epochs=5).fit(classifier(), batches())
    assert steps(tmp_path) == left


def test_histograms_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, WeightSnapshots(), logger=logger).fit(classifier(), batches())
    assert steps(Path(logger.log_dir)) == [0, 6, 12]
    seen = events(Path(logger.log_dir))
    assert [event.step for event in seen.Histograms("weights/net.0.weight")] == [0, 6, 12]
    assert [event.step for event in seen.Scalars("weight_norm/net.0.weight")] == [0, 6, 12]


@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_epochs": None, "every_n_steps": 4}], ids=str)
@pytest.mark.parametrize("stop", [3, 6, 8])
@pytest.mark.parametrize("folder", ["same", "other"])
def test_a_resumed_run_has_the_history_of_the_whole(
    every: dict[str, Any], stop: int, folder: str, tmp_path: Path
) -> None:
    def fit(name: str, version: int, resume: Path | None = None, **options: Any) -> Path:
        logger = CSVLogger(tmp_path, name, version)
        checkpoint = ModelCheckpoint(tmp_path / "ckpt" / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callbacks = [WeightSnapshots(**every), checkpoint]
        options = {"logger": logger, "enable_checkpointing": True, "max_epochs": 3, **options}
        trainer(tmp_path, *callbacks, **options).fit(classifier(), batches(), ckpt_path=resume)
        return Path(logger.log_dir)

    whole = fit("whole", 0)
    fit("broken", 0, max_steps=14)  # goes on beyond the checkpoint that it is resumed from
    resumed = fit("broken", 0 if folder == "same" else 1, tmp_path / "ckpt" / "broken" / f"step={stop}.ckpt")
    expected, found = read_snapshots(whole), read_snapshots(resumed)
    assert [s.path.name for s in found] == [s.path.name for s in expected]
    for a, b in zip(found, expected, strict=True):
        ours, theirs = a.load(), b.load()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_made_at_validation_knows_of_the_snapshot_before(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="val/loss")
    trainer(tmp_path, WeightSnapshots(), checkpoint, enable_checkpointing=True, max_epochs=1).fit(
        classifier(), batches(), validation()
    )
    assert steps(tmp_path) == [0, 6]
    again = trainer(tmp_path, WeightSnapshots(), max_epochs=2)
    again.fit(classifier(), batches(), validation(), ckpt_path=checkpoint.best_model_path)
    assert steps(tmp_path) == [0, 6, 12]


def test_two_runs_in_one_folder_are_refused_and_the_first_is_kept(tmp_path: Path) -> None:
    trainer(tmp_path, WeightSnapshots(), max_epochs=1).fit(classifier(), batches())
    with pytest.raises(MisconfigurationException, match="holds snapshots of another run"):
        trainer(tmp_path, WeightSnapshots()).fit(classifier(), batches())
    assert steps(tmp_path) == [0, 6]


def test_a_run_continued_where_another_one_lies_is_refused(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3)
    options = {"max_steps": 3, "enable_checkpointing": True}
    trainer(tmp_path / "a", WeightSnapshots(), checkpoint, **options).fit(classifier(), batches())
    trainer(tmp_path / "b", WeightSnapshots(), max_epochs=1).fit(classifier(), batches())
    with pytest.raises(MisconfigurationException, match="holds snapshots of another run"):
        resumed = trainer(tmp_path / "b", WeightSnapshots())
        resumed.fit(classifier(), batches(), ckpt_path=checkpoint.best_model_path)
    assert steps(tmp_path / "b") == [0, 6]


def test_what_keep_has_deleted_since_the_checkpoint_is_said(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=6, save_top_k=-1, filename="{step}")
    first = trainer(tmp_path, WeightSnapshots(keep=1), checkpoint, enable_checkpointing=True)
    first.fit(classifier(), batches())
    with pytest.warns(UserWarning, match=r"snapshots of steps \[6\] are no longer in "):
        again = trainer(tmp_path, WeightSnapshots(keep=1), max_epochs=3)
        again.fit(classifier(), batches(), ckpt_path=tmp_path / "ckpt" / "step=6.ckpt")
    assert steps(tmp_path) == [0, 18]


def test_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `WeightSnapshots`"):
        trainer(tmp_path, WeightSnapshots(), WeightSnapshots(None, 5))


def test_the_same_callback_in_a_second_run(tmp_path: Path) -> None:
    callback = WeightSnapshots()
    for name in ("first", "second"):
        trainer(tmp_path / name, callback, max_epochs=1).fit(classifier(), batches())
        assert steps(tmp_path / name) == [0, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_of_low_precision_in_automatic_optimization(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Linear(dtype)
    trainer(tmp_path, WeightSnapshots()).fit(module, batches())
    last = read_snapshots(tmp_path)[-1].load()
    assert last.keys() == {"inner.weight", "inner.bias", "tied.bias"}
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in last.items())


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, WeightSnapshots(), fast_dev_run=True).fit(classifier(), batches())
    assert not list(tmp_path.iterdir())


def test_bad_arguments() -> None:
    for name in ("every_n_epochs", "every_n_steps", "keep"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            WeightSnapshots(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of every_n_epochs and every_n_steps must be given"):
        WeightSnapshots(None)
