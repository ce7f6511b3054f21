"""How well an estimate points along the true gradient, and what theory and rounding allow."""

import math
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from zo_lightning.modules.driver import driver_of, say_if_unused
from zo_lightning.callbacks.reporting import log_scalars, say_once
from zo_lightning.callbacks.weight_snapshots import check_at_least_1
from zo_lightning.costs import uncounted
from zo_lightning.estimators import Backprop, GradientEstimator
from zo_lightning.measures import (
    WHOLE,
    Tensors,
    cosine,
    gradient_spread,
    loss_noise,
    norm,
    norm_ratio,
    true_gradient,
)
from zo_lightning.objective import NonFiniteLoss, Objective
from zo_lightning.perturbed.state import State
from zo_lightning.stencils import Stencil

_KINDS = ("cosine", "norm_ratio", "expected_cosine")


class GradientAlignment(Callback):
    """Every n steps, the true gradient of the batch, by backpropagation, beside the estimate that is about to be used.

    Logs ``vs_true_gradient/cosine/<name>`` and ``vs_true_gradient/norm_ratio/<name>`` (‖ĝ‖ / ‖g‖), per weight and for ``all``; the
    cosine that theory predicts, ``vs_true_gradient/expected_cosine/<name>`` (``measures.expected_cosine``); and for finite
    differences ``vs_true_gradient/noise_floor``, the ``mu`` at which rounding errors of the loss make slopes as large as the
    true ones, and ``vs_true_gradient/slope_snr``, how far ``mu`` is above it. The rounding errors are measured
    (``measures.loss_noise``), the slopes are ``‖g‖`` for a direction of the whole batch and the root mean square of
    those of the step for one per example. ``mu`` below the floor is warned of.

    Each time costs a forward and a backward pass, and seven forward passes for the rounding errors: their seconds so
    far are ``vs_true_gradient/seconds``. Training is not affected: weights are bit-identical with and without. Where ``.grad``
    is the true gradient already (automatic optimization, ``Backprop``) it is 1 by construction and nothing is asked
    again. A loss whose gradient cannot be had is said once.

    Args:
        every_n_steps: optimizer steps from one time to the next, beginning at step 0.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 200) -> None:
        check_at_least_1(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.seconds = 0.0
        self._impossible = False

    @property
    def state_key(self) -> str:
        """By the interval, since several instances are plausible."""
        return self._generate_state_key(every_n_steps=self.every_n_steps)

    def state_dict(self) -> dict[str, Any]:
        """What it has cost so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A loss that had no gradient in another run may have one in this."""
        self._impossible = False
        if stage == "fit":
            say_if_unused(trainer, pl_module)

    @uncounted()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare, while ``.grad`` holds the estimate."""
        if self._impossible or trainer.global_step % self.every_n_steps:
            return
        began = time.perf_counter()
        estimate = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        if not estimate:  # a skipped step
            return
        driver = driver_of(trainer, pl_module)
        objective = driver and driver.estimated_objective
        estimator = driver.estimator if driver else Backprop()
        if objective is None or estimator.is_exact:
            values = {f"{kind}/{name}": 1.0 for kind in _KINDS for name in (*estimate, WHOLE)}
        else:
            try:
                gradient = true_gradient(objective, pl_module)
            except NonFiniteLoss:  # the estimate avoided the point itself
                return
            except (ValueError, RuntimeError) as error:  # no gradient, an operation without one, or no memory for it
                say_once(f"GradientAlignment does nothing: {error}")
                self._impossible = True
                return
            values = _measured(pl_module, driver, objective, estimate, gradient)
        self.seconds += time.perf_counter() - began
        log_scalars(
            trainer, {f"vs_true_gradient/{tag}": value for tag, value in values.items()} | {"vs_true_gradient/seconds": self.seconds}
        )


