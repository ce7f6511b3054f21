"""Exact slopes along random directions, by forward-mode automatic differentiation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from zo_lightning.directions import Directions, Gaussian, mix
from zo_lightning.estimators.base import GradientEstimator, check_samples, estimate, resolve_seed, trainable
from zo_lightning.objective import Objective, check_loss


@dataclass(frozen=True)
class ForwardGradient(GradientEstimator):
    """Directional derivatives without finite differences, ``ĝ = (1/q) Σᵢ (∇f · uᵢ) uᵢ``; no ``mu``, no graph.

    Each direction is one forward pass with dual numbers, counted as two, since it computes values and tangents; every
    operation of the net must support forward-mode differentiation (Baydin et al., *Gradients without
    backpropagation*, 2022).

    Args:
        directions: the distribution of ``u``.
        samples: ``q`` ≥ 1.
        seed: as in ``ZerothOrder``.

    Raises:
        ValueError: ``samples`` < 1.
    """

    directions: Directions = field(default_factory=Gaussian)
    samples: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @torch.no_grad()
    def backward(self, loss: Callable[[], Tensor] | Objective, module: nn.Module, step: int) -> Tensor:
        """Push ``samples`` directions through the loss, and sum them up weighted by their slopes."""
        seed = resolve_seed(self.seed)
        objective = Objective.of(loss, module, seed=mix(seed, step))
        params = trainable(module)
        pushed = _Pushed(objective, module)

        def probes() -> Iterator[tuple[float, float, list[Tensor]]]:
            for index in range(self.samples):
                u = self.directions.sample(params, seed, step, index)
                yield *pushed.slope(dict(zip(map(id, params), u, strict=True))), u

        return estimate(params, probes(), self.samples)


class _Pushed(nn.Module):
    """The loss as a module around the net, so that ``functional_call`` can put dual numbers in the weights' places."""

    def __init__(self, objective: Objective, net: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.net = net

    def forward(self) -> Tensor:
        return self.objective.loss()

    def slope(self, tangents: dict[int, Tensor]) -> tuple[float, float]:
        """The loss and its derivative along ``tangents``, which are keyed by the ``id`` of their weight."""
        with self.objective.probe(), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(p.detach(), tangents[id(p)])
                for name, p in self.named_parameters()
                if id(p) in tangents
            }
            value, tangent = forward_ad.unpack_dual(torch.func.functional_call(self, duals, ()))
            slope = 0.0 if tangent is None else check_loss(tangent)
            return check_loss(value), slope
