"""What a checkpoint lacks for a run to go on as if it had never stopped."""

import shutil
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torchmetrics import Metric

from zo_lightning.user_errors import UserError
from zo_lightning.curves import mark
from zo_lightning.progress import Point, go_on, settle
from zo_lightning.random_states import random_states, set_random_states

KEY = "exact_resume"


class ExactResume(Callback):
    """Adds to every checkpoint what Lightning leaves out, and takes it up when a run goes on.

    That is: the states of the random number generators of PyTorch, NumPy and Python; gradients that are being
    accumulated; sums of the metrics that are logged over the epoch, where it is not over; the latest values of all metrics, for schedules, early stopping and
    "best" checkpoints that watch one; and how far the curves on disk went. Of a loader that cannot say where it stands
    the batches of the epoch are read again up to there, in the same order. It comes first among the callbacks. What is
    written within the hooks at the end of a batch, by ``ModelCheckpoint(every_n_train_steps=...)``, comes before that
    batch's point in the curves, which is then missing; the weights are the same.

    Attributes:
        loaded: what the checkpoint held from which the run goes on, until training has begun.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self._point: Point | None = None
        self._random: dict[str, Any] | None = None
        self._sums: dict[str, dict[str, Any]] = {}
        self._refilled: list[str] = []
        self._metrics: dict[str, dict[str, Any]] = {}  # as a validation found them
        self._epoch_began: dict[str, Any] | None = None  # with which random numbers

    @property
    def state_key(self) -> str:
        """One per run."""
        return ExactResume.__qualname__

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add it; ``point`` says where the run stands, which Lightning's counters do not where it did not ask."""
        if self._point is not None:
            settle(checkpoint["loops"], self._point)
        in_epoch = self._point != "epoch" and trainer.state.fn == "fit"
        checkpoint[KEY] = {
            "point": self._point,
            "random": self._random or random_states(),
            "epoch_began": self._epoch_began,
            "gradients": _gradients(pl_module) if in_epoch and accumulates(trainer) else {},
            "pending": _pending(trainer) if self._point is None else None,
            "latest": {name: value.detach().clone() for name, value in trainer.callback_metrics.items()},
            "sums": _sums(trainer) if in_epoch else {},
            "metrics": {} if not in_epoch else self._metrics if trainer.validating else _metric_states(pl_module),
            "curves": mark(trainer.loggers) if trainer.is_global_zero else [],
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take it up; a checkpoint of Lightning's own has nothing of it. In another folder the best ones are copied."""
        self.loaded = saved_state(checkpoint)
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if trainer.state.fn == "fit" and isinstance(callback, ModelCheckpoint) and state and trainer.ckpt_path:
                _take_along(state, callback, Path(trainer.ckpt_path).parent, trainer.is_global_zero)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the counters and the metrics."""
        if not self.loaded:
            return
        go_on(trainer, self.loaded["point"])
        self._epoch_began = self.loaded.get("epoch_began")
        for name, gradient in self.loaded.get("gradients", {}).items():
            p = pl_module.get_parameter(name)
            p.grad = torch.empty_like(p).copy_(gradient)
        if trainer.fit_loop.restarted_mid_epoch and self._epoch_began and not _know_their_place(trainer):
            set_random_states(self._epoch_began)
            _read_again(trainer)
        trainer.callback_metrics.update({n: v.to(pl_module.device) for n, v in self.loaded["latest"].items()})
        if pending := self.loaded.get("pending"):
            for logger in trainer.loggers:
                logger.log_metrics(**pending)
        self._sums = self.loaded["sums"]
        if trainer.fit_loop.epoch_loop._num_ready_batches_reached():  # no further batch of this epoch logs
            self._refilled = _refill(trainer, self._sums)
            self._sums = {}
        for name, state in self.loaded["metrics"].items():
            metric = dict(pl_module.named_modules()).get(name)
            if isinstance(metric, Metric) and set(state) - {"_update_count"} <= set(metric._defaults):
                vars(metric).update({key: _to(value, metric.device) for key, value in state.items()})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the generators, where the run goes on with a new epoch; remember them."""
        self._set_generators()
        self._epoch_began = random_states()
        for name in self._refilled:
            trainer.fit_loop.epoch_loop._results.pop(name, None)
        self._refilled = []
        if trainer.fit_loop.is_resuming and not _know_their_place(trainer):
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # once more: it draws the loader's seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the generators, where it goes on within one."""
        self._set_generators()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Add the sums of the batches before to what the first batch has logged over the epoch."""
        if not self._sums:
            return
        for name, result in trainer.fit_loop.epoch_loop._results.items():
            if (before := self._sums.pop(name, None)) is not None:
                _merge(result, before)
        self._sums = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics: a validation that is stopped is begun again."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._metrics = _metric_states(pl_module)

    def _set_generators(self) -> None:
        if self.loaded:
            set_random_states(self.loaded["random"])
            self.loaded = {}


def saved_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What ``ExactResume`` has added to a checkpoint; empty where it was not there.

    Raises:
        UserError: it is malformed.
    """
    saved = checkpoint.get(KEY, {})
    kinds = {"random": dict, "latest": dict, "sums": dict, "metrics": dict, "curves": list}
    if saved and not (isinstance(saved, dict) and all(isinstance(saved.get(name), kinds[name]) for name in kinds)):
        raise UserError(f"the checkpoint's '{KEY}' is malformed: begin with its weights alone, with --init_from")
    return dict(saved, point=saved.get("point")) if saved else {}


def accumulates(trainer: Trainer) -> bool:
    """Whether batches that are done await the optimizer's step."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    done = batches.current.processed
    ended = batches.is_last_batch and done == batches.current.ready
    return done % trainer.accumulate_grad_batches != 0 and not ended


def _gradients(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _take_along(state: dict[str, Any], callback: ModelCheckpoint, beside: Path, writes: bool) -> None:
    """Let the state of a ``ModelCheckpoint`` name files in its new folder, and copy them there."""
    old, new = state.get("dirpath"), callback.dirpath
    if old is None or new is None or Path(old).resolve() == Path(new).resolve():
        return

    def moved(name: str) -> str:
        target = Path(new, Path(name).name)
        source = next((one for one in (Path(name), beside / target.name) if one.is_file()), None)
        if writes and source is not None and source.suffix == ".ckpt" and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        return str(target)

    state["dirpath"] = new
    state["best_k_models"] = {moved(name): score for name, score in state["best_k_models"].items()}
    for one in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[one] = state[one] and moved(state[one])


def _know_their_place(trainer: Trainer) -> bool:
    """Whether all training loaders hold a state that Lightning saves and loads."""
    loaders = trainer.fit_loop._combined_loader
    return loaders is None or all(hasattr(loader, "load_state_dict") for loader in loaders.flattened)


def _read_again(trainer: Trainer) -> None:
    """Pass over the batches of the epoch that are done."""
    fetcher = trainer.fit_loop._data_fetcher
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    done = batches.processed  # the last one is not "completed" in a checkpoint that was written at its end
    if fetcher is None or done >= trainer.num_training_batches:
        return
    if trainer.current_epoch > 0:  # in the first epoch the loader's seed was drawn before the epoch began
        iter(fetcher)
    for _ in range(done):
        next(fetcher)
    fetcher.fetched = 0  # Lightning adds what is done


def _pending(trainer: Trainer) -> dict[str, Any] | None:
    """What Lightning logs for an epoch after the hooks at its end, in which its own callback writes checkpoints."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    if not trainer.training or epochs.processed == epochs.completed:
        return None
    metrics = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}
    step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
    return {"metrics": {**metrics, "epoch": trainer.current_epoch}, "step": step} if metrics else None


