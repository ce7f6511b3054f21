"""The checkpoint from which a run goes on, however it was stopped."""

import errno
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException

from zo_lightning.callbacks.exact_resume import ExactResume, accumulates
from zo_lightning.callbacks.reporting import run_folder
from zo_lightning.progress import Point
from zo_lightning.random_states import random_states

_SHARE = 20
"""Writing takes at most one part in so many of a run's time, however large its checkpoints are."""
_AGREE = 50
"""Steps from one agreement of several processes on the time to the next: each is a message."""


class LastCheckpoint(ExactResume):
    """Keeps ``last.ckpt`` so recent that a run which is stopped goes on with the loss of a minute at most.

    It is written after the first step, and in time intervals, between two batches; at the end of training, also where
    that is within an epoch; on SIGTERM; and after an error, if nothing of the model had been changed in the step that
    failed. The file lies beside
    those of ``ModelCheckpoint``, whose own ``save_last`` writes only together with a best checkpoint. A run that goes on
    from it ends with the same weights, states, metrics and curves as one that was never stopped.

    Ctrl-C stops training as SIGTERM does, when the batch is done; a second one stops at once.

    Args:
        every_seconds: between two writings, or more where writing would take a twentieth of the time; null: only at the
            end and on SIGTERM or an error, not after the first step either.
        weights_only: without what it takes to go on, for runs that nobody will continue.

    Attributes:
        path: the file.
        interrupted: whether Ctrl-C stopped the run.

    Raises:
        ValueError: ``every_seconds`` is negative or not finite.
    """

    def __init__(self, every_seconds: float | None = 60.0, weights_only: bool = False) -> None:
        super().__init__()
        if every_seconds is not None and not 0 <= every_seconds < math.inf:
            raise ValueError(f"every_seconds must be a finite number of at least 0, or null, got {every_seconds}")
        self.every_seconds = every_seconds
        self.weights_only = weights_only
        self.path = Path()
        self.interrupted = False
        self._written_at = self._took = 0.0
        self._handler: Any = None
        self._complete = False  # whether the file holds the end of training already
        self._before: tuple[Any, list[int]] = None, []  # random numbers and weights as the step found them

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the file's name: another run's is not overwritten."""
        super().on_train_start(trainer, pl_module)
        folder = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or run_folder(trainer) / "checkpoints")
        continued = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve().parent == folder.resolve()
        self.path, version = folder / "last.ckpt", 0
        while self.path.exists() and not continued:
            version += 1
            self.path = folder / f"last-v{version}.ckpt"
        self._written_at = time.monotonic() if self.path.exists() else -math.inf  # after its first step it can go on
        self._complete = False
        self._catch_interrupt(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write between two epochs, where it is time."""
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.global_step > 0 and self._is_due(trainer):
            self._save(trainer, "epoch")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write between two batches, where it is time."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx > 0 and self._is_due(trainer):
            self._save(trainer, "batch")
        self._before = torch.get_rng_state(), list(_versions(pl_module, accumulates(trainer)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write where training ends within an epoch, before Lightning treats the epoch as a whole one."""
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._save(trainer, "batch")
            self._complete = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write where training ends with an epoch."""
        self._release_interrupt()
        if not self._complete:
            self._save(trainer, "epoch")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write on SIGTERM, which Lightning lets through between two batches; else if the step has changed nothing."""
        self._release_interrupt()
        if self.path == Path() or trainer.sanity_checking or not (trainer.training or trainer.validating):
            return
        batch = trainer.fit_loop.epoch_loop.batch_progress.current
        if isinstance(exception, SIGTERMException):
            in_epoch = trainer.fit_loop.epoch_progress.current
            between = "epoch" if in_epoch.ready == in_epoch.completed else "batch"
            self._save(trainer, "validation" if trainer.validating else between)
            return
        if trainer.world_size > 1 or batch.ready == 0:
            return
        random, versions = self._before
        unchanged = batch.ready > batch.completed and versions == list(_versions(pl_module, accumulates(trainer)))
        if not trainer.validating and not unchanged:
            return
        self._random = {**random_states(), **({} if trainer.validating else {"torch": random})}
        try:
            self._save(trainer, "validation" if trainer.validating else "batch")
        except Exception as error:  # the reason why the run ends is the other one
            rank_zero_warn(f"'{self.path}' could not be written: {error}")

    def _catch_interrupt(self, trainer: Trainer) -> None:
        self.interrupted = False
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return

        def stop(*_: Any) -> None:
            self._release_interrupt()
            self.interrupted = True
            trainer._signal_connector.received_sigterm = True
            if trainer.is_global_zero:
                print("\nStopping when this batch is done; Ctrl-C again stops at once.", file=sys.stderr)

        self._handler = stop
        signal.signal(signal.SIGINT, stop)

    def _release_interrupt(self) -> None:
        if self._handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._handler = None

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether it is time; not while gradients are accumulated, which the file would have to hold too."""
        if self.every_seconds is None or getattr(trainer, "fast_dev_run", False) or accumulates(trainer):
            return False
        several = trainer.world_size > 1
        if several and trainer.global_step % _AGREE:
            return False
        due = time.monotonic() - self._written_at >= max(self.every_seconds, _SHARE * self._took)
        return trainer.strategy.broadcast(due) if several else due

    def _save(self, trainer: Trainer, point: Point) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        began = time.monotonic()
        self._point = point
        try:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)
        finally:
            self._point, self._random = None, None
            self._written_at = time.monotonic()
            self._took = self._written_at - began


@contextmanager
def telling_exit_code(trainer: Trainer) -> Iterator[None]:
    """Let a run that a signal stops end its process with 128 + the signal's number, and say how to go on.

    Raises:
        OSError: EIO, where the run's folder was deleted while it ran.
    """
    try:
        yield
    except FileNotFoundError as error:
        gone = Path(os.fsdecode(error.filename or b"")).resolve()
        if run_folder(trainer).resolve() not in gone.parents:
            raise
        raise OSError(errno.EIO, "the folder of the run was deleted while it ran", str(gone)) from error
    except SystemExit as stop:
        last = next((one for one in trainer.callbacks if isinstance(one, LastCheckpoint)), None)  # type: ignore[attr-defined]
        interrupted = isinstance(stop.__context__, KeyboardInterrupt) or (last is not None and last.interrupted)
        if interrupted or isinstance(stop, SIGTERMException):
            stop.code = 128 + (signal.SIGINT if interrupted else signal.SIGTERM)
        if last is not None and last.path.is_file() and trainer.is_global_zero:
            print(f"\nzo-lightning: stopped; to go on: --ckpt_path {last.path}", file=sys.stderr)
        raise


def _versions(module: LightningModule, gradients: bool) -> Iterator[int]:
    """A number for each weight, and each gradient if so wished, that grows when something is written into it."""
    for p in module.parameters():
        yield p._version
        if gradients:
            yield -1 if p.grad is None else p.grad._version
