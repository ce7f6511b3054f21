"""Any LightningModule, trained by a gradient estimator."""

import inspect
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningModule
from torch import Tensor

from zo_lightning.estimators import GradientEstimator, ZerothOrder
from zo_lightning.modules.driven import Driven
from zo_lightning.modules.driver import Driver
from zo_lightning.modules.memory import Memory
from zo_lightning.modules.processes import check_samplers
from zo_lightning.modules.refusals import expect_one_optimizer

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule as _Module
else:
    # A plain class, so that it also mixes into modules of the `lightning` package, whose base class is another one.
    _Module = object


class EstimatedGradient(Driven, _Module):
    """Mixin that trains a LightningModule, unchanged, by a gradient estimator in place of backpropagation.

    Write it first among the bases and set ``estimator``: ``class ZONet(EstimatedGradient, LitNet): estimator = ...``.
    The estimator asks the module's own ``training_step`` for its loss as often as it likes. The first forward pass of a
    step counts as the step's own: what it logs, what it adds to torchmetrics and to BatchNorm's statistics stays. The
    others leave no trace.

    All else is Lightning's automatic optimization: optimizer and LR schedulers, ``accumulate_grad_batches`` (the
    batches of one optimizer step share its directions), ``gradient_clip_val``, precision, all hooks in their order,
    callbacks and checkpoints. With ``Backprop`` the weights equal those without the mixin, bit for bit.

    A batch whose loss is NaN or infinite adds nothing to ``.grad``: weights and optimizer stay as they are, and the
    next step draws a direction of its own. It counts in ``global_step``, as one that Lightning skips in 16-bit
    precision does.

    Attributes:
        estimator: fills ``.grad``.
        memory: ``"lean"`` lets the optimizer step one weight after the other, each as soon as its estimate is there, so
            that training takes the memory of inference; the weights are the same, bit for bit. ``"full"`` keeps the
            whole of ``.grad``, which is faster: directions are drawn once, not at each use. ``"auto"`` is lean from
            2²⁴ weights on, where nothing needs ``.grad`` as a whole (accumulation, clipping, ``NormalizedSGD``, a hook
            between ``backward`` and the optimizer's step) and the estimator has a lean form.
        mu_follows_lr: scale the stencil's ``mu`` by the ratio of the learning rate to its start, down to a thousandth:
            a schedule that halves one then halves both.
        max_skipped_in_a_row: skipped batches in a row after which training stops.

    Raises:
        TrainingDiverged: in ``training_step``, at the last of ``max_skipped_in_a_row`` skipped batches.
        MisconfigurationException: at the start of ``fit``: the module has several optimizers, steps them itself or
            takes a ``dataloader_iter``; or several processes meet a strategy or an estimator that does not suit them.
    """

    estimator: GradientEstimator = ZerothOrder()
    memory: Memory = "auto"
    mu_follows_lr: bool = False
    max_skipped_in_a_row: int = 20

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._driver = Driver(self)
        self._level: int | None = None  # of the training_step that runs, among those of the classes

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
        """The loss of the underlying ``training_step``, whose gradient is estimated."""
        # A class's own training_step calls that of its bases; a validation_step may call it for the loss.
        if self._level is not None or not self.trainer.training:
            return self._underlying_step(*args, **kwargs)
        return self._driver.training_step(self._underlying_step, self, *args[: self._step_arity])

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate, and count that."""
        self._driver.backward(super().backward, self, loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Let the optimizer step, and count that."""
        self._driver.optimizer_step(super().optimizer_step, self, epoch, batch_idx, optimizer, optimizer_closure)

    def setup(self, stage: str) -> None:
        """Refuse several optimizers as soon as they are made."""
        super().setup(stage)
        if stage == "fit":
            expect_one_optimizer(self)

    def on_fit_start(self) -> None:
        """Check that the trainer's settings suit an estimator."""
        super().on_fit_start()
        self._driver.prepare(self, self._steps[0])

    def on_train_start(self) -> None:
        """Check that the data suit processes that split the directions."""
        super().on_train_start()
        check_samplers(self.trainer, self.estimator)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Log what was spent, whenever the trainer logs."""
        super().on_train_batch_end(*args, **kwargs)
        self._driver.end_batch(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what was spent so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["estimated_gradient"] = self._driver.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what was spent so far; a checkpoint from before the mixin has nothing of it."""
        super().on_load_checkpoint(checkpoint)
        self._driver.reset(self.estimator.init(self))
        if saved := checkpoint.get("estimated_gradient"):
            self._driver.load_state_dict(saved)

    def _underlying_step(self, *args: Any, **kwargs: Any) -> Any:
        """The ``training_step`` that there would be without the mixin; within one, that of the bases."""
        level, steps, attributes = self._level or 0, self._steps, vars(self)  # a module's own setter is slow
        attributes["_level"] = level + 1
        try:
            return steps[min(level, len(steps) - 1)](*args, **kwargs)  # the last one may call itself
        finally:
            attributes["_level"] = level or None

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
