"""NaN in the loss, the weights or the batch at random steps: skipped, counted, and training goes on."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from tests.faults import LONG
from tests.modules.ways import batches, made, trainer
from zo_lightning.modules import TrainingDiverged

ESTIMATORS: dict[str, Any] = {
    "ZerothOrder": zo.ZerothOrder(samples=2, seed=0),
    "Batched": zo.ZerothOrder(samples=2, seed=0, evaluation=zo.Batched()),
    "PerExample": zo.PerExample(seed=0),
    "ForwardGradient": zo.ForwardGradient(samples=2, seed=0),
    "Backprop": zo.Backprop(),
}
STEPS = 24  # three epochs of eight batches
estimators = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
seeds = pytest.mark.parametrize("seed", range(10 if LONG else 1))


class Lit(LightningModule):
    """Linear regression in which, at some steps, something is NaN."""

    at: frozenset[int] = frozenset()
    what = "loss"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self._losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        step = self.current_epoch * 8 + batch_idx
        if step in self.at and self.what == "example":
            x = x.clone()
            x[1, 2] = math.nan
        losses = F.mse_loss(self.net(x), y, reduction="none").mean(1)
        if step in self.at and self.what == "loss":
            losses = losses * math.inf
        return {"loss": losses.mean(), "losses": losses}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)

    def train_dataloader(self) -> Any:
        return batches()


class Breaks(Callback):
    """Writes NaN into a weight before a step, and the weight back some steps later."""

    def __init__(self, at: int, mends_after: int) -> None:
        self.at, self.mends = at, at + mends_after
        self.kept = torch.empty(0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        weight = next(pl_module.parameters()).data
        batch = trainer.fit_loop.total_batch_idx + 1
        if batch == self.at:
            self.kept = weight.clone()
            weight[0, 0] = math.nan
        elif batch == self.mends:
            weight.copy_(self.kept)


@estimators
@seeds
@pytest.mark.parametrize(("what", "way"), [("loss", "callback"), ("example", "mixin")])
def test_batches_that_give_nan_are_left_out(estimator: Any, seed: int, what: str, way: str, tmp_path: Path) -> None:
    steps = frozenset(random.Random(f"{what} {seed}").sample(range(STEPS), 5))
    kind = type("Broken", (Lit,), {"at": steps, "what": what})
    module, callbacks = made(kind, way, estimator)
    seen: list[dict[str, Tensor]] = []

    class Weights(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    driven = trainer(tmp_path, *callbacks, Weights(), max_epochs=3)
    driven.fit(module)
    driver = next(iter(callbacks), module)
    assert driver.skipped_steps == 5
    assert {step for step, loss in enumerate(module._losses) if not math.isfinite(loss)} == steps
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    moved = [any(not torch.equal(b[name], a[name]) for name in a) for a, b in zip(seen, seen[1:], strict=False)]
    # An optimizer with momentum moves on without a gradient only if it is given zeros: here it is given none.
    assert {step + 1 for step, any_moved in enumerate(moved) if not any_moved} == steps - {0}


@estimators
@seeds
def test_a_weight_that_is_nan_for_a_while(estimator: Any, seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    module, _ = made(Lit, "mixin", estimator)
    broken = draw.randrange(1, 19)
    trainer(tmp_path, Breaks(draw.randrange(3, 8), broken), max_epochs=4).fit(module)
    assert module.skipped_steps == broken
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert math.isfinite(module._losses[-1])


@estimators
def test_a_weight_that_stays_nan_ends_training_after_twenty_batches(estimator: Any, tmp_path: Path) -> None:
    module, _ = made(Lit, "mixin", estimator)
    with pytest.raises(TrainingDiverged, match=r"for 20 batches in a row.*smaller learning rate"):
        trainer(tmp_path, Breaks(3, 10_000), max_epochs=10).fit(module)
    assert module.skipped_steps == 20
