"""What a run of a given budget has reached: judged once, at its end, on examples that it has not been trained on."""

from math import isfinite, nan
from pathlib import Path
from typing import Any

import yaml

from zo_lightning.modules.driver import driver_of
from zo_lightning.study.devices import device_of
from zo_lightning.study.folder import FINISHED, is_finished
from zo_lightning.study.grid import Cell, Study
from zo_lightning.user_errors import UserError

REACHED = "reached"
"""The key of a complete run's file under which it stands."""


def measure(trainer: Any, cell: Cell) -> dict[str, Any]:
    """Judge the last weights of a run, on the test set, or for a trial on what was held out; and say what they cost.

    Returns:
        ``accuracy`` (None of a regression), ``loss``, ``flops`` and ``passes`` (forward passes of 128 examples) of all
        training steps, ``steps``, ``seconds`` of training, and ``lr`` at the start.

    Raises:
        UserError: nothing was judged.
    """
    module = trainer.lightning_module
    driver = driver_of(trainer, module)
    budget = next(callback for callback in trainer.callbacks if callback.state_key == "PassBudget")
    spent = {
        "flops": float(getattr(module, "flops", nan)) if driver is None else float(driver.flops),
        "passes": float(budget.spent),
        "steps": int(trainer.global_step),
        "seconds": float(budget.seconds),
        "lr": float(trainer.optimizers[0].param_groups[0]["initial_lr"]),
    }
    stage = "test" if cell.held_out is None else "val"
    trainer.limit_val_batches = 1.0  # there was no validation on the way
    judge = trainer.test if stage == "test" else trainer.validate
    [found] = judge(module, datamodule=trainer.datamodule, verbose=False) or [{}]
    if f"{stage}/loss" not in found:
        raise UserError(f"the run's module logs no {stage}/loss: by what is it to be judged?")
    accuracy = found.get(f"{stage}/acc")
    return {"accuracy": None if accuracy is None else float(accuracy), "loss": float(found[f"{stage}/loss"]), **spent}


def read_reached(run: Path) -> dict[str, Any]:
    """What `measure` has said of a complete run; empty where it ended without a finite loss.

    Raises:
        OSError, ValueError, yaml.YAMLError: the file is gone or damaged.
    """
    about = yaml.safe_load((run / FINISHED).read_text(encoding="utf-8"))
    reached = about.get(REACHED) if isinstance(about, dict) else None
    if not isinstance(reached, dict):
        raise ValueError(f"'{run / FINISHED}' does not say what was reached")
    return {"d": about["parameters"], "device": device_of(about), **reached} if reached else {}


def choose_rates(study: Study, folder: Path) -> dict[tuple[str, str, int | None], float]:
    """The best learning rate of each method, task and budget of trials of which every trial is complete.

    That is the one with the highest accuracy on what was held out, of equal ones that with the lowest loss; without
    accuracies, the lowest loss. A trial that diverged is worse than all others.

    Raises:
        UserError: what a trial has written is damaged.
    """
    trials: dict[tuple[str, str, int | None], list[Cell]] = {}
    for cell in study.trial_cells():
        trials.setdefault((cell.method, cell.task, cell.budget), []).append(cell)
    chosen = {}
    for key, cells in trials.items():
        if all(is_finished(folder, cell) for cell in cells):
            (_, loss), best = min((_rank(_read(folder / cell.folder)), cell.lr) for cell in cells)
            if isfinite(loss) and best is not None:
                chosen[key] = best
    return chosen


def _read(run: Path) -> dict[str, Any]:
    try:
        return read_reached(run)
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"'{run / FINISHED}' is damaged: remove it, and the trial is run again") from error


def _rank(reached: dict[str, Any]) -> tuple[float, float]:
    """Of two trials the better one has the lower."""
    loss = reached.get("loss", nan)
    if not isfinite(loss):
        return 0.0, float("inf")
    return -(reached["accuracy"] or 0.0), loss
