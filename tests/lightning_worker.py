"""What one of several processes does with a Trainer or with Fabric; ``tests.processes.together`` runs it."""

import io
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import zo_lightning as zo
from zo_lightning.__main__ import main
from zo_lightning.data import Digits
from zo_lightning.modules.classifier import AutomaticClassifier

Weights = dict[str, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 10)
    )


def classifier(estimator: zo.GradientEstimator, lr: float = 0.02) -> zo.Classifier:
    return zo.Classifier(net(), estimator, lambda params: torch.optim.Adam(params, lr=lr))


def zeroth_order(split: str, samples: int = 4) -> zo.ZerothOrder:
    return zo.ZerothOrder(samples=samples, seed=0, distributed=zo.Distributed(split, check_every=5))  # type: ignore[arg-type]


@cache
def size() -> int:
    return int(os.environ["WORLD_SIZE"])  # which Lightning deletes after the first fit


def trainer(max_steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    options = {"limit_val_batches": 0, "logger": False, "log_every_n_steps": 10, **options}
    return Trainer(
        accelerator="cpu",
        devices=size(),
        strategy="ddp" if size() > 1 else "auto",
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        **options,
    )


def weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items() if "_acc." not in name}


def trained(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if "running" not in name}


class Sent(TorchDispatchMode, Callback):
    """Counts the bytes of every collective, DistributedDataParallel's own among them, batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.by_step: list[dict[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, step = func.name().removeprefix("c10d::"), self.by_step[-1]
            sent = args[1] if name == "allgather_" else args[0]
            step[name] = step.get(name, 0) + sum(t.nbytes for t in sent)
        return func(*args, **(kwargs or {}))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.by_step = [{}]
        self.__enter__()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.by_step.append({})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.__exit__(None, None, None)


def sends(rank: int) -> dict[str, Any]:
    """What each estimator sends, and the weights and buffers at which it ends."""
    estimators = {split: zeroth_order(split) for split in ("data", "directions", "both")}
    results = {}
    for name, estimator in {**estimators, "PerExample": zo.PerExample(seed=0), "Backprop": zo.Backprop()}.items():
        sent, module = Sent(), classifier(estimator)
        trainer(4, sent).fit(module, Digits(seed=0))
        results[name] = sent.by_step[:4], weights(module)
    driven = {f"GradientFree {split}": [zo.GradientFree(zeroth_order(split))] for split in ("data", "directions")}
    for name, callbacks in {**driven, "automatic": []}.items():
        sent = Sent()
        automatic = AutomaticClassifier(net(), lambda params: torch.optim.Adam(params, lr=0.02))
        trainer(4, sent, *callbacks).fit(automatic, Digits(seed=0))
        results[name] = sent.by_step[:4], weights(automatic)
    return results


def measures(rank: int) -> dict[str, dict[str, float]]:
    """What a classifier and a regressor log, after one epoch and a test."""
    results = {}
    for name, estimator in (("Backprop", zo.Backprop()), ("ZerothOrder", zeroth_order("directions"))):
        fits = trainer(-1, limit_val_batches=1.0)
        fits.fit_loop.max_epochs = 1
        module = classifier(estimator)
        fits.fit(module, data := Digits(batch_size=90, seed=0))
        results[name] = {key: float(value) for key, value in fits.callback_metrics.items()}
        results[name] |= {key: float(value) for key, value in trainer(-1).test(module, data, verbose=False)[0].items()}
    torch.manual_seed(0)
    module = zo.Regressor(nn.Sequential(nn.Flatten(), nn.Linear(784, 1)), zeroth_order("data"))
    results["Regressor"] = dict(trainer(-1).test(module, Numbers(), verbose=False)[0])
    return results


class Numbers(Digits):
    """The digits as numbers to be predicted, in batches of 128, 128 and 97: not alike on two ranks."""

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().load(train)
        return images[:353], labels[:353]


def resumes(rank: int, checkpoint: Path | None) -> Weights:
    """Train up to step 12, from a checkpoint or from the start."""
    module = classifier(zeroth_order("directions"))
    trainer(12).fit(module, Digits(seed=0), ckpt_path=checkpoint, weights_only=False)
    return weights(module)


def saves(rank: int, folder: Path) -> None:
    """Train, saving step 5."""
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    trainer(7, keep).fit(classifier(zeroth_order("directions")), Digits(seed=0))


class Dies(Callback):
    """Kills the last rank at the beginning of a step, as the machine may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def dies(rank: int, name: str) -> str:
    """What the others hear of it."""
    estimator = zo.Backprop() if name == "Backprop" else zeroth_order("data")
    try:
        trainer(12, Dies(6)).fit(classifier(estimator), Digits(seed=0))
    except RuntimeError as error:
        return str(error)
    return "nothing raised"


def command_line(rank: int, words: str) -> tuple[int, str, str]:
    """The exit code of ``zo-lightning``, and what it says; where that is 0, no group of processes stays open."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        code = main(words.split())
    assert code or not dist.is_initialized()
    return code, out.getvalue(), errors.getvalue()


def fabric(rank: int) -> dict[str, Weights]:
    """Loops of Fabric's, in which every estimator stands where ``fabric.backward`` did."""
    fabric = Fabric(accelerator="cpu", devices=size(), strategy="ddp" if size() > 1 else "auto")
    fabric.launch()
    data = Digits(seed=0)
    data.setup()
    x, y = (t[:64] for t in data._subset("train"))
    results = {}
    for name, estimator in (
        ("directions", zeroth_order("directions")),
        ("both", zeroth_order("both")),
        ("PerExample", zo.PerExample(seed=0)),
    ):
        model, optimizer = fabric.setup(inner := net(), torch.optim.SGD(inner.parameters(), lr=0.1))
        mine = slice(None) if name == "directions" else slice(rank, None, size())
        state = estimator.init(model)
        for step in range(5):
            optimizer.zero_grad()
            estimator.backward(
                lambda m=model, i=mine: F.cross_entropy(m(x[i]), y[i], reduction="none"), model, step, state
            )
            optimizer.step()
        results[name] = trained(weights(inner))
    return results
