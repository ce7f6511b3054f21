"""Any LightningModule, trained by a gradient estimator."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from zo_lightning.costs import FlopMeter
from zo_lightning.estimators import Backprop, GradientEstimator, ZerothOrder
from zo_lightning.objective import NonFiniteLoss, Objective

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule as _Module
else:
    # A plain class, so that it also mixes into modules of the `lightning` package, whose base class is another one.
    _Module = object


class _Monitor(NamedTuple):
    monitor: str
    strict: bool


class TrainingDiverged(RuntimeError):
    """So many losses in a row were NaN or infinite that training on makes no sense."""


def logs_now(module: _Module) -> bool:
    """Whether Lightning passes the metrics of the present training step on to the loggers."""
    trainer: Any = module.trainer
    return (trainer.fit_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0


class EstimatedGradient(_Module):
    """Mixin that trains a LightningModule, unchanged, by a gradient estimator instead of automatic optimization.

    Write it first among the bases and set ``estimator``: ``class ZONet(EstimatedGradient, LitNet): estimator = ...``.
    The estimator asks the module's own ``training_step`` for its loss as often as it likes. The first forward pass of a
    step counts as the step's own: what it logs, what it adds to torchmetrics and to BatchNorm's statistics stays. The
    others leave no trace. Optimizer, LR schedulers (by step, epoch or plateau), ``global_step``, ``max_steps``,
    checkpoints and callbacks work as in automatic optimization, and with ``Backprop`` so do the weights, bit for bit.

    A step whose loss is NaN or infinite is skipped: weights, optimizer and ``global_step`` stay as they are.

    Attributes:
        estimator: fills ``.grad``.
        gradient_clip_val: largest norm of the gradient estimate, or None; Lightning's own setting is for automatic
            optimization only.
        mu_follows_lr: scale the stencil's ``mu`` by the ratio of the learning rate to its start, down to a thousandth:
            a schedule that halves one then halves both.
        max_skipped_in_a_row: skipped steps in a row after which training stops.
        forward_passes: forward passes of a batch spent so far; backpropagation counts three per step.
        skipped_steps: steps skipped so far.
        estimated_objective: while the optimizer steps, the loss whose gradient was estimated, for callbacks that ask it
            again in ``on_before_optimizer_step``; otherwise None.

    Raises:
        TrainingDiverged: in ``training_step``, at the last of ``max_skipped_in_a_row`` skipped steps.
        MisconfigurationException: at the start of ``fit``: several optimizers, 16-bit mixed precision, or a
            forward-only estimator on several processes.
    """

    estimator: GradientEstimator = ZerothOrder()
    gradient_clip_val: float | None = None
    mu_follows_lr: bool = False
    max_skipped_in_a_row: int = 20

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.forward_passes = 0
        self.skipped_steps = 0
        self._flops = FlopMeter()
        self.estimated_objective: Objective | None = None
        self._skipped_in_a_row = 0
        self._monitors: dict[int, _Monitor] = {}

    @property
    def flops(self) -> float:
        """Floating-point operations spent so far; NaN where they cannot be counted."""
        return self._flops.total

    @property
    def mu(self) -> float | None:
        """The finite-difference step in use, or None where the estimator has none."""
        stencil = getattr(self.estimator, "stencil", None)
        if stencil is None or not self.mu_follows_lr:
            return stencil and stencil.mu
        group = self.trainer.optimizers[0].param_groups[0]
        return stencil.mu * max(1e-3, group["lr"] / group["initial_lr"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Estimate the gradient of the underlying ``training_step``'s loss, and let the optimizer step."""
        step = super().training_step
        objective = _TrainingStep(lambda: step(*(batch, batch_idx)[: self._step_arity]), self)
        try:
            estimator = self._present_estimator()
            kind = type(estimator).__name__, getattr(estimator, "samples", 1)
            loss = self._flops.run(lambda: estimator.backward(objective, self, self.global_step), self, batch, *kind)
        except NonFiniteLoss as error:
            self._skip(error)
        else:
            self._skipped_in_a_row = 0
            objective.commit()
            with self._flops.step(self, batch, "optimizer"):
                self._step(objective)
            objective.replace_loss(loss)
        self.forward_passes += objective.forward_passes
        self._step_schedulers(batch_idx)
        if logs_now(self):
            self._log_estimator()
        return objective.output

    def configure_optimizers(self) -> Any:
        """Keep what Lightning ignores under manual optimization: which metric a plateau scheduler watches."""
        configured: Any = super().configure_optimizers()
        self._monitors = {}
        if isinstance(configured, Mapping) and configured.get("lr_scheduler") is not None:
            scheduler = self._without_monitor(configured["lr_scheduler"], configured.get("monitor"))
            return {**configured, "lr_scheduler": scheduler}
        if isinstance(configured, tuple | list) and len(configured) == 2 and isinstance(configured[0], list):
            schedulers = configured[1] if isinstance(configured[1], list) else [configured[1]]
            return configured[0], [self._without_monitor(scheduler) for scheduler in schedulers]
        return configured

    def on_fit_start(self) -> None:
        """Check that the trainer's settings suit an estimator."""
        super().on_fit_start()
        count = len(self.trainer.optimizers)
        if count != 1:
            raise MisconfigurationException(
                f"EstimatedGradient needs exactly one optimizer, configure_optimizers gave {count}"
            )
        if self.trainer.precision == "16-mixed":
            raise MisconfigurationException(
                "precision 16-mixed scales the loss, which an estimate does not undo: use bf16-mixed or 32-true"
            )
        if self.trainer.world_size > 1 and not isinstance(self.estimator, Backprop):
            raise MisconfigurationException(
                f"{type(self.estimator).__name__} lets {self.trainer.world_size} processes drift apart: use devices=1"
            )
        if self.mu_follows_lr:
            for group in self.trainer.optimizers[0].param_groups:
                group.setdefault("initial_lr", group["lr"])

    def on_validation_epoch_end(self) -> None:
        """Step the schedulers that watch a validation metric."""
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self._step_plateau_schedulers()

    def on_train_epoch_end(self) -> None:
        """Step the schedulers that watch a metric, where there is no validation."""
        super().on_train_epoch_end()
        if not self.trainer.enable_validation:
            self._step_plateau_schedulers()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what was spent so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["estimated_gradient"] = {
            "forward_passes": self.forward_passes,
            "flops": self._flops.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "estimator": self.estimator.state_dict(self),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what was spent so far; a checkpoint from before the mixin has nothing of it."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("estimated_gradient", {})
        self.forward_passes = saved.get("forward_passes", 0)
        self._flops.load_state_dict(saved.get("flops", FlopMeter().state_dict()))
        self.skipped_steps = saved.get("skipped_steps", 0)
        self._skipped_in_a_row = saved.get("skipped_in_a_row", 0)
        if saved.get("estimator"):
            self.estimator.load_state_dict(self, saved["estimator"])

    @cached_property
    def _step_arity(self) -> int:
        """How many of (batch, batch_idx) the underlying ``training_step`` takes."""
        parameters = inspect.signature(super().training_step).parameters.values()
        return 2 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else min(2, len(parameters))

    def _present_estimator(self) -> GradientEstimator:
        mu = self.mu
        stencil = getattr(self.estimator, "stencil", None)
        if stencil is None or mu == stencil.mu:
            return self.estimator
        present = copy(self.estimator)  # shallow: what the estimator has learned stays shared
        object.__setattr__(present, "stencil", replace(stencil, mu=mu))
        return present

    def _step(self, objective: Objective) -> None:
        optimizer: Any = self.optimizers()
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip_val, gradient_clip_algorithm="norm")
        self.estimated_objective = objective
        try:
            optimizer.step()
        finally:
            self.estimated_objective = None

    def _skip(self, error: NonFiniteLoss) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.max_skipped_in_a_row:
            raise TrainingDiverged(
                f"{error} for {self._skipped_in_a_row} steps in a row, at step {self.global_step}: training stops. "
                "Try a smaller learning rate; checkpoints saved before are intact."
            ) from error

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

    def _step_plateau_schedulers(self) -> None:
        metrics = self.trainer.callback_metrics
        for config in self.trainer.lr_scheduler_configs:
            watched = self._monitors.get(id(config.scheduler))
            if watched is None or (self.current_epoch + 1) % config.frequency:
                continue
            if watched.monitor in metrics:
                self.lr_scheduler_step(config.scheduler, metrics[watched.monitor])
            elif watched.strict:
                raise MisconfigurationException(
                    f"ReduceLROnPlateau watches {watched.monitor!r}, which was not logged; there are {sorted(metrics)}"
                )

    def _log_estimator(self) -> None:
        metrics = {
            "lr": float(self.trainer.optimizers[0].param_groups[0]["lr"]),
            "budget/forward_passes": float(self.forward_passes),
            "skipped_steps": float(self.skipped_steps),
        }
        if math.isfinite(self.flops):
            metrics["budget/flops"] = self.flops
        if self.mu is not None:
            metrics["mu"] = self.mu
        self.log_dict(metrics)


