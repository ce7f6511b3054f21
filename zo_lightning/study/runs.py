"""Run the cells of a study, each in its own folder, side by side, and go on where it was stopped."""

import contextlib
import fcntl
import logging
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Literal, cast

import yaml

from zo_lightning.cli_errors import UserError
from zo_lightning.study.grid import Cell, Overlay, Study, first_difference, read_yaml

# Runs `fit` with the given words of a command line and returns the Trainer; given by the floor above.
Fit = Callable[[Sequence[str]], Any]
Backend = Literal["loky", "dask", "ray"]

DECLARATION = "study.yaml"
FINISHED = "finished.yaml"  # a run's folder holds it when, and only when, the run is complete
METRICS = "metrics.csv"
FAILED = "error.txt"
LOG = "log.txt"


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``error`` is None where it finished."""

    cell: Cell
    seconds: float
    error: str | None = None


def claim(study: Study, folder: Path) -> None:
    """Make a folder the study's own, or see that it is.

    A study may have grown since: new methods, nets and seeds are cells that have not been run.

    Raises:
        UserError: something else is there, a study that is running, or one in which a cell has another configuration;
            nothing is changed.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; the study needs a folder of that name")
    declared = folder / DECLARATION
    # What begins with a dot may be our own: a study that was stopped while it claimed the folder.
    if folder.exists() and not declared.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"'{folder}' holds something that is no study: choose another name, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    with _running(folder):
        if declared.exists():
            _check_same(read_declaration(folder), study, folder)
        _write(declared, yaml.safe_dump(study.declaration(), sort_keys=False))


def read_declaration(folder: Path) -> Study:
    """The study to which a folder belongs.

    Raises:
        UserError: the folder holds none.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' does not exist" if not folder.exists() else f"'{folder}' is no folder")
    if not (folder / DECLARATION).is_file():
        raise UserError(f"'{folder}' holds no study: it has no {DECLARATION}")
    try:
        return Study.from_declaration(read_yaml(folder / DECLARATION))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{folder / DECLARATION}' is damaged: {error!r}") from error


def is_finished(folder: Path, cell: Cell) -> bool:
    """Whether a cell's run is complete."""
    return seconds_of(folder, cell) is not None


