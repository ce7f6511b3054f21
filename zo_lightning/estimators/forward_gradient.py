"""Exact slopes along random directions, by forward-mode automatic differentiation."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_lightning.counter import mix
from zo_lightning.directions import Direction, Directions, Gaussian
from zo_lightning.distributed import Distributed
from zo_lightning.estimators.base import Estimate, check_samples, resolve_seed, trained
from zo_lightning.estimators.weight_space import Probe, WeightSpace
from zo_lightning.objective import Objective, check_loss
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import DisplacedWeights, Recent, Weights


@dataclass(frozen=True)
class ForwardGradient(WeightSpace):
    """Directional derivatives without finite differences, ``ĝ = (1/q) Σᵢ (∇f · uᵢ) uᵢ``; no ``mu``, no graph.

    Each direction is one forward pass in which every use of a weight sees a dual number, counted as two, since it
    computes values and tangents (Baydin et al., *Gradients without backpropagation*, 2022). Every operation of the net
    must support forward-mode differentiation; attention is computed by its plain formula, which does.

    Args:
        directions: the distribution of ``u``.
        samples: ``q`` ≥ 1.
        seed: as in ``ZerothOrder``.
        distributed: as in ``ZerothOrder``.

    Raises:
        ValueError: ``samples`` < 1; in ``backward``, also where no tangent reaches the loss, as through TorchScript
            or NumPy.
    """

    directions: Directions = field(default_factory=Gaussian)
    samples: int = 1
    seed: int | None = None
    distributed: Distributed = field(default_factory=Distributed)

    def __post_init__(self) -> None:
        check_samples(self.samples)

    def estimate(
        self, objective: Objective, module: nn.Module, step: int, state: State, lean: bool = False
    ) -> Estimate:
        """Push ``samples`` directions through the loss, and sum them up weighted by their slopes."""
        objective.begin(mix(resolve_seed(self.seed), step))
        weights = trained(objective, module)
        scripted = [m for m in module.modules() if isinstance(m, torch.jit.ScriptModule)]
        if any(p.requires_grad for m in scripted for p in m.parameters()):
            raise ValueError("ForwardGradient cannot see through TorchScript: freeze its weights, or take ZerothOrder")

        def probes(directions: Iterator[Direction]) -> Iterator[Probe]:
            for direction in directions:
                yield direction, *_pushed(objective, weights, direction)

        return self.estimate_along(objective, weights, step, state, lean, probes)


def _pushed(objective: Objective, weights: Weights, direction: Direction) -> tuple[float, float]:
    """The loss, and its derivative along a direction."""

    def dual(position: int) -> Tensor:
        u = direction[position] if direction.held is None else direction.held[position]
        return forward_ad.make_dual(weights[position].detach(), u)

    watched = DisplacedWeights(weights, Recent(weights, dual), before_write=objective.before_write)
    with objective.probe(cost=2), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        try:
            with watched:
                loss = objective.loss()
        except NotImplementedError as error:
            if "forward AD" not in str(error):
                raise
            raise NotImplementedError(
                f"{str(error).splitlines()[0]} Take ZerothOrder: it needs values alone."
            ) from error
        value = check_loss(loss)
        tangent = forward_ad.unpack_dual(loss).tangent if isinstance(loss, Tensor) else None
        if tangent is None:
            raise ValueError(
                "no tangent reaches the loss: it does not depend on the weights, or something on the way (TorchScript, "
                "NumPy, .item()) drops it; ZerothOrder needs values alone"
            )
        return value, check_loss(tangent)
