"""Every weight over time, on disk and in TensorBoard."""

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning.callbacks.reporting import log_histogram, log_scalars, run_folder, say_once
from zo_lightning.measures import norm
from zo_lightning.snapshots import FOLDER, check_empty, continue_snapshots, read_snapshots, write_snapshot


class WeightSnapshots(Callback):
    """Writes all weights at initialisation and every n epochs or steps: ``<run>/snapshots/*.safetensors``.

    ``zo_lightning.snapshots.read_snapshots`` reads them. Their histograms (``weights/<name>``) and norms
    (``weight_norm/<name>``) are drawn beside. A run that goes on from a checkpoint continues the history: in another
    folder it is copied there, in the same one what came after the checkpoint is replaced. Only whole epochs count for
    ``every_n_epochs``. Weights are the module's parameters, each once where it is tied.

    Args:
        every_n_epochs: epochs from one to the next, or None.
        every_n_steps: optimizer steps from one to the next, or None.
        keep: how many of the latest stay on disk beside the one of the initialisation; None keeps all.
        histograms: draw histograms.

    Raises:
        ValueError: a number is below 1, or both intervals are None.
        MisconfigurationException: at the start of ``fit``: the folder holds snapshots of another run.
    """

    def __init__(
        self,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        keep: int | None = None,
        histograms: bool = True,
    ) -> None:
        check_at_least_1(every_n_epochs=every_n_epochs, every_n_steps=every_n_steps, keep=keep)
        if every_n_epochs is None and every_n_steps is None:
            raise ValueError("one of every_n_epochs and every_n_steps must be given")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.histograms = histograms
        self._steps: list[int] = []  # of the snapshots on disk
        self._folder: Path | None = None

    @property
    def state_key(self) -> str:
        """One history per run: Lightning refuses a second instance."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Where the snapshots are, and of which steps."""
        folder = self._folder and str(self._folder.resolve())  # the run may go on from another working directory
        return {"folder": folder, "steps": list(self._steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of the run that wrote the checkpoint."""
        folder = state_dict["folder"]
        self._folder, self._steps = folder and Path(folder), list(state_dict["steps"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights at initialisation, or continue the history of the checkpoint."""
        if not _writes(trainer):
            return
        folder = run_folder(trainer) / FOLDER
        if trainer.global_step == 0:
            self._folder, self._steps = None, []
        try:
            if self._folder is None:
                check_empty(folder)
            elif lost := continue_snapshots(folder, self._folder, self._steps):
                say_once(f"snapshots of steps {sorted(lost)} are no longer in {self._folder}")
                self._steps = [step for step in self._steps if step not in lost]
        except FileExistsError as error:
            raise MisconfigurationException(str(error)) from error
        self._folder = folder
        if trainer.global_step == 0:
            self._write(trainer, pl_module, 0, False)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Write the weights where it is time: before validation, so that its checkpoints know of them."""
        if not _writes(trainer) or trainer.global_step in self._steps:
            return
        epoch = trainer.current_epoch + trainer.is_last_batch
        by_epoch = trainer.is_last_batch and self.every_n_epochs is not None and epoch % self.every_n_epochs == 0
        by_step = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if by_epoch or by_step:
            self._write(trainer, pl_module, epoch, not trainer.is_last_batch)

    def _write(self, trainer: Trainer, module: LightningModule, epoch: int, within_epoch: bool) -> None:
        assert self._folder is not None
        weights = dict(module.named_parameters())
        write_snapshot(self._folder, weights, trainer.global_step, epoch, within_epoch)
        self._steps.append(trainer.global_step)
        self._forget()
        log_scalars(trainer, {f"weight_norm/{name}": value for name, value in norm(weights).items()})
        if self.histograms:
            for name, weight in weights.items():
                log_histogram(trainer, f"weights/{name}", weight)

    def _forget(self) -> None:
        assert self._folder is not None
        later = [step for step in self._steps if step > 0]
        if self.keep is None or len(later) <= self.keep:
            return
        old = set(later[: -self.keep])
        for snapshot in read_snapshots(self._folder):
            if snapshot.step in old:
                snapshot.path.unlink()
        self._steps = [step for step in self._steps if step not in old]


def check_at_least_1(**numbers: int | None) -> None:
    """Raise ValueError naming the first number below 1; None passes."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def _writes(trainer: Trainer) -> bool:
    return trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)
