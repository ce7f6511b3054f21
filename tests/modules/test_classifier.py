import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from zo_lightning import AutomaticClassifier, Backprop, CentralDifference, Classifier, PerExample, ZerothOrder
from zo_lightning.data import Digits


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40,), generator=generator)
    classes = torch.randn(3, 1, 4, 4, generator=generator)
    images = classes[labels] + 0.3 * torch.randn(40, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def trainer(path: Path, **options: Any) -> Trainer:
    options = {"max_epochs": 2, "logger": False, **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=path, log_every_n_steps=2, **quiet, **options)


@pytest.mark.parametrize("estimator", [Backprop(), ZerothOrder()], ids=lambda e: type(e).__name__)
def test_tags(estimator: Any, tmp_path: Path) -> None:
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path))
    module = Classifier(net(), estimator, num_classes=3)
    fit.fit(module, loader(), loader())
    fit.test(module, loader(), verbose=False)
    header = set((Path(fit.logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(","))  # type: ignore[arg-type,union-attr]
    expected = {"train/loss", "train/acc", "train/loss_epoch", "val/loss", "val/acc", "test/loss", "test/acc", "lr"}
    expected |= {"budget/forward_passes", "budget/flops", "skipped_steps"}
    assert header - {"epoch", "step"} == (expected | {"mu"} if isinstance(estimator, ZerothOrder) else expected)
    assert module.forward_passes == 10 * (2 if isinstance(estimator, ZerothOrder) else 3)


def test_backprop_equals_the_automatic_twin(tmp_path: Path) -> None:
    twins = AutomaticClassifier(net(), num_classes=3), Classifier(net(), Backprop(), num_classes=3)
    for module in twins:
        trainer(tmp_path).fit(module, loader(), loader())
    assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))


@pytest.mark.parametrize(
    "estimator",
    [Backprop(), ZerothOrder(stencil=CentralDifference(1e-2), samples=4, seed=0)],
    ids=lambda e: type(e).__name__,
)
def test_learns_and_predicts(estimator: Any, tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=20)
    module = Classifier(net(), estimator, lambda p: torch.optim.Adam(p, 3e-2), num_classes=3)
    fit.fit(module, loader())
    predictions = torch.cat(fit.predict(module, loader()))  # type: ignore[arg-type]
    labels = loader().dataset.tensors[1]  # type: ignore[attr-defined]
    assert (predictions == labels).float().mean().item() > 0.9


@pytest.mark.parametrize("estimator", [ZerothOrder(seed=0), PerExample(seed=0)], ids=lambda e: type(e).__name__)
def test_law_7_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(estimator: Any, tmp_path: Path) -> None:
    def fit(max_steps: int, resume: Path | None = None) -> Classifier:
        torch.manual_seed(0)
        conv = nn.Sequential(nn.Conv2d(1, 2, 5, stride=4), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
        module = Classifier(nn.Sequential(conv, nn.Linear(72, 10)), copy.deepcopy(estimator))
        checkpoint = ModelCheckpoint(tmp_path / str(max_steps), every_n_train_steps=1, save_last=True)
        options = {"max_steps": max_steps, "max_epochs": -1, "logger": False, "callbacks": [checkpoint]}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
        fit = Trainer(accelerator="cpu", default_root_dir=tmp_path, **options, **quiet)  # type: ignore[arg-type]
        fit.fit(module, datamodule=Digits(batch_size=64, val_size=0, seed=0), ckpt_path=resume)
        return module

    whole = fit(30)  # an epoch has 23 batches
    fit(14)
    resumed = fit(30, tmp_path / "14" / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert resumed.forward_passes == whole.forward_passes
    assert resumed.flops == whole.flops > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"lr_interval": "batch"}, "lr_interval must be 'epoch' or 'step', got 'batch'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(net(), Backprop(), **arguments)
