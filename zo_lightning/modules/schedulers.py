"""LR schedulers under manual optimization: stepped when Lightning would step them in automatic optimization."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule as _Module
else:
    # A plain class, so that it also mixes into modules of the `lightning` package, whose base class is another one.
    _Module = object


class _Monitor(NamedTuple):
    monitor: str
    strict: bool


class SteppedSchedulers(_Module):
    """Mixin that steps what ``configure_optimizers`` gives: by step, by epoch, or on a plateau of a metric."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._monitors: dict[int, _Monitor] = {}

    def configure_optimizers(self) -> Any:
        """Keep what Lightning ignores under manual optimization: which metric a plateau scheduler watches."""
        configured: Any = super().configure_optimizers()
        self._monitors = {}
        if isinstance(configured, tuple | list) and len(configured) == 1 and isinstance(configured[0], Mapping):
            configured = configured[0]
        if isinstance(configured, Mapping) and configured.get("lr_scheduler") is not None:
            scheduler = self._without_monitor(configured["lr_scheduler"], configured.get("monitor"))
            return {**configured, "lr_scheduler": scheduler}
        if isinstance(configured, tuple | list) and len(configured) == 2 and isinstance(configured[0], list):
            schedulers = configured[1] if isinstance(configured[1], list) else [configured[1]]
            return configured[0], [self._without_monitor(scheduler) for scheduler in schedulers]
        return configured

    def on_validation_epoch_end(self) -> None:
        """Step the schedulers by step that watch a metric, as often as there is a validation."""
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self._step_plateau_schedulers("step", self.trainer.fit_loop.epoch_loop.batch_idx)

    def on_train_epoch_end(self) -> None:
        """Step the schedulers by epoch that watch a metric."""
        super().on_train_epoch_end()
        if self.trainer.is_last_batch:  # or training stops within the epoch
            self._step_plateau_schedulers("epoch", self.current_epoch)

    def _without_monitor(self, config: Any, default: str | None = None) -> dict[str, Any]:
        config = dict(config) if isinstance(config, Mapping) else {"scheduler": config}
        on_plateau = config.pop("reduce_on_plateau", isinstance(config["scheduler"], ReduceLROnPlateau))
        monitor, strict = config.pop("monitor", default), config.pop("strict", True)
        if not on_plateau:
            return config
        if monitor is None:
            raise MisconfigurationException(
                f"{type(config['scheduler']).__name__} needs to know the metric it watches: "
                "configure_optimizers must give {'scheduler': ..., 'monitor': 'val/loss'} or the like"
            )
        self._monitors[id(config["scheduler"])] = _Monitor(monitor, strict)
        return config

    def _step_schedulers(self, batch_idx: int) -> None:
        """Step what Lightning would have stepped at this moment, if optimization were automatic."""
        ends_epoch = self.trainer.is_last_batch or batch_idx + 1 >= self.trainer.num_training_batches
        for config in self.trainer.lr_scheduler_configs:
            count = batch_idx + 1 if config.interval == "step" else self.current_epoch + 1
            due = (config.interval == "step" or ends_epoch) and count % config.frequency == 0
            if due and id(config.scheduler) not in self._monitors:
                self.lr_scheduler_step(config.scheduler, None)

    def _step_plateau_schedulers(self, interval: str, index: int) -> None:
        metrics, every = self.trainer.callback_metrics, self.trainer.check_val_every_n_epoch or 1
        for config in self.trainer.lr_scheduler_configs:
            watched = self._monitors.get(id(config.scheduler))
            if watched is None or config.interval != interval or (index + 1) % config.frequency:
                continue
            if watched.monitor in metrics:
                self.lr_scheduler_step(config.scheduler, metrics[watched.monitor])
            elif watched.strict and self.current_epoch + 1 >= every:  # before the first validation there is nothing
                raise MisconfigurationException(
                    f"ReduceLROnPlateau watches {watched.monitor!r}, which was not logged; there are {sorted(metrics)}"
                )
