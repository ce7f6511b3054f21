"""Short trainings of a module, by the trainer's own settings, each from the same start."""

import logging
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import LambdaLR

from zo_lightning.callbacks.gradient_free import GradientFree
from zo_lightning.estimators import GradientEstimator
from zo_lightning.modules import EstimatedGradient, TrainingDiverged
from zo_lightning.modules.driver import Driver
from zo_lightning.modules.refusals import is_pair_of_lists
from zo_lightning.tuning.as_found import AsFound, OptimizerAsFound
from zo_lightning.tuning.turns import Batches, Collect, Look, Turn


class Stage:
    """Trains a module again and again from where it is, and leaves it, its data and all random states as found.

    Args:
        module: any LightningModule in automatic optimization.
        data: a data module or a loader of training batches; None where the module has them itself.
        like: whose precision, device, gradient clipping and accumulation are used, and whose ``GradientFree``; it is
            left alone.
        estimator: for a module without one of its own; None: that of ``like``, or backpropagation.

    Attributes:
        estimator: that trains the module, or None where Lightning differentiates.
        forward_passes: of a batch, so far; three for a batch of backpropagation.
        rates: the learning rates of the optimizer's groups, as the module makes it; known after the first run.
        batches_in_run: optimizer steps that ``like`` would take times the batches of each; None where nobody knows.
    """

    def __init__(
        self,
        module: LightningModule,
        data: Any = None,
        like: Trainer | None = None,
        estimator: GradientEstimator | None = None,
    ) -> None:
        self.module, self.data, self.like = module, data, like
        callbacks = (*getattr(like, "callbacks", ()), *_brought(module, like))
        given = next((one for one in callbacks if isinstance(one, GradientFree)), None)
        self._settings = {name: getattr(given, name) for name in ("memory", "mu_follows_lr") if given is not None}
        self._own = isinstance(module, EstimatedGradient)
        if self._own and estimator is not None:
            name = type(module).__name__
            raise MisconfigurationException(f"{name} has an estimator of its own: set {name}.estimator")
        if not module.automatic_optimization:
            raise MisconfigurationException(f"{type(module).__name__} steps its optimizers itself: it cannot be tuned")
        own: Any = module.estimator if self._own else None
        self.estimator: GradientEstimator | None = own or estimator or getattr(given, "estimator", None)
        self.forward_passes = 0
        self.rates: list[float] = []
        self.batches_in_run: int | None = None
        self._optimizer: OptimizerAsFound | None = None
        for one in (*module.parameters(), *module.buffers()):
            if torch.nn.parameter.is_lazy(one):
                raise MisconfigurationException(
                    f"{type(module).__name__} has weights without a shape: pass a batch through it first"
                )
        self._found = AsFound(module, data) if data is not None else AsFound(module)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Put everything back at the end, also after an error or Ctrl-C."""
        handler = signal.getsignal(signal.SIGINT)
        try:
            yield
        finally:
            self._found.restore()
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)  # Lightning ignores it after the first

    def batches(self, count: int) -> list[Any]:
        """The first training batches, as the loader gives them."""
        collect = Collect(count)
        limit: Any = None if self.like is None else self.like.limit_train_batches
        self._fit([collect], None, limit_train_batches=limit)
        self.batches_in_run = _batches_in_run(self.like, collect.in_epoch)
        return collect.batches

    def run(
        self,
        batches: Sequence[Any],
        look: Look,
        steps: int = 0,
        factor: float = 1.0,
        estimator: GradientEstimator | None = None,
        told: Callable[[], Any] = lambda: None,
        start: float = math.inf,
    ) -> list[float]:
        """Train on the first batches, and look at the losses of the others; a run that diverges is looked at no more.

        Args:
            batches: for training, then to be looked at.
            look: at each of these.
            steps: batches to train on; the learning rates fall linearly to 0 over them where the module has a schedule,
                and stay where it has none.
            factor: all learning rates are multiplied by.
            estimator: in the place of the module's; None leaves that.
            told: called after each batch.
            start: the size of the losses before training: where five batches have five times that, it diverges.

        Returns:
            What the looks gave; nothing where training diverged.
        """
        turn = Turn(look, steps, told, start)
        try:
            self._fit([turn], Batches(batches), (steps, factor), estimator or self.estimator)
        except TrainingDiverged:
            return []
        return turn.seen

    def _fit(
        self,
        callbacks: list[Callback],
        batches: "Batches | None",
        schedule: tuple[int, float] = (0, 1.0),
        estimator: GradientEstimator | None = None,
        limit_train_batches: int | float | None = None,
    ) -> None:
        """One ``Trainer.fit``, of batches where they are given, from the start that was found."""
        module, data = self.module, self.data
        self._found.restore()
        for p in module.parameters():
            p.grad = None
        self._schedule(*schedule)
        vars(module)["configure_callbacks"] = list  # they would write files, or wait for a validation
        ask = module._underlying_step if isinstance(module, EstimatedGradient) else module.training_step
        arity = module._step_arity if isinstance(module, EstimatedGradient) else None
        turns = [callback for callback in callbacks if isinstance(callback, Turn)]
        for turn in turns:
            turn.ask, turn.arity = ask, arity
        driver = None
        if isinstance(module, EstimatedGradient):
            vars(module)["_driver"] = driver = Driver(module)
            if estimator is not None:
                module.estimator = estimator
        elif estimator is not None:
            free = GradientFree(estimator, **self._settings)
            callbacks, driver = [free, *callbacks], free._driver
        loaders: dict[str, Any] = {"train_dataloaders": data if batches is None else batches}
        if isinstance(data, LightningDataModule):
            loaders = {"datamodule": data}
            if batches is not None:  # they are the data by now; the data module's hooks stay
                vars(data).update(train_dataloader=lambda: batches, prepare_data=_nothing, setup=_nothing)
                vars(data)["teardown"] = _nothing
        try:
            with _quiet():
                self._trainer(callbacks, limit_train_batches).fit(module, **loaders)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from stop
            raise
        finally:
            self._put_optimizer_back()
            self.forward_passes += sum(turn.looked for turn in turns)
            self.forward_passes += driver.forward_passes if driver else 3 * sum(turn.trained for turn in turns)

    def _trainer(self, callbacks: list[Callback], limit_train_batches: int | float | None) -> Trainer:
        options: dict[str, Any] = {"devices": 1}
        if (like := self.like) is not None:
            device = like.strategy.root_device
            kind = {"cuda": "gpu"}.get(device.type, device.type)
            options |= {
                "precision": like.precision,
                "accelerator": kind,
                "devices": [device.index or 0] if kind == "gpu" else 1,
                "accumulate_grad_batches": like.accumulate_grad_batches,
                "gradient_clip_val": like.gradient_clip_val,
                "gradient_clip_algorithm": like.gradient_clip_algorithm,
            }
        return Trainer(
            **options,
            max_epochs=1,
            limit_train_batches=limit_train_batches,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=DummyLogger(),  # a module may write to its own
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=0,
            use_distributed_sampler=False,
        )

    def _schedule(self, steps: int, factor: float) -> None:
        """Let the module's optimizer begin with its learning rates times a factor; a schedule becomes a fall to 0."""
        module, own = self.module, self.module.configure_optimizers
        updates = max(1, steps // (1 if self.like is None else self.like.accumulate_grad_batches))

        def configure_optimizers() -> Any:
            optimizer, falls = _made(own(), type(module).__name__)
            self._optimizer = OptimizerAsFound(optimizer)
            self.rates = [_rate(group) for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                group.pop("initial_lr", None)
                group["lr"] = rate * factor
            fall = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / updates) if falls else 1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": fall, "interval": "step"}}

        vars(module)["configure_optimizers"] = configure_optimizers

    def _put_optimizer_back(self) -> None:
        if self._optimizer is not None:
            self._optimizer.restore()
            self._optimizer = None


def _made(configured: Any, name: str) -> tuple[torch.optim.Optimizer, bool]:
    """The one optimizer in what ``configure_optimizers`` returned, and whether its learning rate has a schedule.

    Raises:
        MisconfigurationException: there is none, or there are several.
    """
    given, schedules = configured if is_pair_of_lists(configured) else (configured, [])
    if isinstance(given, list | tuple):
        if len(given) > 1:
            raise MisconfigurationException(f"{name}.configure_optimizers gave {len(given)} optimizers: tune takes one")
        given = next(iter(given), None)
    if isinstance(given, dict):
        given, schedules = given["optimizer"], given.get("lr_scheduler")
    if not isinstance(given, torch.optim.Optimizer):
        raise MisconfigurationException(f"{name}.configure_optimizers gave no optimizer: nothing would be trained")
    return given, bool(schedules)


def _rate(group: dict[str, Any]) -> float:
    """The learning rate that a group's schedule starts from, or rises to."""
    rate = group.get("max_lr", group.get("initial_lr", group.get("lr")))
    if rate is None or not float(rate) > 0:
        raise MisconfigurationException(f"the optimizer's learning rate is {rate}: tune needs one above 0 to scale")
    return float(rate)


def _batches_in_run(like: Trainer | None, in_epoch: float) -> int | None:
    if like is None:
        return None
    epochs = like.max_epochs if like.max_epochs is not None and like.max_epochs >= 0 else math.inf
    accumulated = like.accumulate_grad_batches
    steps = like.max_steps * accumulated if like.max_steps >= 0 else math.inf
    whole = min(epochs * in_epoch if epochs else 0, steps)
    return int(whole) if math.isfinite(whole) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """No word of Lightning's about the many short runs."""
    log = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _brought(module: LightningModule, like: Trainer | None) -> Sequence[Callback]:
    """The callbacks that a module brings to a trainer."""
    before, module._trainer = module._trainer, like
    try:
        brought = module.configure_callbacks()
    finally:
        module._trainer = before
    return [brought] if isinstance(brought, Callback) else brought


def _nothing(*_: Any, **__: Any) -> None:
    pass
