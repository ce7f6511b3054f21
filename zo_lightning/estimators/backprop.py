"""First order: the gradient itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zo_lightning.estimators.base import GradientEstimator, trainable
from zo_lightning.objective import Objective


@dataclass(frozen=True)
class Backprop(GradientEstimator):
    """Backpropagation: ``ĝ = ∇f(x)``, the estimator with zero variance.

    A step counts as three forward passes, since the backward pass costs about two.
    """

    def backward(self, loss: Callable[[], Tensor] | Objective, module: nn.Module, step: int) -> Tensor:
        """Run the loss once with its graph, and backpropagate; ``step`` is not needed."""
        objective = Objective.of(loss, module, seed=0)
        for p in trainable(module):
            p.grad = None
        with torch.enable_grad():
            value = objective.differentiable()
            objective.backpropagate(value)
        objective.forward_passes += 3
        return value.detach()
