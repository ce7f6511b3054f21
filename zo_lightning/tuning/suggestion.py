"""What tuning has found: two numbers, where they come from, and a picture."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning.callbacks.gradient_free import GradientFree
from zo_lightning.difference_steps import StepScan
from zo_lightning.estimators import GradientEstimator
from zo_lightning.modules import EstimatedGradient
from zo_lightning.tuning.rates import Trial

_ATTRIBUTES = ("lr", "learning_rate")


@dataclass(frozen=True)
class Suggestion:
    """The step of finite differences and the learning rate for a module, data and trainer.

    Attributes:
        mu: the finite-difference step; None where the estimator has none.
        lr: the learning rate of the optimizer's first group.
        factor: what all groups' learning rates are to be multiplied by, which makes the first one ``lr``.
        estimator: with ``mu``; None where Lightning differentiates.
        scan: of ``mu``: the relative error of slopes at each step of a grid.
        trials: the short trainings.
        start: the loss on the batches held out before any training.
        batches_in_run: that the trainer's run has, which ``lr`` is for; None where it is for a run as short as the
            trials.
        warnings: what is doubtful.
        forward_passes: of a batch that tuning took; three for a batch of backpropagation.
    """

    mu: float | None
    lr: float
    factor: float
    estimator: GradientEstimator | None
    scan: StepScan | None
    trials: tuple[Trial, ...]
    start: float
    batches_in_run: int | None
    warnings: tuple[str, ...]
    forward_passes: int

    def apply(self, module: LightningModule, trainer: Trainer | None = None) -> None:
        """Set ``mu`` and the learning rate: the module's estimator, or that of the trainer's ``GradientFree``.

        The learning rate is that of ``module.optimizer``, where that makes the optimizer, as a ``Classifier``'s does,
        or the attribute ``lr`` or ``learning_rate`` of the module or its ``hparams``, as with Lightning's ``lr_find``.

        Raises:
            MisconfigurationException: the module has none of these; nothing has been set.
        """
        owner = module if any(isinstance(getattr(module, name, None), int | float) for name in _ATTRIBUTES) else None
        owner = owner or (module.hparams if any(name in module.hparams for name in _ATTRIBUTES) else None)
        makes: Any = getattr(module, "optimizer", None)
        if callable(makes):
            module.optimizer = _scaled(makes, self.factor)  # type: ignore[assignment]
        elif owner is not None:
            name = next(name for name in _ATTRIBUTES if hasattr(owner, name))
            setattr(owner, name, getattr(owner, name) * self.factor)
        else:
            raise MisconfigurationException(
                f"{type(module).__name__} has neither lr nor learning_rate: multiply the learning rates in "
                f"configure_optimizers by {self.factor:g}, which makes the first one {self.lr:g}"
            )
        if self.estimator is None:
            return
        if isinstance(module, EstimatedGradient):
            module.estimator = self.estimator
        for callback in getattr(trainer, "callbacks", ()):
            if isinstance(callback, GradientFree):
                callback.estimator = self.estimator

    def plot(self) -> Any:
        """A matplotlib ``Figure``: the error of slopes over ``mu``, and the losses of the trials over their rates."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4) if self.scan else (4.5, 3.4), layout="constrained")
        axes: Any = figure.subplots(1, 2 if self.scan else 1, squeeze=False)[0]
        if self.scan is not None:
            left = axes[0]
            left.loglog(self.scan.grid, [e if math.isfinite(e) else math.nan for e in self.scan.errors], "o-")
            left.set(
                xlabel="mu", ylabel="relative error of slopes", title="mu", xlim=(self.scan.grid[0], self.scan.grid[-1])
            )
            if self.mu is not None:
                left.axvline(self.mu, color="0.2", label=f"taken: {self.mu:.2g}")
                left.legend()
        right = axes[-1]
        for steps in sorted({trial.steps for trial in self.trials}):
            shown = sorted((t.lr, t.loss) for t in self.trials if t.steps == steps and t.loss < 3 * abs(self.start) + 1)
            right.semilogx(*zip(*shown, strict=True), "o-", label=f"{steps} batches") if shown else None
        right.axhline(self.start, color="0.6", linestyle=":", label="before")
        right.axvline(
            self.lr, color="0.2", label=f"for the run: {self.lr:.2g}" if self.batches_in_run else f"{self.lr:.2g}"
        )
        right.set(xlabel="learning rate", ylabel="loss on batches held out", title="learning rate")
        right.legend(fontsize="small")
        return figure


def _scaled(makes: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """Makes the same optimizer, with all its learning rates multiplied."""

    def optimizer(*args: Any, **kwargs: Any) -> Any:
        made = makes(*args, **kwargs)
        for group in made.param_groups:
            group["lr"] *= factor
        return made

    return optimizer
