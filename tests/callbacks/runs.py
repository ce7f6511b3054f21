"""Small runs for the tests of callbacks."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import AutomaticClassifier, Backprop, Classifier, GradientEstimator, ZerothOrder
from zo_lightning.data.batches import ShuffledBatches, TensorBatches


def net(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 3)
    )


def batches(size: int = 24, batch: int = 4, channels: int = 3) -> ShuffledBatches:
    return ShuffledBatches(*_data(size, channels), batch, seed=0)


def validation() -> TensorBatches:
    return TensorBatches(*_data(8, 3), 4)


def _data(size: int, channels: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(size) % 3
    noise = torch.randn(size, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return labels.view(-1, 1, 1, 1) + noise, labels


def classifier(estimator: GradientEstimator | None = None, of: nn.Module | None = None) -> Classifier:
    """By default zeroth order with the seed 0."""
    estimator = ZerothOrder(seed=0) if estimator is None else estimator
    return Classifier(net() if of is None else of, estimator, lambda p: torch.optim.Adam(p, 1e-2), num_classes=3)


def first_order() -> Classifier:
    return classifier(Backprop())


def automatic() -> AutomaticClassifier:
    return AutomaticClassifier(net(), lambda p: torch.optim.Adam(p, 1e-2), num_classes=3)


class Linear(LightningModule):
    """A foreign module without a convolution, in automatic optimization, whose loss is a bare tensor."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8, dtype=dtype)
        self.tied = nn.Linear(8, 8, dtype=dtype)
        self.tied.weight = self.inner.weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = batch[0][:, 0, 0].to(self.inner.weight.dtype)
        return F.mse_loss(self.tied(self.inner(x).tanh()).float(), x.float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """Two epochs of six steps, without a logger."""
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 2,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What ``scalars.csv`` holds, by tag."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "scalars.csv").read_text().splitlines():
        step, tag, value = line.split(",")
        found.setdefault(tag, []).append((int(step), float(value)))
    return found


def events(folder: Path) -> EventAccumulator:
    """The event files of a folder, by TensorBoard's own reader, and whole."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()
