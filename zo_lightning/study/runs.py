"""Run the cells of a study, each in its own folder, side by side, and go on where it was stopped."""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml

from zo_lightning.locks import locked
from zo_lightning.modules.driver import TrainingDiverged
from zo_lightning.study.backends import Backend, Parallel, engine, worker_died
from zo_lightning.study.devices import device_name
from zo_lightning.study.folder import (
    FAILED,
    FINISHED,
    METRICS,
    is_finished,
    running,
    seconds_of,
    sync_metrics,
    write_whole,
)
from zo_lightning.study.grid import Cell, Overlay, Study
from zo_lightning.study.reached import REACHED, choose_rates, measure

# Runs `fit` with the given words of a command line and returns the Trainer; given by the floor above.
Fit = Callable[[Sequence[str]], Any]

LOG = "log.txt"


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``error`` is None where it finished."""

    cell: Cell
    seconds: float
    error: str | None = None


def words_of(cell: Cell, files: Sequence[Path], options: Sequence[str], extra: Sequence[str]) -> list[str]:
    """The command line of ``fit`` for a cell whose overlays lie in files; ``extra`` has the last word."""
    overlays = [word for file in files for word in ("-c", str(file))]
    rate = [] if cell.lr is None else ["--model.optimizer.lr", repr(cell.lr)]
    held_out = [] if cell.held_out is None else ["--data.val_size", repr(cell.held_out)]
    return [*overlays, *options, *rate, *held_out, "--seed_everything", str(cell.seed), *extra]


def run_cells(
    study: Study,
    folder: Path,
    fit: Fit,
    *,
    jobs: int = 1,
    threads: int = 1,
    backend: Backend = "loky",
    address: str | None = None,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run all cells that are not finished, ``jobs`` at a time with ``threads`` threads each; return how they ended.

    The trials come first, and the learning rates that they show to be the best are those of the others. Each outcome is
    also passed to ``report``, as it comes. A cell that fails stops no other one. Where a process dies, the cells that
    were running are tried once more, one at a time.

    Raises:
        UserError: another process is running this study, or the backend cannot be used.
    """
    with running(folder), engine(backend, address, jobs, threads) as parallel:
        outcomes: list[Outcome] = []

        def run(cells: Sequence[Cell]) -> None:
            pending = [cell for cell in cells if not is_finished(folder, cell)]

            def ended(outcome: Outcome) -> None:
                outcomes.append(outcome)
                pending.remove(outcome.cell)
                report(outcome)

            for cell in [cell for cell in pending if _lacks_rate(cell, study)]:
                ended(Outcome(cell, 0.0, "its learning rate is not chosen: a trial has failed, or all have diverged"))
            while pending:
                token = f"{os.getpid()} {time.time_ns()}"
                job = _Job(study, folder, fit, threads, token, os.getpid() if backend == "loky" else None, Path.cwd())
                try:
                    for outcome in parallel(partial(_work, job), list(pending)):
                        ended(outcome)
                except worker_died():
                    for cell in _after_crash(pending, folder, token):
                        ended(_alone(parallel, job, cell))

        run(study.trial_cells())
        run(with_rates(study, folder))
        return outcomes


def with_rates(study: Study, folder: Path) -> list[Cell]:
    """All cells, each with the learning rate that the trials of its budget have shown to be the best."""
    if study.trials is None:
        return study.cells()
    chosen, budget_for = choose_rates(study, folder), study.trials.budget_for
    return [replace(cell, lr=chosen.get((cell.method, cell.task, budget_for(cell.budget)))) for cell in study.cells()]


def _lacks_rate(cell: Cell, study: Study) -> bool:
    return cell.lr is None and bool(study.methods[cell.method].learning_rates)


@dataclass(frozen=True)
class _Job:
    """What a worker does with a cell; travels to other processes and machines."""

    study: Study
    folder: Path
    fit: Fit
    threads: int
    token: str
    parent: int | None
    home: Path


def _work(job: _Job, cell: Cell) -> Outcome:
    try:
        os.chdir(job.home)  # what relative paths start from, also in a worker that was started elsewhere
    except OSError as error:
        return Outcome(cell, 0.0, f"the study's working directory does not exist where a worker runs: {error}")
    if job.parent is not None and job.parent != os.getpid():
        _die_with(job.parent)
    return run_cell(cell, job.study, job.folder, job.fit, threads=job.threads, token=job.token)