def seconds_of(folder: Path, cell: Cell) -> float | None:
    """How long a cell's complete run took; None where it is not complete, or what a crash has left of it is broken."""
    run = folder / cell.folder
    try:
        about = yaml.safe_load((run / FINISHED).read_text(encoding="utf-8"))
        whole = "parameters" in about and (run / METRICS).stat().st_size > 0
        return float(about["seconds"]) if whole else None
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def words_of(cell: Cell, files: Sequence[Path], options: Sequence[str], extra: Sequence[str]) -> list[str]:
    """The command line of ``fit`` for a cell whose overlays lie in files; ``extra`` has the last word."""
    overlays = [word for file in files for word in ("-c", str(file))]
    return [*overlays, *options, "--seed_everything", str(cell.seed), *extra]


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

    Each outcome is also passed to ``report``, as it comes. A cell that fails stops no other one. Where a
    process dies, the cells that were running are tried once more, one at a time.

    Raises:
        UserError: another process is running this study, or the backend cannot be used.
    """
    with _running(folder):
        pending = [cell for cell in study.cells() if not is_finished(folder, cell)]
        outcomes: list[Outcome] = []

        def ended(outcome: Outcome) -> None:
            outcomes.append(outcome)
            pending.remove(outcome.cell)
            report(outcome)

        with _engine(backend, address, jobs, threads) as parallel:
            while pending:
                token = f"{os.getpid()} {time.time_ns()}"
                job = _Job(study, folder, fit, threads, token, os.getpid() if backend == "loky" else None, Path.cwd())
                try:
                    for outcome in parallel(job, list(pending)):
                        ended(outcome)
                except _worker_died():  # and all others were killed with it
                    for cell in _after_crash(pending, folder, token):
                        ended(_alone(parallel, job, cell))
        return outcomes


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
    with _locked(locks / f"{'-'.join(cell.folder.parts)}.lock"):
        if (seconds := seconds_of(folder, cell)) is not None:
            return Outcome(cell, seconds)
        if run.exists():
            shutil.rmtree(run)
        (run / "overlays").mkdir(parents=True)
        _write(run / "overlays" / "started", token)
        torch.set_num_threads(threads)
        try:
            with (run / LOG).open("w", encoding="utf-8") as log, printing_to(log):
                *files, own = _write_overlays(cell, own_overlay(run, cell, study.snapshots), run)
                trainer = fit(words_of(cell, files, study.options, ["-c", str(own)]))
                if trainer.interrupted:
                    raise KeyboardInterrupt
            seconds = time.perf_counter() - began
            _sync_metrics(run / METRICS)
            _write(run / FINISHED, yaml.safe_dump({"seconds": seconds, "parameters": parameters(trainer)}))
        except (Exception, SystemExit) as error:
            if isinstance(error, SIGTERMException) or isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error  # which Lightning turns into an exit
            _write(run / FAILED, traceback.format_exc())
            return Outcome(cell, time.perf_counter() - began, f"{error}" or type(error).__name__)
        return Outcome(cell, seconds)


def own_overlay(run: Path, cell: Cell, snapshots: int | None) -> Overlay:
    """What the study itself wants of a run: curves in its folder, the last weights, snapshots, and silence.

    A cell that has one of the callbacks keeps its own: Lightning takes but one.
    """
    callbacks: list[Overlay] = [{"class_path": "EpochCost"}]
    if snapshots is not None:
        every = {"every_n_epochs": snapshots, "histograms": False}
        callbacks.append({"class_path": "WeightSnapshots", "init_args": every})
    logger = {"init_args": {"save_dir": str(run), "name": "", "version": ""}}
    return {
        "trainer": {
            "logger": [{"class_path": name, **logger} for name in ("TensorBoardLogger", "CSVLogger")],
            "callbacks+": [callback for callback in callbacks if callback["class_path"] not in _callbacks(cell)],
            "enable_checkpointing": True,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "checkpoint": {"monitor": None, "save_top_k": 0, "save_last": True, "save_weights_only": True},
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
        _write(files[-1], yaml.safe_dump(overlay, sort_keys=False))
    return files


def parameters(trainer: Any) -> int:
    """The number d of weights that a run trains."""
    return sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)


def _check_same(there: Study, here: Study, folder: Path) -> None:
    advice = "choose another name, or remove the folder"
    if there.snapshots != here.snapshots:
        raise UserError(
            f"'{folder}' belongs to a study with snapshots: {there.snapshots}, not {here.snapshots}: {advice}"
        )
    if _split(there.options) != _split(here.options):
        raise UserError(
            f"'{folder}' belongs to a study with the options '{' '.join(there.options)}', "
            f"not '{' '.join(here.options)}': {advice}"
        )
    new = {cell.folder: cell for cell in here.cells()}
    for old in there.cells():
        cell = new.get(old.folder)
        if cell is None:
            raise UserError(f"'{folder}' belongs to a study with a cell that this one lacks ({old}): {advice}")
        for there_and_here in zip_longest(old.overlays, cell.overlays, fillvalue={}):
            if where := first_difference(*there_and_here):
                raise UserError(f"'{folder}' belongs to a study with another configuration of {old}: {where}; {advice}")


def _split(options: Sequence[str]) -> list[str]:
    """Words of a command line, of which --name=value and --name value are the same."""
    return [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]


def _after_crash(pending: list[Cell], folder: Path, token: str) -> list[Cell]:
    """Cells that were running when a worker died; where none had begun, the next one, so that a study always ends."""

    def began(cell: Cell) -> bool:
        started = folder / cell.folder / "overlays" / "started"
        return started.is_file() and started.read_text(encoding="utf-8") == token

    return [cell for cell in pending if began(cell)] or pending[:1]


def _alone(parallel: Callable[[_Job, Sequence[Cell]], Iterator[Outcome]], job: _Job, cell: Cell) -> Outcome:
    """Run a cell while no other one is running: if a worker dies now, it is this cell's."""
    try:
        return next(iter(parallel(job, [cell])))
    except _worker_died():
        error = "its process died, also when it ran alone: was there enough memory?"
        run = job.folder / cell.folder
        run.mkdir(parents=True, exist_ok=True)
        _write(run / FAILED, error + "\n")
        return Outcome(cell, 0.0, error)


