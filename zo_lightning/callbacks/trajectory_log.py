"""A run kept whole: its start, and the scalars of each step, from which its weights can be rebuilt."""

import json
import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from zo_lightning.callbacks.reporting import run_folder, say_once
from zo_lightning.distributed import fingerprint
from zo_lightning.modules.driver import Driver, driver_of
from zo_lightning.perturbed.weights import Weights
from zo_lightning.replay.rebuild import FOLDER, STEPS
from zo_lightning.replay.start import SETTINGS, WEIGHTS, CannotReplay, Start, draws_from
from zo_lightning.step_log import Check, Record, Settings, Step, StepLog, read_places


class TrajectoryLog(Callback):
    """Writes a run's start and, for each batch, its loss and slopes: ``<run>/trajectory``, some 50 bytes a step.

    ``zo-lightning replay`` rebuilds the weights of any step from it, without data or forward passes, bit for bit. A run
    that was killed and goes on from a checkpoint takes the steps logged after that from here in place of asking for
    them again: at most the step in flight is lost. Where a pass leaves more than its loss (BatchNorm's statistics,
    metrics, outputs for a hook), and where metrics are logged, it is run again all the same, and compared.

    Only scalars of weight-space estimators (``ZerothOrder``, ``ForwardGradient``) make a run; of others, of optimizers
    that are none of ``torch.optim`` or this package, and of a scaled loss (16-bit precision) nothing is logged, and
    checkpoints are all there is. Weights that something else writes into are noticed: a hash of them is logged too.

    Args:
        check_every: steps from one hash of the weights to the next; the end of the run has one too.

    Raises:
        ValueError: ``check_every`` is below 1.
    """

    def __init__(self, check_every: int = 1000) -> None:
        if check_every < 1:
            raise ValueError(f"check_every must be at least 1, got {check_every}")
        self.check_every = check_every
        self._driver: Driver | None = None
        self._log: StepLog | None = None
        self._folder: Path | None = None
        self._place = 0  # in the log, after the batches that are done
        self._known: deque[tuple[Step, int]] = deque()  # logged by a run that was stopped, after its checkpoint
        self._latest: Step | None = None
        self._rates: tuple[float, ...] = ()
        self._settings: list[dict[str, Any]] = []
        self._draws_from: Any = None

    @property
    def state_key(self) -> str:
        """One log per run."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Where the log is."""
        folder = self._folder and str(self._folder.resolve())
        return {"folder": folder, "place": self._place, "settings": self._settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the log of the run that wrote the checkpoint."""
        folder = state_dict["folder"]
        self._folder, self._place = folder and Path(folder), state_dict["place"]
        self._settings = state_dict["settings"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run before; a checkpoint may name a log after this."""
        if stage == "fit":
            self._folder, self._place = None, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the start, or take up the log of a run that was stopped."""
        self._log, self._latest = None, None
        self._known.clear()
        self._driver = driver_of(trainer, pl_module)
        if self._driver is None or not self._driver.estimator.replays or getattr(trainer, "fast_dev_run", False):
            return
        folder, step = run_folder(trainer) / FOLDER, trainer.global_step
        try:
            if step == 0:
                self._begin(trainer, pl_module, folder)
            else:
                self._go_on(trainer, folder, step)
        except CannotReplay as error:
            self._folder = None
            say_once(f"TrajectoryLog keeps no log of this run: {error}")
            return
        self._driver.recorder = self

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Write what the batch came to."""
        latest, self._latest = self._latest, None
        if latest is None or self._driver is None or not self._records:
            return
        if self._known:  # it is in the log
            self._place = self._known.popleft()[1]
            return
        stepped = trainer.global_step > latest.step
        scale, rates = 1.0 if latest.skipped else self._driver.scale, self._rates if stepped else ()
        self._write(replace(latest, scale=scale, rates=rates, stepped=stepped))
        if stepped and trainer.global_step % self.check_every == 0:
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the hash of the weights."""
        if self._records and not self._known:
            self._check(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the log."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the log."""
        self._close()

    def recall(self, step: int) -> Step | None:
        """The next batch as the log has it."""
        if not self._draws_alike(step):
            return None
        return self._known[0][0] if self._known and self._known[0][0].step == step else None

    def estimated(self, estimated: Step) -> None:
        """Note what a batch came to; what the log says of it must be the same."""
        if not self._draws_alike(estimated.step):
            return
        self._latest = estimated
        if not self._known:
            return
        known, _ = self._known[0]
        if (known.step, known.slopes) != (estimated.step, estimated.slopes):
            self._known.clear()
            self._open(self._place)
            say_once(
                f"step {estimated.step} came out otherwise than TrajectoryLog has it: the data, the settings or the "
                "machine are not those of the run that was stopped; all is asked anew from here"
            )

    def stepping(self, groups: list[dict[str, Any]]) -> None:
        """Note the settings of the optimizer's step; what has changed beside the learning rate is written."""
        self._rates = tuple(float(group["lr"]) for group in groups)
        settings = _settings(groups)
        if len(settings) != len(self._settings):
            self._give_up(
                self._latest.step if self._latest else 0, "the optimizer has other groups of weights than before"
            )
        elif settings != self._settings:
            changed = [
                {name: value for name, value in now.items() if name not in before or before[name] != value}
                for now, before in zip(settings, self._settings, strict=True)
            ]
            self._settings = settings
            if self._latest is not None and not self._known:
                self._write(Settings(self._latest.step, tuple(changed)))

    def _begin(self, trainer: Trainer, module: LightningModule, folder: Path) -> None:
        assert self._driver is not None
        optimizer = trainer.optimizers[0]
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise CannotReplay("the loss is scaled, and by how much is found out on the way")
        clip = trainer.gradient_clip_val
        algorithm = str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm) or "norm")
        start = Start.of(module, self._driver.estimator, optimizer, None if not clip else (float(clip), algorithm))
        self._settings = _settings(optimizer.param_groups)
        if trainer.is_global_zero:
            (folder / STEPS).unlink(missing_ok=True)
            start.write(folder)
        self._folder, self._place, self._draws_from = folder, 0, draws_from(start.estimator)
        self._open(0, trainer.is_global_zero)

    def _go_on(self, trainer: Trainer, folder: Path, step: int) -> None:
        """Keep the log up to the checkpoint's place, and remember what comes after it."""
        earlier = self._folder
        if earlier is None:
            raise CannotReplay(f"it begins at step {step}, and no checkpoint says where the log of the steps before is")
        if not (earlier / STEPS).is_file():
            raise CannotReplay(f"the run was at step {step} before, and its log is not in {earlier}")
        try:
            start = Start.from_settings(json.loads((earlier / SETTINGS).read_text(encoding="utf-8")), {})
            records = list(read_places(earlier / STEPS))
        except (OSError, ValueError) as error:
            raise CannotReplay(str(error)) from error
        places = [0, *(place for _, place in records)]
        if self._place not in places:
            raise CannotReplay(f"the log in {earlier} is another run's, or ends before the checkpoint's step {step}")
        after = places.index(self._place)
        while after < len(records) and _is_before(records[after][0], step):  # saved before its batch was logged
            after += 1
        done = [record.step + 1 for record, _ in records[:after] if isinstance(record, Step) and record.stepped]
        if max(done, default=0) != step:
            raise CannotReplay(f"the log in {earlier} ends at step {max(done, default=0)}, the checkpoint is of {step}")
        self._place = places[after]
        if trainer.world_size == 1:  # several processes would have to agree on what is known
            self._known.extend((record, place) for record, place in records[after:] if isinstance(record, Step))
        if trainer.is_global_zero and earlier.resolve() != folder.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            for name in (SETTINGS, WEIGHTS, STEPS):
                shutil.copy2(earlier / name, folder / name)
        self._folder, self._draws_from = folder, draws_from(start.estimator)
        self._open(None if self._known else self._place, trainer.is_global_zero)

    def _open(self, place: int | None, writes: bool = True) -> None:
        """Go on with the log at a place; a process that does not write has none."""
        assert self._folder is not None
        if self._log is not None:
            self._log.close()
        self._log = StepLog(self._folder / STEPS, place) if writes else None

    def _draws_alike(self, step: int) -> bool:
        """Whether directions are still drawn as at the start; where they are not, the log ends."""
        alike = self._driver is not None and draws_from(self._driver.estimator) == self._draws_from
        if not alike:
            self._give_up(step, "directions or seed are not those of its start")
        return alike

    @property
    def _records(self) -> bool:
        return self._driver is not None and self._driver.recorder is self

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._write(Check(trainer.global_step, fingerprint(Weights.of(module))))

    def _write(self, record: Record) -> None:
        if self._log is None:
            return
        try:
            self._log.append(record)
        except (OSError, TypeError) as error:  # a full disk, or a setting that is no plain number
            self._give_up(record.step, str(error))
        else:
            self._place = self._log.place

    def _give_up(self, step: int, why: str) -> None:
        """Log no more; checkpoints from here on name no log."""
        self._close()
        self._known.clear()
        self._folder = None
        say_once(f"TrajectoryLog stops at step {step}: {why}")

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._driver is not None:
            self._driver.recorder, self._driver = None, None


def _is_before(record: Record, step: int) -> bool:
    """Whether a record belongs to the first ``step`` optimizer steps."""
    return record.step <= step if isinstance(record, Check) else record.step < step


def _settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an optimizer's groups are set to, beside the learning rate."""
    return [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
