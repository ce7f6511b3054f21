"""Two lines in an existing project: a ResNet of torchvision, in Lightning, in Fabric and in plain PyTorch.

    python -m examples.two_lines

Each function below is what somebody may have written already; the lines marked ``+`` are ours.
"""

import argparse
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytorch_lightning as pl
import torch
import torchvision
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import zo_lightning as zo  # +
from examples.bars import draw_bars
from examples.results import Cost, Result, read, record, table
from zo_lightning.callbacks import Budget
from zo_lightning.costs import count_flops

OUT = Path("docs/examples/two_lines.csv")


def digits(smoke: bool) -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's 8 x 8 images, four times as wide and high, for training and for the test."""
    data = load_digits()
    images = F.interpolate(torch.tensor(data.images).float()[:, None] / 8 - 1, scale_factor=4).expand(-1, 3, -1, -1)
    everything, cut = TensorDataset(images, torch.tensor(data.target)), 160 if smoke else 1200
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order[:cut], order[cut : 2 * cut]
    return tuple(TensorDataset(*everything[part]) for part in parts)  # type: ignore[return-value]


class LitResNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return {"loss": losses.mean(), "losses": losses}  # + for PerExample; ZerothOrder takes `return losses.mean()`

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class ByMixin(zo.EstimatedGradient, LitResNet):  # +
    estimator = zo.PerExample()  # +


def lightning(module: pl.LightningModule, batches: DataLoader, epochs: int, *callbacks: pl.Callback) -> tuple:
    budget = Budget()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[budget, *callbacks],
    )  # fmt: skip
    trainer.fit(module, batches)
    return module.net, budget.flops


def fabric(batches: DataLoader, epochs: int, estimator: zo.GradientEstimator) -> tuple:
    fabric, net = Fabric(accelerator="cpu", devices=1), torchvision.models.resnet18(num_classes=10)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=1e-3))
    state = estimator.init(model)  # +
    for step, (x, y) in enumerate(again(fabric.setup_dataloaders(batches), epochs)):
        optimizer.zero_grad()
        # fabric.backward(F.cross_entropy(model(x), y))
        estimator.backward(lambda: F.cross_entropy(model(x), y, reduction="none"), model, step, state)  # +
        optimizer.step()
    return net, float("nan")


def plain(batches: DataLoader, epochs: int, estimator: zo.GradientEstimator) -> tuple:
    net = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    state = estimator.init(net)  # +
    for step, (x, y) in enumerate(again(batches, epochs)):
        optimizer.zero_grad()
        # F.cross_entropy(net(x), y).backward()
        estimator.backward(lambda: F.cross_entropy(net(x), y, reduction="none"), net, step, state)  # +
        optimizer.step()
    return net, float("nan")


def again(batches: DataLoader, epochs: int) -> Iterator[list[Tensor]]:
    for _ in range(epochs):
        yield from batches


WAYS = {
    "theirs, Lightning": lambda batches, epochs: lightning(LitResNet(), batches, epochs),
    "callback, Backprop": lambda batches, epochs: lightning(
        LitResNet(), batches, epochs, zo.GradientFree(zo.Backprop())
    ),
    "callback, PerExample": lambda batches, epochs: lightning(
        LitResNet(), batches, epochs, zo.GradientFree(zo.PerExample())
    ),
    "mixin, PerExample": lambda batches, epochs: lightning(ByMixin(), batches, epochs),
    "Fabric, PerExample": lambda batches, epochs: fabric(batches, epochs, zo.PerExample()),
    "plain PyTorch, PerExample": lambda batches, epochs: plain(batches, epochs, zo.PerExample()),
    "callback, ZerothOrder": lambda batches, epochs: lightning(
        LitResNet(), batches, epochs, zo.GradientFree(zo.ZerothOrder(samples=2))
    ),
}


@torch.no_grad()
def accuracy(net: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return float((net.eval()(images).argmax(1) == labels).float().mean())