class _TrainingStep(Objective):
    """The loss of a LightningModule's ``training_step``: its first forward pass counts, further ones are silent."""

    def __init__(self, training_step: Callable[[], Any], module: EstimatedGradient) -> None:
        super().__init__(self._loss, module)
        self.training_step = training_step
        self.output: Any = None
        self._touched: list[Metric] | None = None  # by the first forward pass

    def _loss(self) -> Tensor:
        output = self._run()
        return output["loss"] if isinstance(output, Mapping) else output

    def per_example(self) -> Tensor:
        output = self._run()
        return output.get("losses", output["loss"]) if isinstance(output, Mapping) else output

    def _run(self) -> Any:
        if self._touched is not None:
            with _silent(self.module, self._touched):
                output = self.training_step()
        else:
            metrics = [metric for metric in self.module.modules() if isinstance(metric, Metric)]
            counts = [metric._update_count for metric in metrics]
            output = self.output = self.training_step()
            self._touched = [m for m, count in zip(metrics, counts, strict=True) if m._update_count != count]
        return output

    def backpropagate(self, loss: Tensor) -> None:
        self.module.manual_backward(loss)  # type: ignore[operator]

    def replace_loss(self, loss: Tensor) -> None:
        """Put the estimator's loss in the place of the first forward pass's, in the form ``training_step`` chose."""
        self.output = {**self.output, "loss": loss} if isinstance(self.output, Mapping) else loss


def _no_log(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _silent(module: nn.Module, metrics: list[Metric]) -> Iterator[None]:
    """Let ``self.log`` do nothing, and ``metrics`` forget what they see."""
    states = [_metric_state(metric) for metric in metrics]
    attributes = dict(vars(module))
    vars(module).update(log=_no_log, log_dict=_no_log)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del vars(module)[name]
            if name in attributes:
                vars(module)[name] = attributes[name]
        for metric, state in zip(metrics, states, strict=True):
            vars(metric).update(state)


def _metric_state(metric: Metric) -> dict[str, Any]:
    state = {name: _copy(getattr(metric, name)) for name in metric._defaults}
    return {**state, "_computed": metric._computed, "_update_count": metric._update_count}


def _copy(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return value.clone() if isinstance(value, Tensor) else list(value)
