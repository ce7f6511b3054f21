"""What larger weights of a layer do to the net's output, and the part of the gradient that follows from it."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zo_lightning.estimators.per_example.feedback import Shrinkage
from zo_lightning.estimators.per_example.output import LARGEST, Output, returned_by
from zo_lightning.objective import Objective
from zo_lightning.perturbed.weights import DisplacedWeights

if TYPE_CHECKING:
    from zo_lightning.estimators.per_example.noise import Seen

_STEP = 2.0**-4  # of the size of the weights: outputs of half precision show it


class Sizes:
    """The derivative of the loss along the weights ``p`` of each layer, which is not left to ``h``.

    ``h`` errs a little in every direction, and along the weights themselves that adds up: step after step they grow,
    all outputs with them, until the few wrong examples are all of the loss. What the net's output ``y`` [B, C] does
    when the weights of a layer are larger, ``ẏᵢ = dyᵢ / d log‖p‖``, is measured by a central difference of two passes,
    and fitted by ``ẏᵢ ≈ β yᵢ + a``. With the gradient ``e`` [B, C] of the mean loss by the output,

    ``<p, g> = Σᵢ <eᵢ, ẏᵢ> ≈ β Σᵢ <eᵢ, yᵢ> + <a, Σᵢ eᵢ>``

    is then known in every step. In a net of ReLUs without biases ``β = 1`` and ``a = 0`` for every layer, by Euler's
    theorem on homogeneous functions; before a normalisation both are 0.

    Attributes:
        lines: by the key of a layer's first use, ``β``, and ``a`` [C] if there are few outputs and several examples.
        left: layers that are still to be measured.
    """

    def __init__(self) -> None:
        self.lines: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.left = 0

    def measure(
        self, objective: Objective, module: nn.Module, output: Output, y: Tensor, layers: "Sequence[Seen]", step: int
    ) -> None:
        """Measure a layer that is new; or, in one step in ``Shrinkage.EVERY``, the one whose turn it is."""
        new = [layer for layer in layers if layer.key not in self.lines]
        self.left = max(0, len(new) - 1)
        due = new[:1]
        if not new and layers and step % Shrinkage.EVERY == 0:
            due = [layers[step // Shrinkage.EVERY % len(layers)]]
        for layer in due:
            ends = [_output_at(1 + offset, layer, objective, module, output, len(y)) for offset in (_STEP, -_STEP)]
            self.lines[layer.key] = _line(_finite(y), _finite((ends[0] - ends[1]).to(y.dtype) / (2 * _STEP)))

    def correct(
        self,
        layers: "Sequence[Seen]",
        shares: Sequence[float],
        grads: dict[nn.Parameter, Tensor],
        y: Tensor,
        error: Tensor,
    ) -> None:
        """Bring gradients a share of the way to the known ``<p, g>`` of each layer, by a multiple of ``p``."""
        along, total = (_finite(y) * error).sum(), error.sum(0)
        for layer, share in zip(layers, shares, strict=True):
            if layer.key in self.lines:
                slope, shift = self.lines[layer.key]
                derivative = slope.to(y.device) * along  # a checkpoint's were loaded to the CPU
                if shift is not None and shift.shape == total.shape:
                    derivative = derivative + shift.to(y.device) @ total
                _set_along(layer.use.operation.weights, grads, derivative, share)

    def state_dict(self) -> dict[str, Any]:
        """The lines."""
        lines = {key: [None if t is None else t.clone() for t in line] for key, line in self.lines.items()}
        return {"lines": lines, "left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.lines = {key: (b.clone(), None if a is None else a.clone()) for key, (b, a) in state["lines"].items()}
        self.left = state["left"]


def predicted(layers: "Sequence[Seen]", without: Collection[int]) -> list[int]:
    """Positions of one use of all weights whose gradient was predicted, in all of their uses.

    Args:
        layers: the uses of a sample; what makes the net's output has no noise, and an exact gradient.
        without: ids of weights to leave out.
    """
    unknown = {id(w) for layer in layers if layer.h is None for w in layer.use.operation.weights}.union(without)
    found: dict[tuple[int, ...], int] = {}
    for position, layer in enumerate(layers):
        weights = tuple(map(id, layer.use.operation.weights))
        if layer.delta is not None and unknown.isdisjoint(weights):
            found.setdefault(weights, position)
    return list(found.values())


def _line(y: Tensor, moved: Tensor) -> tuple[Tensor, Tensor | None]:
    """``β`` and ``a`` of the line by least squares, over all outputs of all examples."""
    if len(y) == 1 or y.shape[1] > LARGEST:
        return (y * moved).sum() / y.square().sum().clamp_min(torch.finfo(y.dtype).tiny), None
    around = y - y.mean(0)
    slope = (around * moved).sum() / around.square().sum().clamp_min(torch.finfo(y.dtype).tiny)
    return slope, moved.mean(0) - slope * y.mean(0)


def _set_along(
    weights: Sequence[nn.Parameter], grads: dict[nn.Parameter, Tensor], derivative: Tensor, share: float
) -> None:
    """Bring ``<p, g>`` a share of the way to a derivative."""
    pairs = [(p, p.detach().to(derivative.dtype), grads[p]) for p in weights]
    along = torch.stack([(w * grad).sum() for _, w, grad in pairs]).sum()
    square = torch.stack([w.square().sum() for _, w, _ in pairs]).sum()
    size = share * (derivative - along) / square.clamp_min(torch.finfo(square.dtype).tiny)
    for p, w, grad in pairs:
        grads[p] = grad + (w * size).to(grad.dtype)


def _output_at(
    factor: float, layer: "Seen", objective: Objective, module: nn.Module, output: Output, examples: int
) -> Tensor:
    """The net's output [B, C] with the weights of a layer that much larger."""
    weights = layer.use.operation.weights
    larger = [w.detach() * factor for w in weights]
    within = DisplacedWeights(weights, larger.__getitem__, (), objective.before_write)
    with returned_by(module, output) as returned:
        objective.ask(objective.per_example, within)
    return output.read(returned, examples)


def _finite(y: Tensor) -> Tensor:
    return y.nan_to_num(0.0, 0.0, 0.0)  # an output may be −inf for good, such as a masked choice