def _sums(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What ``self.log(..., on_epoch=True)`` has summed in this epoch."""
    results = trainer.fit_loop.epoch_loop._results
    return {
        name: {"states": _states(result), "meta": _meta(result.meta)}
        for name, result in results.items()
        if result.is_tensor and result.meta.on_epoch and result._update_count and not result.has_reset
    }


def _states(result: Any) -> dict[str, Any]:
    return {state: getattr(result, state).clone() for state in result._defaults}


def _meta(meta: Any) -> dict[str, Any]:
    plain = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx", "dataloader_idx")
    return {**{name: getattr(meta, name) for name in plain}, "reduce_fx": meta.reduce_fx.__name__}


def _refill(trainer: Trainer, sums: dict[str, dict[str, Any]]) -> list[str]:
    """Put the sums of an epoch whose batches are all done where Lightning logs them from; returns their names."""
    for name, saved in sums.items():
        meta = _Metadata(**saved["meta"])
        meta.sync = _Sync()
        result = _ResultMetric(meta, is_tensor=True)
        vars(result).update(saved["states"], _update_count=1)
        trainer.fit_loop.epoch_loop._results[name] = result.to(trainer.strategy.root_device)
    return list(sums)


def _merge(result: Any, before: dict[str, Any]) -> None:
    extreme = {torch.max: torch.maximum, torch.min: torch.minimum}.get(result.meta.reduce_fx, torch.add)
    for state, value in before["states"].items():
        here = getattr(result, state)
        setattr(result, state, extreme(value.to(here), here))


def _metric_states(module: LightningModule) -> dict[str, dict[str, Any]]:
    """The states of the module's torchmetrics that have been updated."""
    return {
        name: {
            "_update_count": metric._update_count,
            **{state: _copy(getattr(metric, state)) for state in metric._defaults},
        }
        for name, metric in module.named_modules()
        if isinstance(metric, Metric) and metric._update_count
    }


def _copy(value: Any) -> Any:
    return [one.clone() for one in value] if isinstance(value, list) else value.clone()


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, list):
        return [one.to(device) for one in value]
    return value.to(device) if hasattr(value, "to") else value
