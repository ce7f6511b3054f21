"""See that every configuration of a study can be trained, and how long it would take, before anything is written."""

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning.study.grid import Cell, Study
from zo_lightning.study.runs import Fit, parameters, printing_to, words_of
from zo_lightning.user_errors import UserError

_STEPS = 10
_WARM_UP = 2
_ENOUGH = 1.0  # seconds of steps after the warm-up
_UNIT = 128  # examples of a budget's passes
_OFF = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
# Some callbacks insist on a logger; that they exist is seen when the configuration is read.
_SILENT = [*(word for name in _OFF for word in (f"--trainer.{name}", "false")), "--trainer.callbacks", "[]"]


class Stopwatch(Callback):
    """Note when training begins and when each of its steps ends, in ``times`` [1 + steps], seconds.

    When the steps after the warm-up have lasted for long enough, training ends.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Note the time, and end where it was long enough."""
        self.times.append(time.perf_counter())
        if len(self.times) > _WARM_UP + 1 and self.times[-1] - self.times[_WARM_UP] > _ENOUGH:
            trainer.should_stop = True


def check(study: Study, fit: Fit) -> dict[str, int]:
    """Build every method and every task of a study, without a step; return the nets' sizes d by task.

    Raises:
        UserError: one cannot be built; the message names the cell.
    """
    sizes: dict[str, int] = {}
    for cell in _representatives(study):
        trainer = _try(cell, study.options, fit, ["--trainer.max_epochs", "0"])
        sizes.setdefault(cell.task, parameters(trainer))
    return sizes


def estimate(study: Study, sizes: dict[str, int], fit: Fit) -> dict[Cell, float]:
    """Seconds that each cell would take alone, from a few steps of each method on the smallest and the largest task.

    In between they are taken to grow linearly with d; and everywhere with the budget, where there is one.
    """
    cells = _without_repetition(study)
    seconds: dict[tuple[str, str], float] = {}
    for method in study.methods:
        own = sorted((cell for cell in cells if cell.method == method), key=lambda cell: sizes[cell.task])
        low, high = (_measure(cell, study.options, fit) for cell in (own[0], own[-1]))
        span = max(1, sizes[own[-1].task] - sizes[own[0].task])
        for cell in own:
            share = (sizes[cell.task] - sizes[own[0].task]) / span
            seconds[method, cell.task] = low + share * (high - low)
    every = [*study.trial_cells(), *study.cells()]
    return {cell: seconds[cell.method, cell.task] * (cell.budget or 1) for cell in every}


def _representatives(study: Study) -> list[Cell]:
    """Cells that show each method, each task, each exception, and trials at each task once."""
    chosen: list[Cell] = []
    methods, tasks = set(), set()
    for cell in _without_repetition(study):
        is_exception = cell.task in study.methods[cell.method].by_task
        if cell.method not in methods or cell.task not in tasks or is_exception:
            chosen.append(cell)
            methods.add(cell.method)
            tasks.add(cell.task)
    return [*chosen, *{cell.task: cell for cell in study.trial_cells()}.values()]


def _without_repetition(study: Study) -> list[Cell]:
    """The cells of the first seed and the smallest budget."""
    least = min(study.budgets, default=None)
    return [cell for cell in study.cells() if (cell.seed, cell.budget) == (study.seeds[0], least)]


def _measure(cell: Cell, options: Sequence[str], fit: Fit) -> float:
    """Seconds of a run; where it has a budget, those of one of its passes."""
    stopwatch = ["--trainer.callbacks+", f"{Stopwatch.__module__}.{Stopwatch.__name__}"]
    trainer = _try(
        cell, options, fit, ["--trainer.max_steps", str(_STEPS), "--trainer.num_sanity_val_steps", "0", *stopwatch]
    )
    times = next(callback for callback in trainer.callbacks if isinstance(callback, Stopwatch)).times
    steps = len(times) - 1
    if steps < 1:
        return 0.0
    warm = times[min(_WARM_UP, steps - 1) :]
    step = (warm[-1] - warm[0]) / (len(warm) - 1)
    passes = max(1.0, getattr(trainer.lightning_module, "forward_passes", 0) / steps)
    if cell.budget is not None:
        return step / (passes * getattr(trainer.datamodule, "batch_size", _UNIT) / _UNIT)
    batches = trainer.num_training_batches + sum(trainer.num_val_batches) / passes / (
        trainer.check_val_every_n_epoch or 1
    )
    return step * batches * max(1, trainer.max_epochs or 1)


def _try(cell: Cell, options: Sequence[str], fit: Fit, extra: list[str]) -> Any:
    with _files(cell) as files, printing_to(io.StringIO()):
        try:
            return fit(words_of(cell, files, options, [*_SILENT, *extra]))
        except (UserError, MisconfigurationException, RuntimeError) as error:  # TrainingDiverged, and torch's own
            message = str(error).replace(f"{files[0].parent}/", "overlay ")
            raise UserError(f"{cell}: {message}") from error


@contextmanager
def _files(cell: Cell) -> Iterator[list[Path]]:
    with TemporaryDirectory() as folder:
        files = [Path(folder, f"{index}.yaml") for index in range(len(cell.overlays))]
        for file, overlay in zip(files, cell.overlays, strict=True):
            file.write_text(yaml.safe_dump(overlay, sort_keys=False), encoding="utf-8")
        yield files
