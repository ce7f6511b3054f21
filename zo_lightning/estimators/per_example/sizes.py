"""What larger weights of a layer do to the net's output, and the part of the gradient that follows from it."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_lightning.estimators.per_example.feedback import Shrinkage
from zo_lightning.estimators.per_example.output import LARGEST, Output, returned_by
from zo_lightning.objective import Objective
from zo_lightning.perturbed.rules import Operation, count
from zo_lightning.perturbed.weights import DisplacedWeights

if TYPE_CHECKING:
    from zo_lightning.estimators.per_example.noise import Seen

_STEP = 2.0**-4  # of the size of the weights: outputs of half precision show it


class Line(NamedTuple):
    """``ẏᵢ ≈ β yᵢ + a`` of a layer, as measured at weights of some size.

    Attributes:
        slope: ``β``; NaN where nothing could be measured.
        shift: ``a`` [C]; None where there are many outputs, or one example.
        square: ``‖p‖²`` then.
    """

    slope: Tensor
    shift: Tensor | None
    square: Tensor

    def to(self, device: torch.device) -> "Line":
        """The same there."""
        shift = None if self.shift is None else self.shift.to(device)
        return Line(self.slope.to(device), shift, self.square.to(device))


class Sizes:
    """The derivative of the loss along the weights ``p`` of each layer, which is not left to ``h``.

    ``h`` errs a little in every direction, and along the weights themselves that adds up: step after step they grow,
    all outputs with them, until the few wrong examples are all of the loss. What the net's output ``y`` [B, C] does
    when the weights of a layer are larger, ``ẏᵢ = dyᵢ / d log‖p‖``, is measured by a central difference of two passes,
    and fitted by ``ẏᵢ ≈ β yᵢ + a``. With the gradient ``e`` [B, C] of the mean loss by the output,

    ``<p, g> = Σᵢ <eᵢ, ẏᵢ> ≈ β Σᵢ <eᵢ, yᵢ> + <a, Σᵢ eᵢ>``

    is then known in every step, as long as the weights' norm stays within a factor of 2. In a net of ReLUs without
    biases ``β = 1`` and ``a = 0`` for every layer, by Euler's theorem on homogeneous functions; before a normalisation
    both are 0. Layers of fewer than ``LEAST`` numbers, such as single gains, are left to ``h``: there is little else
    than the direction along them.

    Attributes:
        lines: by the key of a layer's first use, the one that was measured longest ago first.
        left: layers that are still to be measured.
    """

    LEAST = 16

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.left = 0

    def measure(
        self,
        objective: Objective,
        module: nn.Module,
        output: Output,
        error: Tensor,
        layers: "Sequence[Seen]",
        step: int,
    ) -> None:
        """Measure a layer that is new, from the step after it came; or the oldest, a step in ``Shrinkage.EVERY``."""
        by_key = {layer.key: layer for layer in layers if count(layer.use.operation.weights) >= self.LEAST}
        new = [key for key in by_key if key not in self.lines]
        due = new[:1] if self.left else []
        if not new and step % Shrinkage.EVERY == 0:
            due = [key for key in self.lines if key in by_key][:1]
        self.left = len(new) - len(due) if new else 0
        for key in due:
            self.lines.pop(key, None)  # it is the youngest now
            self.lines[key] = _measured(by_key[key], objective, module, output, error)

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
            line = self.lines.get(layer.key)
            if line is None:
                continue
            if line.slope.device != y.device:  # a checkpoint's were loaded to the CPU
                line = self.lines[layer.key] = line.to(y.device)
            if line.shift is not None and line.shift.shape != total.shape:
                del self.lines[layer.key]  # the net gives other outputs now
                continue
            derivative = line.slope * along
            if line.shift is not None:
                derivative = derivative + line.shift @ total
            _set_along(layer.use.operation, grads, derivative, share, line.square)

    def state_dict(self) -> dict[str, Any]:
        """The lines."""
        lines = {key: [None if t is None else t.clone() for t in line] for key, line in self.lines.items()}
        return {"lines": lines, "left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        lines = state["lines"].items()
        self.lines = {key: Line(b.clone(), None if a is None else a.clone(), s.clone()) for key, (b, a, s) in lines}
        self.left = state["left"]


def predicted(layers: "Sequence[Seen]", without: Collection[int]) -> list[int]:
    """Positions of one use of all weights whose gradient was predicted, in all of their uses.

    Args:
        layers: the uses of a sample; what makes the net's output has no noise, and an exact gradient.
        without: ids of weights to leave out.
    """
    unknown = {id(w) for layer in layers if layer.h is None for w in layer.use.operation.weights}.union(without)
    found = []
    for position, layer in enumerate(layers):
        weights = set(map(id, layer.use.operation.weights))
        if layer.delta is not None and unknown.isdisjoint(weights):
            found.append(position)
            unknown |= weights
    return found


def _measured(layer: "Seen", objective: Objective, module: nn.Module, output: Output, error: Tensor) -> Line:
    """The line of a layer, by least squares over the outputs that the loss depends on."""
    square = torch.stack([w.detach().to(error.dtype).square().sum() for w in layer.use.operation.weights]).sum()
    unknown = Line(torch.full_like(square, torch.nan), None, square)
    try:
        ends = [_output_at(1 + offset, layer, objective, module, output, len(error)) for offset in (_STEP, -_STEP)]
    except (ValueError, ArithmeticError, IndexError, torch.linalg.LinAlgError):  # a loss that these outputs do not suit
        return unknown
    if any(end.shape != error.shape for end in ends):
        return unknown
    larger, smaller = (end.to(error.dtype) for end in ends)
    y, moved = (larger + smaller) / 2, (larger - smaller) / (2 * _STEP)
    seen = ((error != 0) & y.isfinite() & moved.isfinite()).to(error.dtype)
    y, moved = _finite(y) * seen, _finite(moved) * seen
    products, squares = (y * moved).sum(), y.square().sum()
    if len(y) == 1 or y.shape[1] > LARGEST:
        return Line(products / squares, None, square)  # NaN where there is no output but 0
    number = seen.sum(0).clamp_min(1)
    means, drifts = y.sum(0) / number, moved.sum(0) / number
    around = (y - means) * seen
    # With few examples a line through them says little: it is drawn to the one through the origin.
    few = len(y) ** -3.0
    slope = ((around * moved).sum() + few * products) / (around.square().sum() + few * squares)
    return Line(slope, drifts - slope * means, square)


def _set_along(
    operation: Operation, grads: dict[nn.Parameter, Tensor], derivative: Tensor, share: float, before: Tensor
) -> None:
    """Bring ``<p, g>`` a share of the way to a derivative, if it is one and ``‖p‖²`` is much as it was before.

    Rows of an embedding that the batch does not ask for stay without a gradient. Weights of units that a ReLU hides for
    the whole batch do not: as they follow the others of their layer some come back.
    """
    dtype = derivative.dtype
    weights = [(p, p.detach().to(dtype), grads[p]) for p in operation.weights]
    whole = torch.stack([w.square().sum() for _, w, _ in weights]).sum()
    pairs = weights if operation.uses_all else [(p, torch.where(grad != 0, w, 0), grad) for p, w, grad in weights]
    along = torch.stack([(w * grad).sum() for _, w, grad in pairs]).sum()
    square = torch.stack([w.square().sum() for _, w, _ in pairs]).sum()
    size = share * (derivative - along) / square
    holds = size.isfinite() & (whole < 4 * before) & (4 * whole > before)
    size = torch.where(holds, size, 0)
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
