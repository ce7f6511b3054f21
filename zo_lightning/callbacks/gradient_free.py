"""Anybody's LightningModule object, trained by a gradient estimator without touching its class."""

import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning.estimators import GradientEstimator, ZerothOrder
from zo_lightning.modules import EstimatedGradient
from zo_lightning.modules.driven import Driven
from zo_lightning.modules.driver import Driver
from zo_lightning.modules.memory import Memory
from zo_lightning.modules.processes import check_samplers
from zo_lightning.modules.refusals import expect_one_optimizer

_REPLACED = "training_step", "backward", "optimizer_step"


class GradientFree(Driven, Callback):
    """Trains an unmodified LightningModule, in automatic optimization, by a gradient estimator.

    ``Trainer(callbacks=[GradientFree(ZerothOrder(samples=16))])``. During ``fit`` the module object's ``training_step``
    asks the estimator, which runs the module's own ``training_step`` as often as it likes; afterwards it is what it was.
    All else is Lightning's automatic optimization, as with the mixin ``EstimatedGradient``, which gives the same
    weights: ``accumulate_grad_batches`` (the batches of one optimizer step share its directions),
    ``gradient_clip_val``, precision, LR schedulers, all hooks. With ``Backprop`` the weights equal those without the
    callback, bit for bit.

    The first forward pass of a step counts as the step's own: what it logs, what it adds to torchmetrics and to
    BatchNorm's statistics stays. The others leave no trace. Where the loss is NaN or infinite, its batch adds nothing to
    ``.grad``. ``budget/forward_passes``, ``budget/flops``, ``skipped_steps``, ``lr`` and ``mu`` are logged whenever the
    trainer logs.

    Args:
        estimator: fills ``.grad``.
        max_skipped_in_a_row: losses in a row that are not finite after which training stops.
        memory: as in ``EstimatedGradient``: ``"auto"``, ``"lean"`` or ``"full"``.
        mu_follows_lr: as in ``EstimatedGradient``.

    Raises:
        ValueError: ``max_skipped_in_a_row`` is below 1.
        MisconfigurationException: at the start of ``fit``: the module is an ``EstimatedGradient``, there are two of
            these callbacks, or for a reason that ``EstimatedGradient`` has too.
        TrainingDiverged: at the last of ``max_skipped_in_a_row`` losses.
    """

    def __init__(
        self,
        estimator: GradientEstimator | None = None,
        max_skipped_in_a_row: int = 20,
        memory: Memory = "auto",
        mu_follows_lr: bool = False,
    ) -> None:
        if max_skipped_in_a_row < 1:
            raise ValueError(f"max_skipped_in_a_row must be at least 1, got {max_skipped_in_a_row}")
        self.estimator = ZerothOrder() if estimator is None else estimator
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.memory: Memory = memory
        self.mu_follows_lr = mu_follows_lr
        self._driver = Driver(self)
        self._module: Callable[[], LightningModule | None] = lambda: None
        self._own_step: Callable[..., Any] | None = None
        self._before: dict[str, Any] = {}  # what the module object itself had, beside its class

    @property
    def state_key(self) -> str:
        """One estimator per run."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What was learned and spent so far."""
        return self._driver.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self._driver.load_state_dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the estimator in the place of the module object's ``training_step``, and count what else costs."""
        if self._module() is not pl_module:
            self._driver.reset(self.estimator.init(pl_module))
            self._module = weakref.ref(pl_module)
        if stage != "fit":
            return
        name, others = type(pl_module).__name__, [c for c in trainer.callbacks if isinstance(c, GradientFree)]  # type: ignore[attr-defined]
        if isinstance(pl_module, EstimatedGradient):
            raise MisconfigurationException(
                f"{name} has an estimator of its own: set {name}.estimator, no GradientFree"
            )
        if len(others) > 1:
            raise MisconfigurationException(f"one GradientFree trains a module, got {len(others)}")
        self._restore(pl_module)  # after a run that was killed
        expect_one_optimizer(pl_module)
        self._before = {name: vars(pl_module).get(name) for name in _REPLACED}
        self._own_step = pl_module.training_step
        for method in _REPLACED:
            own = getattr(pl_module, method)  # Lightning reads its signature to know what to pass
            vars(pl_module)[method] = wraps(own)(partial(getattr(self._driver, method), own, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that module and trainer suit an estimator."""
        assert self._own_step is not None
        self._driver.prepare(pl_module, self._own_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the data suit processes that split the directions."""
        check_samplers(trainer, self.estimator)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Log what was spent, whenever the trainer logs."""
        self._driver.end_batch(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own methods back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own methods back."""
        self._restore(pl_module)

    def _restore(self, module: LightningModule) -> None:
        for name, own in self._before.items():
            del vars(module)[name]
            if own is not None:  # the object had one beside its class's
                vars(module)[name] = own
        self._before, self._own_step = {}, None
        self._driver.estimated_objective = None
