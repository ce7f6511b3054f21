"""Anybody's LightningModule object, trained by a gradient estimator without touching its class."""

import math
import weakref
from collections.abc import Callable, Iterable
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from zo_lightning.costs import FlopMeter
from zo_lightning.estimators import Backprop, GradientEstimator, ZerothOrder
from zo_lightning.modules import EstimatedGradient, TrainingDiverged
from zo_lightning.modules.training_step import NoLoss, TrainingStep, logs_now
from zo_lightning.objective import NonFiniteLoss, Objective
from zo_lightning.perturbed.state import State


class GradientFree(Callback):
    """Trains an unmodified LightningModule, in automatic optimization, by a gradient estimator.

    ``Trainer(callbacks=[GradientFree(ZerothOrder(samples=16))])``. During ``fit`` the module object's ``training_step``
    asks the estimator, which runs the module's own ``training_step`` as often as it likes, and ``backward`` adds the
    estimate to ``.grad``; afterwards both are what they were. Everything else is Lightning's automatic optimization:
    ``accumulate_grad_batches`` (the batches of one optimizer step share its directions), ``gradient_clip_val``,
    precision, LR schedulers, all hooks. With ``Backprop`` the weights equal those without the callback, bit for bit.

    The first forward pass of a step counts as the step's own: what it logs, what it adds to torchmetrics and to
    BatchNorm's statistics stays. The others leave no trace. Where the loss is NaN or infinite, its batch adds nothing to
    ``.grad``. ``budget/forward_passes``, ``budget/flops``, ``skipped_steps`` and ``mu`` are logged whenever the trainer
    logs. Who can change the class may mix in ``EstimatedGradient`` instead, which can also train in lean memory.

    Args:
        estimator: fills ``.grad``.
        max_skipped_in_a_row: losses in a row that are not finite after which training stops.

    Attributes:
        estimator_state: what the estimator has learned about the module; saved with checkpoints.
        forward_passes: of a batch, so far; backpropagation counts three per batch.
        skipped_steps: batches skipped so far.
        estimated_objective: the loss whose gradient was estimated last, until the end of its batch.

    Raises:
        ValueError: ``max_skipped_in_a_row`` is below 1.
        MisconfigurationException: in ``setup``: the module optimizes manually or is an ``EstimatedGradient``, takes a
            ``dataloader_iter``, or a forward-only estimator meets several processes.
        TrainingDiverged: at the last of ``max_skipped_in_a_row`` losses.
    """

    def __init__(self, estimator: GradientEstimator | None = None, max_skipped_in_a_row: int = 20) -> None:
        if max_skipped_in_a_row < 1:
            raise ValueError(f"max_skipped_in_a_row must be at least 1, got {max_skipped_in_a_row}")
        self.estimator = ZerothOrder() if estimator is None else estimator
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.estimated_objective: Objective | None = None
        self._module: Callable[[], LightningModule | None] = lambda: None
        self._gradients: Iterable[tuple[nn.Parameter, Tensor]] = ()
        self._before: dict[str, Any] = {}  # what the module object itself had, beside its class
        self._forget(State())

    @property
    def mu_in_use(self) -> float | None:
        """The finite-difference step, or None where the estimator has none."""
        return self.estimator.mu

    @property
    def flops(self) -> float:
        """Floating-point operations of all estimates so far; NaN where they cannot be counted."""
        return self._flops.total

    @property
    def state_key(self) -> str:
        """One estimator per run."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What was learned and spent so far."""
        return {
            "estimator": self.estimator_state.state_dict(),
            "forward_passes": self.forward_passes,
            "flops": self._flops.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.estimator_state.load_state_dict(state_dict["estimator"])
        self.forward_passes, self.skipped_steps = state_dict["forward_passes"], state_dict["skipped_steps"]
        self._flops.load_state_dict(state_dict["flops"])
        self._skipped_in_a_row = state_dict["skipped_in_a_row"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the estimator in the place of the module object's ``training_step`` and ``backward``."""
        if self._module() is not pl_module:
            self._forget(self.estimator.init(pl_module))
            self._module = weakref.ref(pl_module)
        if stage != "fit":
            return
        self._check(trainer, pl_module)
        self._restore(pl_module)  # after a run that was killed
        training_step, backward = pl_module.training_step, pl_module.backward

        @wraps(training_step)  # Lightning reads the signature to know what to pass
        def estimate(*args: Any, **kwargs: Any) -> Any:
            objective = _Step(training_step, pl_module, *args, **kwargs)
            return self._estimate(objective, pl_module, args[0] if args else kwargs)

        @wraps(backward)
        def add(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self._skipped_in_a_row:
                return
            if isinstance(self.estimator, Backprop):
                with self._flops.step(pl_module, None, "backward"):
                    backward(loss, *args, **kwargs)
            else:
                self._add(trainer)

        self._before = {name: vars(pl_module).get(name) for name in ("training_step", "backward")}
        vars(pl_module).update(training_step=estimate, backward=add)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own methods back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own methods back."""
        self._restore(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Log what was spent, whenever the trainer logs."""
        self.estimated_objective = None
        if not logs_now(pl_module):
            return
        metrics = {"budget/forward_passes": float(self.forward_passes), "skipped_steps": float(self.skipped_steps)}
        if math.isfinite(self.flops):
            metrics["budget/flops"] = self.flops
        if self.mu_in_use is not None:
            metrics["mu"] = self.mu_in_use
        pl_module.log_dict(metrics)

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        name, others = type(module).__name__, [c for c in trainer.callbacks if isinstance(c, GradientFree)]  # type: ignore[attr-defined]
        if isinstance(module, EstimatedGradient):
            raise MisconfigurationException(f"{name} has an estimator of its own: set {name}.estimator, no GradientFree")
        if len(others) > 1:
            raise MisconfigurationException(f"one GradientFree trains a module, got {len(others)}")
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"GradientFree drives automatic optimization, and {name} steps its optimizers itself: call "
                "estimator.backward(loss, module, step) there in place of manual_backward"
            )
        if "dataloader_iter" in signature(module.training_step).parameters:
            raise MisconfigurationException(
                f"{name}.training_step takes a dataloader_iter, which cannot be asked twice for one batch: take a batch"
            )
        if trainer.world_size > 1 and not isinstance(self.estimator, Backprop):
            raise MisconfigurationException(
                f"{type(self.estimator).__name__} in GradientFree lets {trainer.world_size} processes drift apart: "
                "use devices=1"
            )

    def _restore(self, module: LightningModule) -> None:
        for name, own in self._before.items():
            del vars(module)[name]
            if own is not None:  # the object had one beside its class's
                vars(module)[name] = own
        self._before, self.estimated_objective, self._gradients = {}, None, ()

    def _forget(self, state: State) -> None:
        self.estimator_state = state
        self.forward_passes = self.skipped_steps = self._skipped_in_a_row = 0
        self._flops = FlopMeter()

    def _estimate(self, objective: "_Step", module: LightningModule, batch: Any) -> Any:
        """What stands in for ``training_step``: the loss, with its graph or with an estimate for ``backward`` to add."""
        self.estimated_objective = objective
        try:
            if isinstance(self.estimator, Backprop):
                self._flops.run(objective.forward, module, batch, "forward")
            else:
                known = objective, module, module.global_step, self.estimator_state
                ask = partial(self.estimator.estimate, *known)
                estimate = self._flops.run(ask, module, batch, repr(self.estimator))
                objective.commit()
                objective.replace_loss(estimate.loss)
                self._gradients = estimate.gradients
        except NoLoss:
            return None
        except NonFiniteLoss as error:
            self._skip(error, module.global_step)
        else:
            self._skipped_in_a_row = 0
        finally:
            self.forward_passes += objective.forward_passes
        return objective.output

    @torch.no_grad()
    def _add(self, trainer: Trainer) -> None:
        """Add the estimate to ``.grad``, scaled as the loss is that Lightning differentiates."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = (1.0 if scaler is None else scaler.get_scale()) / trainer.accumulate_grad_batches
        for p, gradient in self._gradients:
            gradient = gradient if scale == 1 else gradient * scale
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        self._gradients = ()

    def _skip(self, error: NonFiniteLoss, step: int) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.max_skipped_in_a_row:
            raise TrainingDiverged(
                f"{error} for {self._skipped_in_a_row} batches in a row, at step {step}: training stops. "
                "Try a smaller learning rate; checkpoints saved before are intact."
            ) from error


def driver_of(trainer: Trainer, module: LightningModule) -> EstimatedGradient | GradientFree | None:
    """What trains a module by an estimator: itself, or the trainer's callback; None in plain automatic optimization."""
    if isinstance(module, EstimatedGradient):
        return module
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, GradientFree)), None)


class _Step(TrainingStep):
    """The loss of a module in automatic optimization."""

    def forward(self) -> None:
        """Run the step once with its graph, for backpropagation."""
        with self.differentiated():
            self.differentiable()
        self.forward_passes += 3
