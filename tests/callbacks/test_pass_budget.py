"""Runs that end when their forward passes are spent."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning import Backprop, Classifier, ForwardDifference, GradientEstimator, SmallCNN, ZerothOrder
from zo_lightning.callbacks import ExactResume, PassBudget
from zo_lightning.data import Digits


class Rates(Callback):
    """Notes the learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def model(estimator: GradientEstimator | None = None, **settings: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(SmallCNN(), estimator or Backprop(), lambda p: torch.optim.SGD(p, lr=0.01), **settings)


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    off = {f"enable_{what}": False for what in ("checkpointing", "model_summary", "progress_bar")}
    common = {"accelerator": "cpu", "max_epochs": -1, "limit_val_batches": 0, "logger": False}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**off, **common, **settings})


@pytest.mark.parametrize(
    ("estimator", "batch_size", "passes", "steps"),
    [
        (Backprop(), 128, 30, 10),
        (Backprop(), 128, 31, 10),  # another step would take 33
        (ZerothOrder(), 64, 30, 30),  # a central difference: 2 passes of 64 are 1 of 128
        (ZerothOrder(stencil=ForwardDifference(1e-3), samples=8), 32, 30, 13),  # 9 of 32 are 2.25
        (Backprop(), 128, 0.5, 1),  # one step at least
    ],
)
def test_steps_are_those_that_the_budget_pays_for(
    tmp_path: Path, estimator: GradientEstimator, batch_size: int, passes: float, steps: int
) -> None:
    budget = PassBudget(passes)
    fit = trainer(tmp_path, budget)
    fit.fit(model(estimator), Digits(batch_size, 0, 1))
    assert fit.global_step == steps
    assert budget.seconds > 0


def test_small_last_batches_cost_what_they_hold(tmp_path: Path) -> None:
    """1,433 images: an epoch is 11 batches of 128 and one of 25."""
    budget = PassBudget(70)
    fit = trainer(tmp_path, budget)
    fit.fit(model(), Digits(128, 0, 1))
    assert budget.spent == pytest.approx(2 * (11 * 3 + 3 * 25 / 128))
    assert fit.global_step == 24


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2), ("linear", lambda t: 1 - t), ("constant", lambda t: 1.0)],
)
def test_learning_rate_decays_over_the_budget(tmp_path: Path, schedule: Any, factor: Any) -> None:
    rates = Rates()
    trainer(tmp_path, PassBudget(15, schedule=schedule), rates).fit(model(), Digits(128, 0, 1))
    assert rates.seen == pytest.approx([0.01 * factor(step / 5) for step in range(5)])


def test_a_step_of_several_batches_is_taken_as_a_whole(tmp_path: Path) -> None:
    """4 batches of 2 passes are a step of 8, and of 20 passes 4 are left."""
    budget, rates = PassBudget(20, schedule="linear"), Rates()
    fit = trainer(tmp_path, budget, rates, accumulate_grad_batches=4)
    fit.fit(model(ZerothOrder()), Digits(128, 0, 1))
    assert (budget.spent, fit.global_step) == (16, 2)
    assert rates.seen == pytest.approx([0.01, 0.01 * (1 - 8 / 20)])


def test_what_was_spent_before_there_was_a_budget_is_not_of_it(tmp_path: Path) -> None:
    net, budget = model(ZerothOrder()), PassBudget(6)
    before = trainer(tmp_path, max_steps=5)
    before.fit(net, Digits(128, 0, 1))
    before.save_checkpoint(tmp_path / "before.ckpt")
    for path, steps in ((None, 3), (tmp_path / "before.ckpt", 5 + 3)):  # the same module, or the same run
        budget = PassBudget(6)
        fit = trainer(tmp_path, budget)
        fit.fit(net, Digits(128, 0, 1), ckpt_path=path)
        assert (budget.spent, fit.global_step) == (6, steps)


@pytest.mark.parametrize("stopped", [4, 12])  # within an epoch, and at its end
def test_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, stopped: int) -> None:
    whole, rates = model(), Rates()
    trainer(tmp_path, ExactResume(), PassBudget(60), rates).fit(whole, Digits(128, 0, 1))
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stopped, save_top_k=-1)
    trainer(tmp_path, ExactResume(), PassBudget(60), saving, enable_checkpointing=True).fit(model(), Digits(128, 0, 1))
    resumed, after, budget = model(), Rates(), PassBudget(60)
    going_on = trainer(tmp_path, ExactResume(), budget, after)
    going_on.fit(resumed, Digits(128, 0, 1), ckpt_path=tmp_path / f"step={stopped}.ckpt")
    assert after.seen == rates.seen[stopped:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    going_on.save_checkpoint(tmp_path / "done.ckpt")
    again = PassBudget(60)
    trainer(tmp_path, ExactResume(), again).fit(model(), Digits(128, 0, 1), ckpt_path=tmp_path / "done.ckpt")
    assert again.spent == budget.spent  # nothing was left


def test_another_schedule_is_refused(tmp_path: Path) -> None:
    decaying = model(lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9))
    with pytest.raises(MisconfigurationException, match="follows PassBudget's schedule, cosine"):
        trainer(tmp_path, PassBudget(10)).fit(decaying, Digits(128, 0, 1))
    trainer(tmp_path, PassBudget(3, schedule="constant")).fit(decaying, Digits(128, 0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"passes": 0}, "passes must be a positive number, got 0"),
        ({"passes": math.inf}, "passes must be a positive number, got inf"),
        ({"passes": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"passes": 1, "schedule": "steps"}, "schedule must be one of cosine, linear, constant, got 'steps'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PassBudget(**arguments)
