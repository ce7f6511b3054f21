"""The search: batches, then mu, then the learning rate."""

import math
from dataclasses import replace
from itertools import count, cycle, islice
from statistics import fmean
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from tqdm.auto import tqdm

from zo_lightning.difference_steps import StepScan
from zo_lightning.estimators import GradientEstimator, ZerothOrder
from zo_lightning.modules.memory import may_be_lean
from zo_lightning.modules.training_step import TrainingStep
from zo_lightning.objective import NonFiniteLoss
from zo_lightning.tuning import rates
from zo_lightning.tuning.rates import Trial
from zo_lightning.tuning.stage import Stage
from zo_lightning.tuning.suggestion import Suggestion

HELD_OUT = 16
"""Training batches that tell how good a trial was; a fifth of all where there are fewer than 80."""
SCANNED = 4
"""Batches on which mu is measured."""
_SLOPES = 8
"""Slopes for each of them, at least."""
_FEWEST = 60
"""Batches of a trial of even the shortest run: fewer tell nothing."""


def tune(
    module: LightningModule,
    data: Any = None,
    trainer: Trainer | None = None,
    *,
    estimator: GradientEstimator | None = None,
    steps: int = 300,
    progress: bool | None = None,
) -> Suggestion:
    """Find the step ``mu`` of finite differences and the learning rate of a module, by measuring both.

    ``mu`` is where slopes at neighbouring steps agree best (``StepScan``), on four batches. Then the learning rate:
    short trainings from the same start on the same batches, along the same directions, ever fewer and longer
    (``tuning.rates.sweep``); what counts is their loss on *training* batches held out. All learning rates of the
    optimizer's groups are multiplied by one factor. Afterwards module, data and random states are as they were.
    Callbacks of trainer and module but ``GradientFree``, and loggers, are left out; the module's hooks are called.

    >>> suggestion = zo.tune(module, datamodule, trainer)                                # doctest: +SKIP
    >>> suggestion.mu, suggestion.lr; suggestion.apply(module)                           # doctest: +SKIP

    Args:
        module: any LightningModule in automatic optimization: with the mixin ``EstimatedGradient``, or as it is.
        data: a data module, or a loader of training batches; None where the module has them itself.
        trainer: whose precision, device, gradient clipping and accumulation are used, whose ``GradientFree`` trains a
            module as it is, and the length of whose run the learning rate is for. It is left alone, as no run of it
            begins. None: a ``Trainer`` with nothing said.
        estimator: trains a module that has none, nor the trainer; None: backpropagation.
        steps: batches of the longest trials; fewer, but 60, where the trainer's run is shorter. All together train on
            eight times as many.
        progress: whether to show a bar; None: on a terminal.

    Raises:
        ValueError: ``steps`` is not a whole number of at least 4; there are no training batches.
        MisconfigurationException: the module steps its optimizers itself, has several or lazy weights; its optimizer
            has no learning rate; or no trial gave a loss.
    """
    if not isinstance(steps, int) or steps < 4:
        raise ValueError(f"steps must be a whole number of at least 4, got {steps}")
    module = getattr(module, "_orig_mod", module)  # of torch.compile, for many trainings too short to pay for it
    stage = Stage(module, data, trainer, estimator)
    with stage.begun():
        return _Search(stage, steps, progress).run()


