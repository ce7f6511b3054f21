"""First order: the gradient itself."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zo_lightning.estimators.base import Estimate, GradientEstimator, Loss
from zo_lightning.objective import Objective
from zo_lightning.parameters import Parameters
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights


@dataclass(frozen=True)
class Backprop(GradientEstimator):
    """Backpropagation: ``ĝ = ∇f(x)``, the estimator with zero variance.

    A step counts as three forward passes, since the backward pass costs about two. Buffers and random states move on as
    in ``loss.backward()``; where the loss or its derivative raises, buffers and PyTorch's random state are as before.
    """

    is_exact = True

    def estimate(
        self, objective: Objective, module: nn.Module, step: int, state: State, lean: bool = False
    ) -> Estimate:
        """Run the loss once with its graph, and differentiate it; ``step`` and ``state`` are not needed."""
        weights = Weights.of(module)
        with objective.differentiated():
            loss = objective.differentiable()
            gradients = torch.autograd.grad(loss, weights.params, allow_unused=True)
        objective.forward_passes += 3
        used = [(p, g) for p, g in zip(weights, gradients, strict=True) if g is not None]
        return Estimate(loss.detach(), used)

    def backward(self, loss: Loss | Objective, module: Parameters, step: int, state: State | None = None) -> Tensor:
        """Run the loss once with its graph, and backpropagate."""
        objective = Objective.of(loss, module)
        with objective.differentiated():
            value = objective.differentiable()
            value.backward()
        objective.forward_passes += 3
        return value.detach()