@contextlib.contextmanager
def _engine(
    backend: Backend, address: str | None, jobs: int, threads: int
) -> Iterator[Callable[[_Job, Sequence[Cell]], Iterator[Outcome]]]:
    """A way to apply a job to cells in parallel that yields the outcomes in the order in which they come."""
    import joblib

    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {"n_jobs": jobs}
        in_flight = "2 * n_jobs"
        if backend == "loky":
            # With one job joblib would run the cells in this process, which one that dies would take with it.
            settings["n_jobs"], in_flight = max(2, jobs), str(jobs)
            # One batch of threads per worker, or the workers fight for the cores.
            settings["inner_max_num_threads"] = threads
        elif backend == "dask":
            stack.enter_context(_dask_client(address, jobs))
            settings["n_jobs"] = -1
        else:
            _connect_ray(address, jobs)
            settings["n_jobs"] = -1
        stack.enter_context(joblib.parallel_config(backend=backend, **settings))
        unordered = "list" if backend == "ray" else "generator_unordered"

        def parallel(job: _Job, cells: Sequence[Cell]) -> Iterator[Outcome]:
            # Its stub knows batch_size="auto" only.
            engine: Any = joblib.Parallel(return_as=unordered, batch_size=cast(Any, 1), pre_dispatch=in_flight)
            return engine(joblib.delayed(_work)(job, cell) for cell in cells)

        yield parallel


def _worker_died() -> type[BaseException]:
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    return TerminatedWorkerError


@contextlib.contextmanager
def _dask_client(address: str | None, jobs: int) -> Iterator[Any]:
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise UserError("--backend dask needs the extra: pip install 'zo-lightning[dask]'") from error
    client: Any
    local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    try:
        client = Client(address, timeout=10, set_as_default=True) if address else Client(**local)
    except (OSError, ValueError) as error:
        raise UserError(f"no Dask scheduler answers at '{address}': {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=60)
        except TimeoutError as error:
            raise UserError(f"the Dask scheduler at '{address}' has no workers") from error
        try:
            client.run(_answer)  # joblib waits forever for a worker that lacks the package
        except Exception as error:
            raise UserError(f"a Dask worker cannot import zo_lightning: {error}") from error
        crowded = [name for name, count in client.nthreads().items() if count > 1]
        if crowded:  # a run seeds the process's random numbers and writes to its standard output
            raise UserError(f"Dask worker '{crowded[0]}' has several threads: start workers with --nthreads 1")
        yield client


def _answer() -> None:
    pass


def _connect_ray(address: str | None, jobs: int) -> None:
    try:
        ray, bridge = import_module("ray"), import_module("ray.util.joblib")
    except ImportError as error:
        raise UserError("--backend ray needs the extra: pip install 'zo-lightning[ray]'") from error
    ray.init(address=address, num_cpus=None if address else jobs)
    bridge.register_ray()


def _running(folder: Path) -> contextlib.AbstractContextManager[None]:
    return _locked(folder / ".lock", f"another process is running the study in '{folder}'")


@contextlib.contextmanager
def _locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold a file's lock, which the system gives back however the process ends. Wait for it, or refuse."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError as error:
            raise UserError(refusal or "") from error
        yield


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


def _sync_metrics(path: Path) -> None:
    """See that a run's metrics are on the disk before the run is called finished."""
    if not path.exists() or path.stat().st_size == 0:
        raise UserError(f"the run has written no {path.name}: has it trained an epoch?")
    with path.open("a") as file:
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    """Write all of a file, or nothing, even where the machine stops in between."""
    staged = path.with_name(f".{path.name}.new")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