def _measured(
    module: LightningModule, driver: Any, objective: Objective, estimate: Tensors, gradient: Tensors
) -> dict[str, float]:
    estimator: GradientEstimator = driver.estimator
    gradient = {name: gradient[name] for name in estimate}
    if estimator.needs_example_losses:
        d, share = _perturbed(driver.state, gradient)
        expected = estimator.expected_cosine(d, share, len(objective.seen[-1]), _spread(objective, module))
    else:
        expected = estimator.expected_cosine(sum(g.numel() for g in gradient.values()))
    values = _aligned(estimate, gradient, estimator)
    if not math.isnan(expected):
        values[f"expected_cosine/{WHOLE}"] = expected
    if estimator.mu is not None:
        values |= _finite_difference(module, driver, objective, norm(gradient)[WHOLE])
    return values


def _finite_difference(
    module: LightningModule, driver: Any, objective: Objective, gradient_norm: float
) -> dict[str, float]:
    """The ``mu`` below which rounding errors outweigh the slopes, and how far the present one is above it."""
    mu, estimator, stencil = driver.mu_in_use, driver.estimator, driver.estimator.stencil
    by_example = estimator.needs_example_losses
    slope = _slope_by_example(objective, stencil, mu, estimator.samples) if by_example else gradient_norm
    loss = objective.per_example if by_example else objective.loss
    noise = loss_noise(loss, module, min(1e-5, mu / 100), objective.seed)
    floor = noise * math.sqrt(sum(w * w for w in stencil.coefficients)) / slope if slope else math.nan
    if mu < floor:
        say_once(
            f"GradientAlignment: mu={mu:g} is below the noise floor of the finite difference, {floor:.2g} at step "
            f"{module.global_step}: most of what the slopes say is rounding error. Try mu={10 * floor:.0e}"
        )
    return {"noise_floor": floor, "slope_snr": mu / floor if floor else math.inf}


def _aligned(estimate: Tensors, gradient: Tensors, estimator: GradientEstimator) -> dict[str, float]:
    values = {f"cosine/{name}": value for name, value in cosine(estimate, gradient).items()}
    values |= {f"norm_ratio/{name}": value for name, value in norm_ratio(estimate, gradient).items()}
    if not estimator.needs_example_losses:  # whose layers share noise in ways of their own
        norms = norm(gradient)
        for name, g in gradient.items():
            share = (norms[name] / norms[WHOLE]) ** 2 if norms[WHOLE] else math.nan
            expected = estimator.expected_cosine(g.numel(), share)
            if not math.isnan(expected):
                values[f"expected_cosine/{name}"] = expected
    return values


def _perturbed(state: State, gradient: Tensors) -> tuple[float, float]:
    """How many numbers a noise of one example has, and the share of ``‖g‖²`` in the layers that get noise.

    The one that makes the net's output gets none where its gradient is measured.
    """
    known: Any = state
    dimensions = sum(layer.dims for key, layer in known.layers.items() if key != known.last) or 1.0
    squares = {name: value**2 for name, value in norm(gradient).items()}
    layer = (known.last or "").rpartition(".")[0]
    exact = sum(square for name, square in squares.items() if layer and name.rpartition(".")[0] == layer)
    return dimensions, 1 - exact / squares[WHOLE] if squares[WHOLE] else math.nan


def _spread(objective: Objective, module: LightningModule) -> float:
    try:
        return gradient_spread(objective.per_example, module, objective.seed)
    except ValueError:  # training_step detaches the losses of the examples: the best case
        return 1.0


def _slope_by_example(objective: Objective, stencil: Stencil, mu: float, samples: int) -> float:
    """The root mean square of the slopes of the step's last passes."""
    points = len(stencil.offsets)
    losses = torch.stack(objective.seen[-samples * points :]).unflatten(0, (-1, points))
    weights = losses.new_tensor(stencil.coefficients)
    return float((losses.movedim(1, -1) @ weights / mu).square().mean().sqrt())
