"""Where a run stands between two batches, in the counters of Lightning's loops.

Lightning saves its counters where its own checkpoint callback does: before an epoch's last log, within the hooks of a
batch. What is saved between two batches, and goes on as if nothing had been, needs the corrections in this file.
"""

from typing import Any, Literal

from pytorch_lightning import Trainer

Point = Literal["batch", "epoch", "validation"]
"""Where a run stands: between two batches of an epoch, between two epochs, or before a validation within an epoch."""

_COUNTERS = ("total", "current")


def settle(loops: dict[str, Any], point: Point) -> None:
    """Let the counters of ``fit`` in a checkpoint say that what was begun at ``point`` was not."""
    fit = loops["fit_loop"]
    epoch, batch, validation = (
        fit[name] for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    )
    _undo(epoch)
    if point != "epoch":  # the epoch has begun
        for counters in _COUNTERS:
            epoch[counters]["ready"] = epoch[counters]["started"] = epoch[counters]["completed"] + 1
    if point != "validation":
        if point == "batch":
            batch["is_last_batch"] = False
        _undo(batch)
        automatic = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        manual = fit["epoch_loop.manual_optimization.optim_step_progress"]
        for progress in (automatic["step"], automatic["zero_grad"], manual, fit["epoch_loop.scheduler_progress"]):
            _undo(progress)
        return
    # As Lightning knows a validation that stopped at its first batch: it goes back and begins it again.
    for counters in _COUNTERS:
        validation[counters] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    validation["total"] |= {"ready": 1, "started": 1}


def go_on(trainer: Trainer, point: Point | None) -> None:
    """Let the loops go on from ``point``; called in ``on_train_start``, after Lightning has loaded the counters."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    fit._restarting = False  # else no plateau is looked for at the end of this epoch, for want of metrics
    if point == "epoch":
        epoch.restarting = False  # with max_steps Lightning would take the epoch that has ended for one that has not
    elif point == "batch" and epoch.restarting and epoch._should_check_val_fx(fit._data_fetcher):  # type: ignore[arg-type]
        epoch._batches_that_stepped -= 1  # counts the last batch again, since it skips the validation after it


def _undo(progress: dict[str, Any]) -> None:
    for counters in _COUNTERS:
        for name in progress[counters]:
            progress[counters][name] = progress[counters]["completed"]
