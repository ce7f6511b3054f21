"""Any LightningModule, trained by a gradient estimator."""

import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zo_lightning.costs import FlopMeter
from zo_lightning.estimators import GradientEstimator, ZerothOrder
from zo_lightning.estimators.base import step_by_tensor
from zo_lightning.modules.processes import check_processes, check_samplers, share_buffers, splits_data
from zo_lightning.modules.schedulers import SteppedSchedulers
from zo_lightning.modules.training_step import NoLoss, TrainingStep, logs_now
from zo_lightning.objective import NonFiniteLoss, Objective
from zo_lightning.optim import is_separable
from zo_lightning.perturbed.state import State

_LARGE = 2**24
"""Weights from which on memory counts for more than the time to draw directions again."""


class TrainingDiverged(RuntimeError):
    """So many losses in a row were NaN or infinite that training on makes no sense."""


class EstimatedGradient(SteppedSchedulers):
    """Mixin that trains a LightningModule, unchanged, by a gradient estimator instead of automatic optimization.

    Write it first among the bases and set ``estimator``: ``class ZONet(EstimatedGradient, LitNet): estimator = ...``.
    The estimator asks the module's own ``training_step`` for its loss as often as it likes. The first forward pass of a
    step counts as the step's own: what it logs, what it adds to torchmetrics and to BatchNorm's statistics stays. The
    others leave no trace. Optimizer, LR schedulers (by step, epoch or plateau), ``global_step``, ``max_steps``,
    checkpoints and callbacks work as in automatic optimization, and with ``Backprop`` so do the weights, bit for bit.

    A step whose loss is NaN or infinite is skipped: weights and optimizer stay as they are, and the next step draws a
    direction of its own. It counts in ``global_step``, as one that Lightning skips in 16-bit precision does.

    Attributes:
        estimator: fills ``.grad``.
        estimator_state: what the estimator has learned about this module; saved with checkpoints.
        memory: ``"lean"`` lets the optimizer step one weight after the other, each as soon as its estimate is there, so
            that training takes the memory of inference; the weights are the same, bit for bit. ``"full"`` keeps the
            whole of ``.grad``, which is faster: directions are drawn once, not at each use. ``"auto"`` is lean from
            2²⁴ weights on, where nothing needs ``.grad`` as a whole (``gradient_clip_val``, ``NormalizedSGD``,
            hooks before the optimizer's step) and the estimator has a lean form.
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
        MisconfigurationException: at the start of ``fit``: several optimizers, 16-bit mixed precision, or
            several processes and a strategy or an estimator that does not suit them.
    """

    estimator: GradientEstimator = ZerothOrder()
    gradient_clip_val: float | None = None
    mu_follows_lr: bool = False
    max_skipped_in_a_row: int = 20
    memory: Literal["auto", "lean", "full"] = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.forward_passes = 0
        self.skipped_steps = 0
        self._flops = FlopMeter()
        self._described: tuple[GradientEstimator | None, str] = None, ""
        self.estimated_objective: Objective | None = None
        self.estimator_state = State()
        self._lean = False
        self._level: int | None = None  # of the training_step that runs, among those of the classes
        self._skipped_in_a_row = 0

    @property
    def flops(self) -> float:
        """Floating-point operations spent so far; NaN where they cannot be counted."""
        return self._flops.total

    @property
    def mu_in_use(self) -> float | None:
        """The finite-difference step in use, or None where the estimator has none."""
        mu = self.estimator.mu
        if mu is None or not self.mu_follows_lr:
            return mu
        try:
            group = self.trainer.optimizers[0].param_groups[0]
        except RuntimeError:  # no trainer yet
            return mu
        return mu * max(1e-3, group["lr"] / group["initial_lr"])

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a class's own ``training_step`` be the loss that is estimated, as that of its bases is.

        Raises:
            TypeError: a base before the mixin has a ``training_step``, which would be trained by backpropagation.
        """
        super().__init_subclass__(**kwargs)
        if "training_step" in vars(cls):
            cls._own_step = cls.training_step  # type: ignore[attr-defined]
            del cls.training_step
        if cls.training_step is not EstimatedGradient.training_step:
            others = ", ".join(base.__name__ for base in cls.__bases__ if base is not EstimatedGradient)
            raise TypeError(
                f"{cls.__name__} would be trained without its estimator: write EstimatedGradient first, "
                f"class {cls.__name__}(EstimatedGradient, {others})"
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Estimate the gradient of the underlying ``training_step``'s loss, and let the optimizer step."""
        # A class's own training_step calls that of its bases; a validation_step may call it for the loss.
        if self._level is not None or not self.trainer.training:
            return self._underlying_step(*args, **kwargs)
        batch, batch_idx = args
        objective = TrainingStep(self._underlying_step, self, *args[: self._step_arity])
        optimizer: Any = self.optimizers()
        self.estimated_objective = objective
        try:
            with ExitStack() as counted:  # what the update itself multiplies, between and after the closure's calls

                def closure() -> Tensor:
                    counted.close()
                    loss = self._estimate(objective, optimizer, batch)
                    counted.enter_context(self._flops.step(self, batch, "update"))
                    return loss

                optimizer.step(closure=closure)
        finally:
            self.estimated_objective = None
        self.forward_passes += objective.forward_passes
        self._step_schedulers(batch_idx)
        if logs_now(self):
            self._log_estimator()
        return objective.output

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
        check_processes(self.trainer, self.estimator)
        share_buffers(self.trainer)
        if type(self.estimator_state) is not type(fresh := self.estimator.init(self)):
            self.estimator_state = fresh
        self._lean = self._chooses_lean()
        if self.mu_follows_lr:
            for group in self.trainer.optimizers[0].param_groups:
                group.setdefault("initial_lr", group["lr"])

    def on_train_start(self) -> None:
        """Check that the data suit processes that split the directions."""
        super().on_train_start()
        check_samplers(self.trainer, self.estimator)

    @property
    def splits_data(self) -> bool:
        """Whether each of several processes must be given a batch of its own."""
        return splits_data(self.estimator)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what was spent so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["estimated_gradient"] = {
            "forward_passes": self.forward_passes,
            "flops": self._flops.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "estimator": self.estimator_state.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what was spent so far; a checkpoint from before the mixin has nothing of it."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("estimated_gradient", {})
        self.forward_passes = saved.get("forward_passes", 0)
        self._flops.load_state_dict(saved.get("flops", FlopMeter().state_dict()))
        self.skipped_steps = saved.get("skipped_steps", 0)
        self._skipped_in_a_row = saved.get("skipped_in_a_row", 0)
        self.estimator_state = self.estimator.init(self)
        if saved:
            self.estimator_state.load_state_dict(saved["estimator"])

    def _underlying_step(self, *args: Any, **kwargs: Any) -> Any:
        """The ``training_step`` that there would be without the mixin; within one, that of the bases."""
        level, steps = self._level or 0, self._steps
        self._level = level + 1
        try:
            return steps[min(level, len(steps) - 1)](*args, **kwargs)  # the last one may call itself
        finally:
            self._level = level or None

    @property
    def _steps(self) -> list[Callable[..., Any]]:
        """The underlying ``training_step`` of each class that has one of its own, and last that of the other bases."""
        own = [partial(vars(c)["_own_step"], self) for c in type(self).__mro__ if "_own_step" in vars(c)]
        of_bases = super().training_step
        is_default = of_bases.__func__ is LightningModule.training_step
        return own if own and is_default else [*own, of_bases]

    @cached_property
    def _step_arity(self) -> int:
        """How many of (batch, batch_idx) the underlying ``training_step`` takes."""
        parameters = inspect.signature(self._steps[0]).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return 2
        return min(2, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters))

    def _estimate(self, objective: "TrainingStep", optimizer: Any, batch: Any) -> Tensor:
        """What the optimizer's closure does: fill ``.grad``, or step by each tensor of it; returns the loss."""
        estimator = self.estimator if self.mu_in_use is None else self.estimator.with_mu(self.mu_in_use)
        if self._described[0] is not self.estimator:
            self._described = self.estimator, repr(self.estimator)
        optimizer.zero_grad()
        known = self, self.global_step, self.estimator_state
        try:
            if self._lean:
                with torch.no_grad():
                    lean = partial(estimator.estimate, objective, *known, lean=True)
                    estimate = self._flops.run(lean, self, batch, self._described[1])
                objective.commit()
                step_by_tensor(optimizer.optimizer, estimate)  # the optimizer's own step then finds no gradient
                loss = estimate.loss
            else:
                ordinary = partial(estimator.backward, objective, *known)
                loss = self._flops.run(ordinary, self, batch, self._described[1])
                objective.commit()
                if self.gradient_clip_val is not None:
                    clip: Any = self.clip_gradients
                    clip(optimizer, gradient_clip_val=self.gradient_clip_val, gradient_clip_algorithm="norm")
        except NonFiniteLoss as error:
            self._skip(error)
            return torch.tensor(error.value)
        except NoLoss:
            objective.output = None
            return torch.zeros(())
        self._skipped_in_a_row = 0
        objective.replace_loss(loss)
        return loss

    def _skip(self, error: NonFiniteLoss) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.max_skipped_in_a_row:
            raise TrainingDiverged(
                f"{error} for {self._skipped_in_a_row} steps in a row, at step {self.global_step}: training stops. "
                "Try a smaller learning rate; checkpoints saved before are intact."
            ) from error

    def _chooses_lean(self) -> bool:
        """Whether the optimizer steps by each tensor; what stands against it is an error where that was asked for."""
        if self.memory not in ("auto", "lean", "full"):
            raise MisconfigurationException(f"memory must be 'auto', 'lean' or 'full', got {self.memory!r}")
        if self.memory == "full":
            return False
        trainer: Any = self.trainer
        optimizer = trainer.optimizers[0]
        hooks = [type(c).__name__ for c in trainer.callbacks if _overrides(c, "on_before_optimizer_step", Callback)]
        if _overrides(self, "on_before_optimizer_step", LightningModule):
            hooks.append(type(self).__name__)
        against = [
            reason
            for stands, reason in (
                (not self.estimator.can_be_lean, f"{type(self.estimator).__name__} has no lean form"),
                (self.gradient_clip_val is not None, "gradient_clip_val needs the norm of the whole gradient"),
                (
                    not is_separable(optimizer),
                    f"{type(optimizer).__name__} is not known to update each weight by its own gradient alone",
                ),
                (bool(hooks), f"on_before_optimizer_step of {', '.join(hooks)} may ask for the whole gradient"),
            )
            if stands
        ]
        if self.memory == "auto":
            return not against and sum(p.numel() for p in self.parameters() if p.requires_grad) >= _LARGE
        if against:
            raise MisconfigurationException(f"memory='lean': {'; '.join(against)}. Take memory='full'")
        return True

    def _log_estimator(self) -> None:
        metrics = {
            "lr": float(self.trainer.optimizers[0].param_groups[0]["lr"]),
            "budget/forward_passes": float(self.forward_passes),
            "skipped_steps": float(self.skipped_steps),
        }
        if math.isfinite(self.flops):
            metrics["budget/flops"] = self.flops
        if self.mu_in_use is not None:
            metrics["mu"] = self.mu_in_use
        self.log_dict(metrics)


def _overrides(obj: Any, name: str, base: type) -> bool:
    return getattr(getattr(obj, name), "__func__", None) is not getattr(base, name)
