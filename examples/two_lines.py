"""Two lines in an existing project: torchvision's ResNet-18 in Lightning, in Fabric and in plain PyTorch.

    python -m examples.two_lines

All of it is what somebody may have written already, but for the lines marked with a plus: those are ours.
"""

from collections.abc import Iterator
from math import nan
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import zo_lightning as zo  # +
from examples.results import Cost, Result
from examples.runs import main
from zo_lightning.callbacks import Budget


class LitResNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18(num_classes=10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return {"loss": losses.mean(), "losses": losses}  # "losses" is for PerExample; the others take the loss alone

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class MixedIn(zo.EstimatedGradient, LitResNet):  # +
    estimator = zo.PerExample()  # +


def lightning(model: LitResNet, batches: DataLoader, epochs: int, *callbacks: pl.Callback) -> tuple[nn.Module, float]:
    budget = Budget()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[budget, *callbacks],  # + for the callback
        logger=False,
        log_every_n_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, batches)
    return model.net, budget.flops


def fabric(batches: DataLoader, epochs: int) -> tuple[nn.Module, float]:
    fabric, net = Fabric(accelerator="cpu", devices=1), resnet18(num_classes=10)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=1e-3))
    estimator = zo.PerExample()  # +
    state = estimator.init(model)  # +
    for step, (x, y) in enumerate(several(epochs, batches)):
        optimizer.zero_grad()
        # fabric.backward(F.cross_entropy(model(x), y))
        estimator.backward(lambda: F.cross_entropy(model(x), y, reduction="none"), model, step, state)  # +
        optimizer.step()
    return net, nan


def plain(batches: DataLoader, epochs: int) -> tuple[nn.Module, float]:
    net = resnet18(num_classes=10)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    estimator = zo.PerExample()  # +
    state = estimator.init(net)  # +
    for step, (x, y) in enumerate(several(epochs, batches)):
        optimizer.zero_grad()
        # F.cross_entropy(net(x), y).backward()
        estimator.backward(lambda: F.cross_entropy(net(x), y, reduction="none"), net, step, state)  # +
        optimizer.step()
    return net, nan


def several(epochs: int, batches: DataLoader) -> Iterator[list[Tensor]]:
    for _ in range(epochs):
        yield from batches


WAYS = {
    "Lightning without us": lambda *data: lightning(LitResNet(), *data),
    "callback, Backprop": lambda *data: lightning(LitResNet(), *data, zo.GradientFree(zo.Backprop())),  # +
    "callback, PerExample": lambda *data: lightning(LitResNet(), *data, zo.GradientFree(zo.PerExample())),  # +
    "mixin, PerExample": lambda *data: lightning(MixedIn(), *data),
    "Fabric, PerExample": fabric,
    "PyTorch, PerExample": plain,
    "callback, ZerothOrder": lambda *data: lightning(LitResNet(), *data, zo.GradientFree(zo.ZerothOrder())),  # +
}


def digits(smoke: bool) -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's images of 8 x 8 pixels, four times as wide and high, to train with and to test with."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = F.interpolate(images.float().view(-1, 1, 8, 8) / 8 - 1, scale_factor=4).expand(-1, 3, -1, -1)
    order, cut = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)), 120 if smoke else 1200
    training, test = order[:cut], order[cut : 2 * cut]
    return TensorDataset(images[training], labels[training]), TensorDataset(images[test], labels[test])


@torch.no_grad()
def accuracy(net: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return float((net.eval()(images).argmax(1) == labels).float().mean())


def train(way: str, seed: int, root: Path, smoke: bool) -> list[Result]:
    torch.set_num_threads(1)
    training, test = digits(smoke)
    batches = DataLoader(training, 40, shuffle=True, generator=torch.Generator().manual_seed(seed))
    pl.seed_everything(seed)
    before = accuracy(resnet18(num_classes=10), test)
    pl.seed_everything(seed)
    with Cost() as cost:
        net, flops = WAYS[way](batches, 1 if smoke else 3)
    after = accuracy(net, test)
    return [Result("digits, ResNet-18", way, seed, "accuracy", before, after, flops / 1e9, cost.peak_mb, cost.seconds)]


if __name__ == "__main__":
    main("two_lines", __doc__, train, tuple(WAYS), "PerExample|ZerothOrder")