def run_cell(cell: Cell, study: Study, folder: Path, fit: Fit, *, threads: int = 1, token: str = "") -> Outcome:
    """Run one cell of a study from its beginning in ``folder / cell.folder``, unless it is finished.

    An unfinished run that lies there is removed first. What the run prints goes to ``log.txt``; an error is returned,
    with its traceback in ``error.txt``.
    """
    import torch
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    run = folder / cell.folder
    began = time.perf_counter()
    locks = folder / ".locks"
    locks.mkdir(exist_ok=True)
    # Waits for a worker that has outlived its study.
    with locked(locks / f"{'-'.join(cell.folder.parts)}.lock"):
        if (seconds := seconds_of(folder, cell)) is not None:
            return Outcome(cell, seconds)
        if run.exists():
            shutil.rmtree(run)
        (run / "overlays").mkdir(parents=True)
        write_whole(run / "overlays" / "started", token)
        torch.set_num_threads(threads)
        try:
            with (run / LOG).open("w", encoding="utf-8") as log, printing_to(log):
                *files, own = _write_overlays(cell, own_overlay(run, cell, study), run)
                trainer = fit(words_of(cell, files, study.options, ["-c", str(own)]))
                if trainer.interrupted:
                    raise KeyboardInterrupt
                about: dict[str, Any] = {"parameters": parameters(trainer)}
                about["device"] = device_name(trainer.strategy.root_device)
                if cell.budget is not None:
                    about[REACHED] = measure(trainer, cell)
            seconds = time.perf_counter() - began
            sync_metrics(run / METRICS)
            write_whole(run / FINISHED, yaml.safe_dump({"seconds": seconds, **about}))
        except (Exception, SystemExit) as error:
            if isinstance(error, SIGTERMException) or isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error  # which Lightning turns into an exit
            seconds = time.perf_counter() - began
            if cell.held_out is not None and isinstance(error, TrainingDiverged):  # which is an answer
                write_whole(run / FINISHED, yaml.safe_dump({"seconds": seconds, "parameters": None, REACHED: {}}))
                return Outcome(cell, seconds)
            write_whole(run / FAILED, traceback.format_exc())
            return Outcome(cell, seconds, f"{error}" or type(error).__name__)
        return Outcome(cell, seconds)


def own_overlay(run: Path, cell: Cell, study: Study) -> Overlay:
    """What the study itself wants of a run: curves in its folder, the last weights, snapshots, and silence.

    A run with a budget ends when that is spent, its learning rate decays until then, and nothing is judged on the way.
    A cell that has one of the callbacks keeps its own: Lightning takes but one.
    """
    callbacks: list[Overlay] = [{"class_path": "EpochCost"}]
    if study.snapshots is not None and cell.held_out is None:
        every = {"every_n_epochs": study.snapshots, "histograms": False}
        callbacks.append({"class_path": "WeightSnapshots", "init_args": every})
    budget: Overlay = {}
    if cell.budget is not None:
        callbacks.append({"class_path": "PassBudget", "init_args": {"passes": cell.budget}})
        budget = {"max_epochs": -1, "max_steps": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    logger = {"init_args": {"save_dir": str(run), "name": "", "version": ""}}
    return {
        "trainer": {
            "logger": [{"class_path": name, **logger} for name in ("TensorBoardLogger", "CSVLogger")],
            "callbacks+": [callback for callback in callbacks if callback["class_path"] not in _callbacks(cell)],
            "enable_checkpointing": True,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **budget,
        },
        **({} if cell.budget is None else {"model": {"lr_scheduler": None}}),
        "checkpoint": {"monitor": None, "save_top_k": 0},
        "last_checkpoint": {"every_seconds": None, "weights_only": True},
    }


def _callbacks(cell: Cell) -> set[str]:
    """The classes of a cell's callbacks, without their modules."""
    found: list[Any] = []
    for overlay in cell.overlays:
        trainer = overlay.get("trainer") or {}
        for key, earlier in (("callbacks", []), ("callbacks+", found)):
            if key in trainer:
                value = trainer[key] or []
                found = [*earlier, *(value if isinstance(value, list) else [value])]
    names = (one["class_path"] if isinstance(one, dict) else one for one in found)
    return {name.rpartition(".")[2] for name in names}


def _write_overlays(cell: Cell, own: Overlay, run: Path) -> list[Path]:
    files = []
    for index, overlay in enumerate((*cell.overlays, own)):
        files.append(run / "overlays" / f"{index}.yaml")
        write_whole(files[-1], yaml.safe_dump(overlay, sort_keys=False))
    return files


def parameters(trainer: Any) -> int:
    """The number d of weights that a run trains."""
    return sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)


def _after_crash(pending: list[Cell], folder: Path, token: str) -> list[Cell]:
    """Cells that were running when a worker died; where none had begun, the next one, so that a study always ends."""

    def began(cell: Cell) -> bool:
        started = folder / cell.folder / "overlays" / "started"
        return started.is_file() and started.read_text(encoding="utf-8") == token

    return [cell for cell in pending if began(cell)] or pending[:1]


def _alone(parallel: Parallel, job: _Job, cell: Cell) -> Outcome:
    """Run a cell while no other one is running: if a worker dies now, it is this cell's."""
    try:
        return next(iter(parallel(partial(_work, job), [cell])))
    except worker_died():
        error = "its process died, also when it ran alone: was there enough memory?"
        run = job.folder / cell.folder
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / FAILED, error + "\n")
        return Outcome(cell, 0.0, error)


@contextlib.contextmanager
def printing_to(log: IO[str]) -> Iterator[None]:
    """Let all that a run prints, warns and logs go to a file, and hide the process's own command line from it."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")]
    handlers = [list(logger.handlers) for logger in loggers]
    handler = logging.StreamHandler(log)
    argv, sys.argv = sys.argv, sys.argv[:1]
    for logger in loggers:
        logger.handlers[:] = [handler]
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        sys.argv = argv
        for logger, before in zip(loggers, handlers, strict=True):
            logger.handlers[:] = before


def _die_with(parent: int) -> None:
    """End this worker when the study that started it is killed, rather than train on for nobody."""
    name = "ends with its study"
    if any(thread.name == name for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name=name, daemon=True).start()
