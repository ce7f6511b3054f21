"""What stands between Lightning's automatic optimization and an estimator."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from zo_lightning.compiled import untraced
from zo_lightning.costs import FlopMeter
from zo_lightning.estimators import Backprop, GradientEstimator
from zo_lightning.estimators.base import Estimate, step_by_tensor
from zo_lightning.modules.delivery import Deliver, delivering, whole, without_gradient
from zo_lightning.modules.memory import Memory, chooses_lean
from zo_lightning.modules.processes import check_processes, explain_loss, keep_gradients
from zo_lightning.modules.refusals import check_module, check_settings
from zo_lightning.modules.training_step import NeedsGraph, NoLoss, TrainingStep, logs_now
from zo_lightning.modules.watch import Watch
from zo_lightning.objective import NonFiniteLoss, Objective
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights
from zo_lightning.step_log import Step


class TrainingDiverged(RuntimeError):
    """So many losses in a row were NaN or infinite that training on makes no sense."""


class Owner(Protocol):
    """The settings that a ``Driver`` follows; they may change while it trains."""

    estimator: GradientEstimator
    memory: Memory
    mu_follows_lr: bool
    max_skipped_in_a_row: int


class Recorder(Protocol):
    """Keeps what the estimates of a run came to, and may know some already, from before the run was stopped."""

    def recall(self, step: int) -> Step | None:
        """What the next batch's estimate is known to come to, at ``global_step`` ``step``."""

    def estimated(self, estimated: Step) -> None:
        """Keep what a batch's estimate came to."""

    def stepping(self, groups: list[dict[str, Any]]) -> None:
        """Keep the settings with which the optimizer is about to step."""


