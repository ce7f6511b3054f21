"""Modules, loaders and trainers of the tests of tuning."""

from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import zo_lightning as zo


class Lit(LightningModule):
    """A regression with what a module can have beside its weights."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
        self.mean = MeanMetric()
        self.register_buffer("expanded", torch.ones(1).expand(5))
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