class _Search:
    """One search: what it has been given, and what it has to say."""

    def __init__(self, stage: Stage, steps: int, progress: bool | None) -> None:
        self.stage, self.steps = stage, steps
        self.hidden = None if progress is None else not progress
        self.warnings: list[str] = []

    def run(self) -> Suggestion:
        stage, estimator = self.stage, self.stage.estimator
        batches = stage.batches(self.steps + HELD_OUT)
        if not batches:
            raise ValueError("there are no training batches to tune on")
        training, held_out = _split(batches)
        if stage.batches_in_run is not None:
            self.steps = min(self.steps, max(_FEWEST, stage.batches_in_run))
        scanned = [] if estimator is None or estimator.mu is None else training[:SCANNED]
        total = len(scanned) + len(held_out) * (rates.TRIALS + 1) + rates.cost(self.steps)
        scan, mu = None, None
        with tqdm(total=total, desc="tune", unit="batch", disable=self.hidden) as bar:
            if scanned:
                assert estimator is not None
                scan = self._scan(estimator, scanned, bar.update)
                estimator, mu = self._with_best(estimator, scan)
            at_start = stage.run(held_out, _ask, told=bar.update)
            start = fmean(at_start) if at_start else math.inf
            size = max(map(abs, at_start), default=math.inf)
            base = stage.rates[0]

            def train(lr: float, steps: int) -> float:
                lot = list(islice(cycle(training), steps))
                losses = stage.run([*lot, *held_out], _ask, steps, lr / base, estimator, bar.update, size)
                return fmean(losses) if losses and all(map(math.isfinite, losses)) else math.inf

            trials = rates.sweep(train, self.steps)
        lr = self._best_rate(trials, start, base)
        return Suggestion(
            mu=mu,
            lr=lr,
            factor=lr / base,
            estimator=estimator,
            scan=scan,
            trials=tuple(trials),
            start=start,
            batches_in_run=stage.batches_in_run,
            warnings=tuple(self.warnings),
            forward_passes=stage.forward_passes,
        )

    def _scan(self, estimator: GradientEstimator, batches: list[Any], told: Any) -> StepScan:
        """Slopes at all steps of the grid, along the same directions, on each of the batches."""
        scan, module, numbers = StepScan(), self.stage.module, count()
        if isinstance(estimator, ZerothOrder):
            estimator = replace(estimator, shaping=None)  # slopes of ranks do not tend to anything

        def look(objective: TrainingStep) -> None:
            slopes = 0
            while slopes < _SLOPES:
                step = next(numbers)
                found = [_slopes(estimator.with_mu(mu), objective, module, step) for mu in scan.grid]
                scan.add(found)
                slopes += max(1 if one is None else len(one) for one in found)

        self.stage.run(batches, look, told=told)
        return scan

    def _with_best(self, estimator: GradientEstimator, scan: StepScan) -> tuple[GradientEstimator, float | None]:
        mu = scan.best
        if mu is None:
            self.warnings.append(
                f"the loss is the same, or infinite, at every mu from {scan.grid[0]:g} to {scan.grid[-1]:g}: "
                f"mu={estimator.mu:g} stays"
            )
            return estimator, estimator.mu
        if not scan.agrees:
            self.warnings.append(
                f"slopes agree at no mu: at {mu:.2g}, the best, half a decade more or less changes them by as much as "
                "they are; the loss is noisy, or constant between jumps"
            )
        return estimator.with_mu(mu), mu

    def _best_rate(self, trials: list[Trial], start: float, base: float) -> float:
        lr = rates.best_of(trials)
        if lr is None:
            raise MisconfigurationException(
                "no trial has a finite loss, with learning rates down to 1e-5: see whether the loss is finite at all"
            )
        longest = [trial.loss for trial in trials if trial.steps == self.steps]
        if min(longest) >= start:
            self.warnings.append(f"no learning rate lowers the loss within {self.steps} batches: {base:.2g} stays")
            return base
        return rates.for_run(lr, self.steps, self.stage.batches_in_run)


def _ask(objective: TrainingStep) -> float:
    return objective()


def _slopes(estimator: GradientEstimator, objective: TrainingStep, module: LightningModule, step: int) -> Tensor | None:
    """The slopes that make an estimate, or where there are no such, the estimate; None where a loss is not finite."""
    lean = estimator.can_be_lean and may_be_lean("auto", module)
    try:
        estimate = estimator.estimate(objective, module, step, estimator.init(module), lean)
    except NonFiniteLoss:
        return None
    if estimate.slopes:
        return torch.tensor(estimate.slopes, dtype=torch.float64)
    return torch.cat([gradient.reshape(-1) for _, gradient in estimate.gradients])


def _split(batches: list[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to train on, and every so many one to be held out: a loader may come in some order."""
    held = min(HELD_OUT, len(batches) // 5)
    if not held:
        return batches, batches
    every = len(batches) // held
    out = set(range(every - 1, every * held, every))
    return [one for k, one in enumerate(batches) if k not in out], [batches[k] for k in sorted(out)]
