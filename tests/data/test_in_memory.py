"""The base DataModule: splits, refused arguments, and stopping and resuming a real Trainer anywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from zo_lightning.data import InMemoryDataModule, TensorBatches


class Numbers(InMemoryDataModule):
    """Image i is the number i, so labels tell which images a batch has."""

    num_classes = 100
    in_channels = 1
    image_size = 2

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(40) if train else torch.arange(40, 60)
        return numbers.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2), numbers


def ready(**arguments: Any) -> Numbers:
    data = Numbers(**{"batch_size": 8, "val_size": 5, **arguments})
    data.setup()
    return data


def all_labels(batches: TensorBatches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def test_constants_are_there_before_setup() -> None:
    assert (Numbers.num_classes, Numbers().in_channels, Numbers().image_size) == (100, 1, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_disjoint_complete_and_decided_by_the_seed(seed: int) -> None:
    data = ready(seed=seed)
    train, val = all_labels(data.train_dataloader()), all_labels(data.val_dataloader())
    assert len(val) == 5
    assert sorted(train + val) == list(range(40))
    assert val == all_labels(ready(seed=seed).val_dataloader())
    assert val != all_labels(ready(seed=seed + 1).val_dataloader())
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert all_labels(loader) == list(range(40, 60))


def test_split_is_the_same_in_every_process() -> None:
    assert all_labels(ready(seed=3).val_dataloader()) == [34, 14, 22, 39, 12]


def test_no_validation_set_means_training_on_all_and_validating_on_the_test_set() -> None:
    data = ready(val_size=0)
    assert sorted(all_labels(data.train_dataloader())) == list(range(40))
    assert all_labels(data.val_dataloader()) == list(range(40, 60))


def test_validation_set_may_be_a_share_of_the_training_set() -> None:
    data, counted = ready(val_size=0.1), ready(val_size=4)
    assert all_labels(data.val_dataloader()) == all_labels(counted.val_dataloader())
    assert len(all_labels(data.train_dataloader())) == 36
    assert len(all_labels(ready(val_size=0.001).val_dataloader())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
        ({"val_size": -1}, "val_size=-1 must be a whole number of at least 0"),
        ({"val_size": 1.5}, "val_size=1.5 must be a whole number of at least 0"),
        ({"val_size": 40}, "val_size=40 must be below the number of training images, 40"),
        ({"seed": -3}, "seed=-3 must be a whole number of at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(**arguments)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(3, 1, 2, 2), [0, 100, 2], "Wrong training set: label 100 is outside the classes 0 to 99"),
        (torch.zeros(3, 1, 2, 2), [0, -1, 2], "label -1 is outside"),
        (torch.zeros(3, 1, 2, 2), [0, 1], "3 images and 2 labels"),
        (torch.zeros(0, 1, 2, 2), [], "0 images and 0 labels"),
        (torch.zeros(3, 1, 1, 2), [0, 1, 2], r"an image has shape \(1, 1, 2\), expected \(1, 2, 2\)"),
    ],
)
def test_data_that_are_not_as_stated_are_refused(images: Tensor, labels: list[int], message: str) -> None:
    class Wrong(Numbers):
        def load(self, train: bool) -> tuple[Tensor, Tensor]:
            return images, torch.tensor(labels, dtype=torch.int64)

    with pytest.raises(ValueError, match=message):
        Wrong().setup()


def test_loaders_before_setup_say_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"Numbers.setup\(\) must be called"):
        Numbers().train_dataloader()


class Recorder(LightningModule):
    """Trains nothing and records the labels of each batch; may be interrupted in the middle of a step."""

    def __init__(self, interrupt_at: int | None, plans_ahead: bool) -> None:
        super().__init__()
        self.plans_ahead = plans_ahead
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.interrupt_at = interrupt_at
        self.seen: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.global_step == self.interrupt_at:
            raise RuntimeError("stopped in the middle of a step")
        self.seen.append((self.current_epoch, batch_idx, batch[1].tolist()))
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.plans_ahead:  # As schedules do; asking for it sets up the loader before its state is restored.
            assert self.trainer.estimated_stepping_batches == 15
        return torch.optim.SGD(self.parameters())


LIMITS: list[dict[str, Any]] = [{"max_epochs": 3}, {"max_steps": 15, "max_epochs": -1}]


def fit(
    folder: Path,
    *callbacks: ModelCheckpoint,
    ckpt_path: Path | None = None,
    interrupt_at: int | None = None,
    plans_ahead: bool = False,
    data: Numbers | None = None,
    **limits: Any,
) -> list[tuple[int, int, list[int]]]:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **limits,
    )
    model = Recorder(interrupt_at, plans_ahead)
    try:
        # Checkpoints of loops hold more than tensors.
        trainer.fit(model, datamodule=data or Numbers(8, 5), ckpt_path=ckpt_path, weights_only=False)
    except RuntimeError as error:
        assert interrupt_at is not None and "middle of a step" in str(error)
    return model.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("plans_ahead", [False, True])
@pytest.mark.parametrize("limits", LIMITS, ids=["epochs", "steps"])
def test_resuming_after_any_batch_continues_the_same_sequence(
    tmp_path: Path, limits: dict[str, Any], plans_ahead: bool
) -> None:
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    limits = {**limits, "plans_ahead": plans_ahead}
    whole = fit(tmp_path, every_step, **limits)
    assert len(whole) == 15  # 3 epochs of 5 batches
    assert len({tuple(labels) for _, _, labels in whole}) == 15
    for step in range(1, 15):
        rest = fit(tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", **limits)
        assert rest == whole[step:], f"resumed after step {step}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limits", LIMITS, ids=["epochs", "steps"])
@pytest.mark.parametrize("after_training_epoch", [True, False], ids=["train-end", "validation-end"])
def test_resuming_after_an_epoch_continues_the_same_sequence(
    tmp_path: Path, limits: dict[str, Any], after_training_epoch: bool
) -> None:
    every_epoch = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=after_training_epoch)
    whole = fit(tmp_path, every_epoch, **limits)
    for step in (5, 10):
        assert fit(tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", **limits) == whole[step:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limits", LIMITS, ids=["epochs", "steps"])
@pytest.mark.parametrize("step", [3, 5, 7, 9])
def test_batch_of_an_interrupted_step_comes_again(tmp_path: Path, limits: dict[str, Any], step: int) -> None:
    whole = fit(tmp_path, **limits)
    on_exception = ModelCheckpoint(tmp_path, "stopped", save_on_exception=True, every_n_train_steps=1000)
    before = fit(tmp_path, on_exception, interrupt_at=step, **limits)
    after = fit(tmp_path, ckpt_path=tmp_path / "stopped.ckpt", **limits)
    assert before + after == whole


@pytest.mark.filterwarnings("ignore")
def test_loader_asked_for_after_a_fit_gives_whole_passes(tmp_path: Path) -> None:
    data = ready()
    fit(tmp_path, data=data, max_steps=7, max_epochs=-1)
    assert data.trainer is not None and data.trainer.global_step == 7
    assert len(all_labels(data.train_dataloader())) == 35


@pytest.mark.filterwarnings("ignore")
def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    seen = fit(tmp_path, max_epochs=3, overfit_batches=2)
    assert len({tuple(labels) for _, _, labels in seen}) == 2
