"""One forward pass in which every use of a weight sees many tensors in its place, by ``torch.func.vmap``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_lightning.objective import Objective, as_tensor, check_loss
from zo_lightning.perturbed.weights import DisplacedWeights, Weights

Displaced = Tensor | list[Tensor]
"""What uses of a weight see, or the factors ``A`` [m, r] and ``B`` [n, r] of ``A Bᵀ`` that it is displaced along."""

_OF_VMAP = ("vmap", "functorch", "batching rule", "data pointer", "storage")


class CannotBatch(ValueError):
    """A loss that ``torch.func.vmap`` cannot evaluate at many points at once."""

    def __init__(self, why: str) -> None:
        super().__init__(f"Batched cannot evaluate this loss at many points at once: {why}. Take OneByOne()")


def losses_at(objective: Objective, weights: Weights, seen: Sequence[Displaced], distances: Tensor) -> list[float]:
    """The losses of one pass at many points; buffers are each point's own, random numbers the same.

    Args:
        objective: to be asked.
        weights: whose uses are displaced.
        seen: for each weight, what its uses see, all with a dimension of points in front.
        distances: [points], of those that are displaced by factors.

    Raises:
        CannotBatch: the loss does what ``vmap`` does not allow, such as ``.item()`` or a branch on a value.
        NonFiniteLoss: a loss is NaN or infinite.
    """
    count = len(distances)
    buffers = list({id(b): b for b in objective.module.buffers()}.values())
    own = [b.unsqueeze(0).expand(count, *b.shape).clone() for b in buffers]

    def loss(seen: list[Displaced], distance: Tensor, own: list[Tensor]) -> Tensor:
        with _Pass([*weights, *buffers], [*seen, *own], distance, objective.before_write):
            value = objective.loss()
        if not isinstance(value, Tensor):
            raise CannotBatch(f"it is a {type(as_tensor(value)).__name__} that no tensor of PyTorch leads to")
        return value.detach().mean()

    # The fast kernels of attention have no rule for vmap: it would run them one by one.
    with objective.probe(cost=count), sdpa_kernel(SDPBackend.MATH):
        try:
            losses = torch.func.vmap(loss, randomness="same")(list(seen), distances, own)
        except RuntimeError as error:
            if any(word in str(error) for word in _OF_VMAP):
                raise CannotBatch(str(error).strip().split(". ")[0].rstrip(".")) from error
            raise
        return [check_loss(one) for one in losses.tolist()]


class _Pass(DisplacedWeights):
    """Context of a forward pass at one of many points, within ``vmap``; products with low-rank matrices stay factors.

    Instead of ``x (W + μ A Bᵀ)ᵀ`` a linear layer computes ``x Wᵀ + μ (x B) Aᵀ``: one product with ``W`` for all points
    (EGGROLL, Sarkar et al., *Evolution strategies at the hyperscale*, 2025).
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        seen: Sequence[Displaced],
        distance: Tensor,
        before_write: Callable[[Tensor], None],
    ) -> None:
        def value(position: int) -> Tensor:  # no method, which would refer to the pass that refers to it
            displaced = seen[position]
            return displaced if isinstance(displaced, Tensor) else _formed(tensors[position], displaced, distance)

        super().__init__(tensors, value, (), before_write)
        self.displaced, self.distance = seen, distance

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function on displaced weights."""
        x, weight, *rest = args if func is F.linear and len(args) > 1 else (torch.empty(0), None)
        position = self.positions.get(id(weight))
        factors = None if position is None else self.displaced[position]
        if position is None or not isinstance(factors, list):
            return super().run(func, args, kwargs)
        self.seen.add(position)
        a, b = factors
        bias = self._displaced(rest[0] if rest else kwargs.get("bias"))
        return F.linear(x, self.weights[position].detach(), bias) + (x @ b) @ (a * self.distance).to(a.dtype).T


def _formed(weight: Tensor, factors: list[Tensor], distance: Tensor) -> Tensor:
    a, b = factors
    return weight.detach() + ((a * distance).to(a.dtype) @ b.T).view(weight.shape)