class Driver:
    """Puts an estimator into Lightning's automatic optimization: ``EstimatedGradient`` has one, and ``GradientFree``.

    ``training_step`` asks the estimator and returns the loss without the net's graph, but such that differentiating it
    gives the estimate, times what Lightning has scaled the loss by. All the rest is Lightning's own.

    Args:
        owner: whose settings it follows.

    Attributes:
        state: what the estimator has learned about the module.
        forward_passes: of a batch, so far; backpropagation counts three per batch.
        skipped_steps: batches so far whose loss was not finite.
        estimated_objective: the loss whose gradient was estimated last, until the end of its batch.
        scale: what Lightning has scaled the latest loss by, for accumulation or in 16-bit precision.
        recorder: told of every estimate, and asked for those that are known; None for none.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.recorder: Recorder | None = None
        self.scale = 1.0
        self.reset(State())

    def reset(self, state: State) -> None:
        """Begin anew, with nothing spent."""
        self.state = state
        self.forward_passes = self.skipped_steps = self._skipped_in_a_row = 0
        self.estimated_objective: Objective | None = None
        self._flops = FlopMeter()
        self._described: tuple[GradientEstimator | None, str] = None, ""
        self._optimizer: torch.optim.Optimizer | None = None  # of the fit for which all is prepared
        self._lean = self._with_graph = False
        self._watch = Watch()
        self._batch: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, of a module that is being trained, takes no part in the run."""
        of_the_run = dict.fromkeys(("recorder", "estimated_objective", "_optimizer", "_batch"))
        return {**vars(self), **of_the_run}

    @property
    def estimator(self) -> GradientEstimator:
        """The owner's."""
        return self.owner.estimator

    @property
    def flops(self) -> float:
        """Floating-point operations spent so far; NaN where they cannot be counted."""
        return self._flops.total

    @property
    def mu_in_use(self) -> float | None:
        """The finite-difference step in use, or None where the estimator has none."""
        mu = self.estimator.mu
        if mu is None or not self.owner.mu_follows_lr or self._optimizer is None:
            return mu
        group = self._optimizer.param_groups[0]
        return mu * max(1e-3, group["lr"] / group["initial_lr"]) if group["initial_lr"] else mu

    def state_dict(self) -> dict[str, Any]:
        """What was learned and spent so far."""
        return {
            "forward_passes": self.forward_passes,
            "flops": self._flops.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "estimator": self.state.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.forward_passes, self.skipped_steps = state["forward_passes"], state["skipped_steps"]
        self._flops.load_state_dict(state["flops"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.state.load_state_dict(state["estimator"])

    def prepare(self, module: LightningModule, training_step: Callable[..., Any]) -> None:
        """Check at the start of ``fit`` that module and trainer suit an estimator, and choose the memory.

        Raises:
            MisconfigurationException: they do not; the message says what to change.
        """
        trainer = module.trainer
        check_settings(self.owner)
        check_module(module, training_step)
        check_processes(trainer, self.estimator)
        explain_loss(trainer)
        if not isinstance(self.estimator, Backprop):
            keep_gradients(trainer)
        if type(self.state) is not type(fresh := self.estimator.init(module)):
            self.state = fresh
        self._lean = chooses_lean(self.owner.memory, trainer, module, self.estimator)
        self._optimizer, self._watch = trainer.optimizers[0], Watch()
        if self.owner.mu_follows_lr:
            for group in self._optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    @untraced
    def training_step(self, ask: Callable[..., Any], module: LightningModule, *args: Any, **kwargs: Any) -> Any:
        """Estimate the gradient of a step's loss; return its output with a loss that hands the estimate to autograd.

        Args:
            ask: the module's own ``training_step``.
            module: whose weights are trained.
            args: of the training step.
            kwargs: of the training step.

        Raises:
            TrainingDiverged: at the last of ``max_skipped_in_a_row`` losses that are not finite.
        """
        if self._optimizer is not module.trainer.optimizers[0]:  # a class of its own ``on_fit_start``
            self.prepare(module, ask)
        estimator, mu = self.estimator, self.mu_in_use
        if mu is not None and mu != estimator.mu:
            estimator = estimator.with_mu(mu)
        if module.trainer.fit_loop._skip_backward:  # StochasticWeightAveraging asks for BatchNorm's statistics alone
            self.forward_passes += 1
            with nullcontext() if estimator.is_exact else torch.no_grad():
                return ask(*args, **kwargs)
        objective = TrainingStep(ask, module, *args, **kwargs)
        objective.with_graph = self._with_graph
        self.estimated_objective, self._batch = objective, args[0] if args else kwargs
        try:
            if self.recorder is None or (output := self._recalled(estimator, objective, module)) is None:
                output = self._estimated(estimator, objective, module)
        except NoLoss:  # which the batch has to say again where a run goes on
            self._record(objective, module.global_step, math.nan, skipped=True, leaves_traces=True)
            return None
        except NeedsGraph as error:
            if self._with_graph:
                raise RuntimeError(
                    f"{type(module).__name__}.training_step differentiates what has no graph under "
                    f"{type(estimator).__name__} ({error.__cause__}): for derivatives by the inputs take ZerothOrder "
                    "or ForwardGradient"
                ) from error
            self._with_graph = True  # for this batch and the later ones
            return self.training_step(ask, module, *args, **kwargs)
        except NonFiniteLoss as error:
            self._record(
                objective, module.global_step, error.value, skipped=True, leaves_traces=objective.leaves_traces
            )
            self._skip(error, module.global_step)
            return objective.with_loss(without_gradient(error.value, module, self.estimator.is_exact))
        finally:
            self.forward_passes += objective.forward_passes
            objective.output = None
        self._skipped_in_a_row = 0
        return output

    def backward(
        self, backward: Callable[..., None], module: LightningModule, loss: Tensor, *args: Any, **kw: Any
    ) -> None:
        """Let a module differentiate, and count that."""
        with self._flops.step(module, self._batch, "backward") if self.estimator.is_exact else nullcontext():
            backward(loss, *args, **kw)

    def optimizer_step(
        self,
        step: Callable[..., None],
        module: LightningModule,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        closure: Callable[[], Any] | None,
    ) -> None:
        """Let a module's optimizer step, and count what the update itself multiplies beside the closure's calls."""
        with ExitStack() as counted:

            def asked() -> Any:
                counted.close()
                result = None if closure is None else closure()
                if self.recorder is not None:
                    self.recorder.stepping(optimizer.param_groups)
                counted.enter_context(self._flops.step(module, self._batch, "update"))
                return result

            step(epoch, batch_idx, optimizer, asked)

    def end_batch(self, module: LightningModule) -> None:
        """Log what was spent, whenever the trainer logs."""
        self.estimated_objective = self._batch = None
        if not logs_now(module):
            return
        metrics = {
            "lr": float(module.trainer.optimizers[0].param_groups[0]["lr"]),
            "budget/forward_passes": float(self.forward_passes),
            "skipped_steps": float(self.skipped_steps),
        }
        if math.isfinite(self.flops):
            metrics["budget/flops"] = self.flops
        if self.mu_in_use is not None:
            metrics["mu"] = self.mu_in_use
        module.log_dict(metrics)

    def _estimated(self, estimator: GradientEstimator, objective: TrainingStep, module: LightningModule) -> Any:
        if isinstance(estimator, Backprop):
            self._flops.run(objective.forward, module, self._batch, "forward")
            return objective.output
        ask = partial(estimator.estimate, objective, module, module.global_step, self.state, self._lean)
        kind = self._description, estimator.phase(self.state)
        estimate = self._flops.run(ask, module, self._batch, *kind)
        self._watch.look(estimator, objective, module, self.state)
        objective.commit()
        if self.recorder is not None:
            loss, traces = float(estimate.loss), objective.leaves_traces
            self._record(objective, module.global_step, loss, estimate.slopes, leaves_traces=traces)
        return self._handed_over(estimate, objective)

    @property
    def _description(self) -> str:
        if self._described[0] is not self.estimator:
            self._described = self.estimator, repr(self.estimator)
        return self._described[1]

    def _recalled(self, estimator: GradientEstimator, objective: TrainingStep, module: LightningModule) -> Any:
        """What ``_estimated`` would return, from what is known of the batch, or None where it has to be asked.

        Steps whose metrics are logged are asked in any case: the curves have no gaps, and what is known is checked.
        """
        assert self.recorder is not None
        known = None if logs_now(module) else self.recorder.recall(module.global_step)
        kind = self._description, estimator.phase(self.state)
        if known is None or known.leaves_traces or not self._flops.repeat(module, self._batch, *kind):
            return None
        objective.forward_passes = known.passes
        if known.skipped:
            raise NonFiniteLoss(known.loss)
        self.recorder.estimated(known)
        weights, step = Weights.of(module), module.global_step
        estimate = estimator.replay(weights, step, known.loss, known.slopes, self.state, self._lean)
        return self._handed_over(estimate, objective)

    def _record(
        self, objective: TrainingStep, step: int, loss: float, slopes: tuple[float, ...] = (), **marks: Any
    ) -> None:
        if self.recorder is not None:
            passes, mu = objective.forward_passes, self.mu_in_use
            self.recorder.estimated(Step(step, loss, slopes, mu=mu, passes=passes, stepped=False, **marks))

    def _handed_over(self, estimate: Estimate, objective: TrainingStep) -> Any:
        if self._lean:
            return objective.with_loss(delivering(estimate.loss, partial(self._step_by_tensor, estimate)))
        deliver, params = whole(estimate)
        return objective.with_loss(delivering(estimate.loss, partial(self._scaled, deliver), params))

    def _scaled(self, deliver: Deliver, scale: float) -> Sequence[Tensor | None]:
        self.scale = scale
        return deliver(scale)

    def _step_by_tensor(self, estimate: Estimate, scale: float) -> list[None]:
        assert scale == 1 and self._optimizer is not None
        step_by_tensor(self._optimizer, estimate)  # the optimizer's own step then finds no gradient
        return [None]

    def _skip(self, error: NonFiniteLoss, step: int) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.owner.max_skipped_in_a_row:
            raise TrainingDiverged(
                f"{error} for {self._skipped_in_a_row} batches in a row, at step {step}: training stops. "
                "Try a smaller learning rate; checkpoints saved before are intact."
            ) from error


def driver_of(trainer: Any, module: LightningModule) -> Driver | None:
    """What trains a module by an estimator: its own driver, or that of a callback; None without an estimator."""
    for owner in (module, *trainer.callbacks):
        if isinstance(driver := vars(owner).get("_driver"), Driver):
            return driver
    return None


def say_if_unused(trainer: Any, module: LightningModule) -> None:
    """Warn where a module has an estimator that nothing asks, so that it is trained by backpropagation."""
    if isinstance(getattr(module, "estimator", None), GradientEstimator) and driver_of(trainer, module) is None:
        name = type(module).__name__
        rank_zero_warn(
            f"{name}.estimator is not used, and {name} is trained by backpropagation: write class ZONet("
            f"EstimatedGradient, {name}), or give the trainer the callback GradientFree(module.estimator)"
        )
