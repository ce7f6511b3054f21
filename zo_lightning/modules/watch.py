"""What a run shows by itself of finite differences that find nothing: said once, with what would help."""

from collections.abc import Callable

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from zo_lightning.difference_steps import StepScan
from zo_lightning.estimators import GradientEstimator, ZerothOrder
from zo_lightning.estimators.base import resolve_seed
from zo_lightning.objective import NonFiniteLoss, Objective
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights

_PATIENCE = 10
"""Batches in a row that must look alike before anything is said."""
_DIRECTIONS = 8
_DROWNED = 0.5
"""The mean square by which slopes change with a doubled ``mu``, as a share of theirs, from which they say nothing."""
_CLEAR = 0.3
"""The error of slopes up to which another ``mu`` is named."""
_HALF = torch.bfloat16, torch.float16


class Watch:
    """Looks at the losses that an estimator was given, and warns where no difference of them can tell anything.

    Three things are seen: all losses of a batch's probes are equal, ten batches in a row; so are, for an estimator with
    a slope per example, the losses of most examples, weighted by the losses, in the first ten batches; and in half
    precision, at the first batch, slopes along eight directions change by more than 70 % when ``mu`` is doubled, which
    takes 32 forward passes that are not counted, and 208 more where they do, for a ``mu`` that would do (``StepScan``).
    """

    def __init__(self) -> None:
        self._batches = 0
        self._equal = 0
        self._silent = False

    def look(self, estimator: GradientEstimator, objective: Objective, module: LightningModule, state: State) -> None:
        """Look at what an estimate of the present batch has asked for, before the objective is committed."""
        if self._silent or estimator.mu is None:
            return
        self._batches += 1
        if estimator.needs_example_losses:
            self._silent = self._batches >= _PATIENCE
            equal = _share_of_equal(objective.seen) > 0.5
        else:
            equal = len(objective.values) > 1 and len(set(objective.values)) == 1
        self._equal = self._equal + 1 if equal else 0
        if self._equal == _PATIENCE:
            self._say(_flat(estimator))
        elif self._batches == 1 and isinstance(estimator, ZerothOrder) and _is_half(module):
            self._rounding(estimator, objective, module, state)

    def _rounding(self, estimator: ZerothOrder, objective: Objective, module: LightningModule, state: State) -> None:
        """Compare slopes at ``mu`` and at twice that; where they differ by far, measure which ``mu`` would do."""
        before = objective.forward_passes
        weights, seed, mu = Weights.of(module), resolve_seed(estimator.seed), estimator.mu
        directions = [
            estimator.directions.draw(weights, seed, module.global_step, index, weights.still)
            for index in range(_DIRECTIONS)
        ]

        def slopes(mu: float) -> Tensor:
            differences = [
                state.loss_along(objective, weights, u, mu) - state.loss_along(objective, weights, u, -mu)
                for u in directions
            ]
            return torch.tensor(differences, dtype=torch.float64) / (2 * mu)

        scan: StepScan | None = None
        try:
            with objective.guard():
                change = _change(slopes(mu), slopes(2 * mu))
                if change > _DROWNED:
                    scan = StepScan()
                    scan.add(_finite(slopes, step) for step in scan.grid)
        except NonFiniteLoss:  # as far away as that
            return
        finally:
            objective.forward_passes = before
        if scan is None:
            return
        would_do = scan.best if min(scan.errors) <= _CLEAR else None
        self._say(
            f"mu={mu:g} drowns in the rounding of precision {module.trainer.precision}: doubled, it changes "
            f"the slopes of the loss by {change**0.5:.0%} (root mean square, {_DIRECTIONS} directions). "
            + (f"Take mu={would_do:g}, or" if would_do else f"No mu up to {scan.grid[-2]:g} would do: take")
            + " precision='32-true'"
        )

    def _say(self, message: str) -> None:
        self._silent = True
        rank_zero_warn(message)


def _flat(estimator: GradientEstimator) -> str:
    if estimator.needs_example_losses:
        return (
            f"most examples have equal losses in all passes of a step, mu={estimator.mu:g}, for {_PATIENCE} batches in "
            f"a row: {type(estimator).__name__} learns nothing from losses that are constant piece by piece, such as 0 "
            "and 1, or rounded to few digits. Return smooth losses in float32, or take ZerothOrder, whose loss is the "
            "batch's mean, with a larger mu"
        )
    return (
        f"all losses of a step are equal, at each point that mu={estimator.mu:g} reaches, for {_PATIENCE} batches in a "
        "row: there is no slope to follow. Take a larger mu, as for a metric that is constant between its jumps, or a "
        "smoother loss"
    )


def _share_of_equal(seen: list[Tensor]) -> float:
    """The share of the examples whose losses are equal in all passes, weighted by them: a loss of 0 needs no slope."""
    losses = torch.stack(seen)
    weight = losses.abs().mean(0, dtype=torch.float32)
    return float(weight[(losses == losses[0]).all(0)].sum() / weight.sum())


def _finite(slopes: Callable[[float], Tensor], mu: float) -> Tensor | None:
    try:
        return slopes(mu)
    except NonFiniteLoss:
        return None


def _change(slopes: Tensor, doubled: Tensor) -> float:
    """How much slopes change with ``mu``, as a share of their squares; 1 where there are none."""
    norm = float(doubled.square().sum())
    return float((slopes - doubled).square().sum()) / norm if norm else 1.0


def _is_half(module: LightningModule) -> bool:
    return torch.is_autocast_enabled(module.device.type) or any(
        p.dtype in _HALF for p in module.parameters() if p.requires_grad
    )
