"""One module, trained in plain automatic optimization, by the mixin and by the callback."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from zo_lightning import EstimatedGradient, GradientEstimator, GradientFree

WAYS = "mixin", "callback"


def trainer(path: Path, *callbacks: Any, **options: Any) -> Trainer:
    """Two epochs, and nothing to be seen of them."""
    defaults: dict[str, Any] = {
        "callbacks": list(callbacks),
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=path, **{**defaults, **options})


def made(kind: type[LightningModule], way: str, estimator: GradientEstimator, **settings: Any) -> tuple[Any, list[Any]]:
    """A module object of a class that knows nothing of estimators, and the callbacks that its trainer needs."""
    if way == "plain":
        return kind(), []
    if way == "callback":
        return kind(), [GradientFree(estimator, **settings)]
    return type(f"Estimated{kind.__name__}", (EstimatedGradient, kind), {"estimator": estimator, **settings})(), []


def driver(module: Any, callbacks: list[Any]) -> Any:
    """Who counts: the module or the callback."""
    return next((c for c in callbacks if isinstance(c, GradientFree)), module)


def fitted(
    kind: type[LightningModule], way: str, estimator: GradientEstimator, path: Path, *callbacks: Any, **options: Any
) -> Any:
    """The module after training; random numbers begin at the same place."""
    module, own = made(kind, way, estimator)
    torch.manual_seed(7)
    trainer(path, *own, *callbacks, **options).fit(module)
    return module


def batches(size: int = 32, batch: int = 4, dtype: torch.dtype = torch.float32) -> DataLoader:
    """Regression of the sum and the difference of four numbers."""
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return DataLoader(TensorDataset(x, torch.stack([x.sum(1), x[:, 0] - x[:, 1]], 1)), batch)


class Net(LightningModule):
    """Somebody's module, with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2))
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.rates += [group["lr"] for group in self.trainer.optimizers[0].param_groups[:1]]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)

    def train_dataloader(self) -> DataLoader:
        return batches()

    def val_dataloader(self) -> DataLoader:
        return batches(8)


def weights(module: nn.Module) -> Tensor:
    """All weights and buffers, as one vector."""
    return torch.cat([value.detach().double().flatten() for value in module.state_dict().values()])
