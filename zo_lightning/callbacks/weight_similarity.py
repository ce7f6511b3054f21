"""How far the weights are from another run's, and from where they started."""

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zo_lightning.callbacks.reporting import log_scalars, say_once
from zo_lightning.callbacks.weight_snapshots import check_at_least_1
from zo_lightning.measures import Tensors, cosine, mismatch, l2_distance, matched
from zo_lightning.snapshots import read_snapshots, snapshots_by_epoch


class WeightSimilarity(Callback):
    """Cosine similarity and L2 distance of the weights to another run's at the same epoch, and to their own start.

    Logs ``vs_start/cosine/<name>`` and ``vs_start/l2/<name>``, and with a reference ``vs_reference/cosine/<name>``,
    ``vs_reference/l2/<name>`` and, for convolutions, ``vs_reference/matched/<name>``: the cosine after the best
    matching of filters, since equal filters may sit in different places. ``<name>`` is a weight's, or ``all``. The
    start is kept with checkpoints, so they grow by the weights.

    Args:
        reference: folder of a run that was trained with ``WeightSnapshots``, or None.
        every_n_epochs: epochs from one comparison to the next; the first is at epoch 0.

    Raises:
        ValueError: ``every_n_epochs`` is below 1.
        MisconfigurationException: in ``setup``: the reference does not exist, has no snapshots, or has other weights.
    """

    def __init__(self, reference: str | None = None, every_n_epochs: int = 1) -> None:
        check_at_least_1(every_n_epochs=every_n_epochs)
        self.reference = reference
        self.every_n_epochs = every_n_epochs
        self._start: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        """By the reference, since several instances are plausible."""
        return self._generate_state_key(reference=self.reference)

    def state_dict(self) -> dict[str, Any]:
        """The weights at the start."""
        return {"start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the weights at the start."""
        self._start = state_dict["start"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the reference can be compared with."""
        if self.reference is not None and stage == "fit":
            check_reference(self.reference, dict(pl_module.named_parameters()))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the start, and compare it with the reference's."""
        if trainer.global_step > 0 and self._start is None:
            say_once(
                f"WeightSimilarity: the checkpoint has no start for it: vs_start is from step {trainer.global_step}"
            )
        if trainer.global_step == 0 or self._start is None:
            self._start = {name: p.detach().cpu().clone() for name, p in pl_module.named_parameters()}
        if trainer.global_step == 0:
            self._compare(trainer, pl_module, 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Compare at the end of an epoch."""
        if trainer.is_last_batch and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._compare(trainer, pl_module, trainer.current_epoch + 1)

    def _compare(self, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        if not trainer.is_global_zero:
            return
        assert self._start is not None
        weights = {name: p.detach().cpu() for name, p in module.named_parameters()}
        values = _compared("vs_start", weights, self._start) if epoch else {}
        if self.reference is not None:
            snapshot = snapshots_by_epoch(self.reference).get(epoch)
            try:  # what was whole in setup may be gone by now: that is no reason to stop a run
                other = None if snapshot is None else snapshot.load(weights)
            except (OSError, ValueError) as error:
                say_once(f"reference: {error}")
                other = None
            if other is None:
                say_once(
                    f"reference '{self.reference}' has no snapshot of epoch {epoch}: nothing to compare with there"
                )
            else:
                values |= _compared("vs_reference", weights, other)
                values |= self._matched(weights, other)
        log_scalars(trainer, values)

    def _matched(self, weights: Tensors, other: Tensors) -> dict[str, float]:
        finite = {name: w for name, w in weights.items() if w.isfinite().all() and other[name].isfinite().all()}
        if lost := [name for name in weights if name not in finite]:
            say_once(f"WeightSimilarity matches no filters of {lost[0]}: it, or the reference's, is NaN or infinite")
        values = matched(finite, {name: other[name] for name in finite})
        return {f"vs_reference/matched/{name}": value for name, value in values.items()}


def check_reference(reference: str | Path, weights: Tensors) -> None:
    """Raise MisconfigurationException unless all snapshots of a run are whole, and of weights like these."""
    try:
        snapshots = read_snapshots(reference)
        shapes = [snapshot.shapes() for snapshot in snapshots]
    except (OSError, ValueError) as error:
        raise MisconfigurationException(f"reference: {error}") from error
    for other in shapes:
        if difference := mismatch(weights, other, ("this run", "the reference")):
            raise MisconfigurationException(f"reference '{reference}' is of another net: {difference}")


def _compared(prefix: str, a: Tensors, b: Tensors) -> dict[str, float]:
    return {f"{prefix}/cosine/{name}": value for name, value in cosine(a, b).items()} | {
        f"{prefix}/l2/{name}": value for name, value in l2_distance(a, b).items()
    }
