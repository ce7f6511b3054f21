"""The loss as a function of the net's output alone, and its gradient."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zo_lightning.directions import Rademacher
from zo_lightning.estimators.per_example.containers import tensors_of
from zo_lightning.estimators.per_example.output import Call, Output, returning
from zo_lightning.objective import NonFiniteLoss, Objective
from zo_lightning.perturbed.layouts import Layout, layouts_of

_log = logging.getLogger(__name__)

EXACT = 16
"""Outputs up to which finite differences are along each of them; as many random directions serve for more."""

_MU = 1e-2  # displaces the net's output, where the loss alone is asked
_SIGNS = Rademacher()


@dataclass(frozen=True)
class LossAlone:
    """The loss of each example, asked without running a layer: none of these questions counts as a forward pass.

    Attributes:
        objective: the loss.
        output: of the net.
        returned: what the modules that make it have returned.
    """

    objective: Objective
    output: Output
    returned: Sequence[Any]

    def losses(self, rows: Tensor) -> Tensor:
        """The losses [B] at an output [B, C]."""
        with self.objective.probe(cost=0), self._at(rows):
            return self.objective.losses()

    def slopes(self, rows: Tensor, direction: Tensor) -> Tensor:
        """The central difference [B] of the losses along a direction [B, C]."""
        ends = [self.losses(torch.add(rows, direction, alpha=mu)) for mu in (_MU, -_MU)]
        return (ends[0] - ends[1]).to(rows.dtype) / (2 * _MU)

    def by_autograd(self, rows: Tensor) -> Tensor | None:
        """The gradient [B, C] of each example's loss, or None where autograd does not give one.

        The loss is asked once; the graph is that of the loss function alone.
        """
        leaf = rows.detach().requires_grad_()
        with self.objective.probe(cost=0), torch.enable_grad():
            with self._at(leaf):
                losses = self.objective.per_example()
            if not isinstance(losses, Tensor) or not losses.requires_grad:
                return None
            return torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0]

    def by_values(self, rows: Tensor, seed: int) -> Tensor:
        """The same gradient by central differences: exact up to ``EXACT`` outputs, else unbiased.

        With more outputs than that it is ``(1/K) Σₖ cᵢₖ rᵢₖ`` with ``K = EXACT`` random signs ``rᵢₖ`` [C] for each
        example.
        """
        numbers = rows.shape[1]
        error = torch.zeros_like(rows)
        for k in range(min(numbers, EXACT)):
            if numbers <= EXACT:
                direction = torch.zeros_like(rows)
                direction[:, k] = 1.0
            else:
                direction = _SIGNS.draw([rows], seed, -2, k)[0]
            slope = self.slopes(rows, direction)
            error.addcmul_(direction, slope.unsqueeze(1), value=1.0 if numbers <= EXACT else 1 / EXACT)
        return error

    def is_smooth(self, rows: Tensor, seed: int) -> bool:
        """Whether autograd's gradient is what the loss's values say, along one random direction."""
        try:
            error = self.by_autograd(rows)
        except RuntimeError:  # something in the loss has no derivative
            return False
        if error is None:
            return False
        direction = _SIGNS.draw([rows], seed, -2, 0)[0]
        try:
            values, exact = self.slopes(rows, direction), (error * direction).sum(1)
        except NonFiniteLoss:  # such as the logarithm of a probability that was moved below 0: no values to compare
            return bool(error.isfinite().all())
        # A kink under one example's step, or rounding, moves this by far less than a missing factor or term.
        return bool(torch.linalg.vector_norm(values - exact) <= 0.1 * torch.linalg.vector_norm(values) + 1e-3)

    def say_if_coupled(self, rows: Tensor, seed: int) -> None:
        """Log a warning where moving the output of the first example moves the losses of others."""
        direction = _SIGNS.draw([rows], seed, -2, 0)[0]
        direction[1:] = 0.0
        try:
            own, *others = self.slopes(rows, direction).abs().tolist()
        except NonFiniteLoss:  # there are no values to compare
            return
        if max(others, default=0.0) > 1e-2 * own + 1e-3:  # more than rounding
            _log.warning(
                "PerExample: the loss of an example depends on the outputs of others, as a contrastive loss does: its "
                "slopes say what an example does to its own loss alone, and the estimate is biased; take ZerothOrder"
            )

    def _at(self, rows: Tensor) -> Any:
        return returning(self.objective.module, self.output.modules, self.output.write(self.returned, rows))


def find_output(objective: Objective, calls: Sequence[Call], losses: Tensor, seed: int) -> Output | None:
    """The tensors among what some calls returned on which the losses depend, each example's on its own.

    Whether they do is tried by displacing them a little. None where they depend on none, an example's place is not
    found, or a displaced output has no loss.
    """
    returned, modules = [call.output for call in calls], tuple(call.name for call in calls)
    tensors, examples = tensors_of(returned), len(losses)
    parts: list[tuple[int, Layout]] = []
    for k, tensor in enumerate(tensors):
        layouts = list(layouts_of(tensor.shape, examples))
        if len(tensors) == 1 and tensor.ndim <= 2 and layouts[:1] == [Layout()] and len(layouts) == 1:
            return Output(modules, ((k, layouts[0]),))
        alone = LossAlone(objective, Output(modules, ((k, Layout()),)), returned)
        try:
            layout = _layout(alone, k, tensor, layouts, losses, seed)
        except NonFiniteLoss:
            return None
        if layout is None:
            return None
        if layout:
            parts.append((k, layout[0]))
    return Output(modules, tuple(parts)) if parts else None


def _layout(
    alone: LossAlone, k: int, tensor: Tensor, layouts: Sequence[Layout], losses: Tensor, seed: int
) -> list[Layout] | None:
    """Where a tensor has the examples; [] if the losses do not depend on it, None if the place is not found."""
    examples, size = len(losses), _MU * float(tensor.abs().mean()) + torch.finfo(tensor.dtype).eps

    def moved(rows: Tensor, layout: Layout) -> set[int]:
        signs = _SIGNS.draw([rows], seed, -2, k)[0]
        output = replace(alone.output, parts=((k, layout),))
        one = replace(alone, output=output)
        still = output.read(alone.returned, examples)
        change = one.losses(still + rows * signs * size) - one.losses(still)
        return set(change.nonzero().flatten().tolist())

    usual = layouts[0] if layouts else None
    if usual is None:
        return None
    if not moved(torch.ones_like(usual.rows(tensor, examples)), usual):
        return []
    for layout in layouts:
        rows = torch.zeros_like(layout.rows(tensor, examples))
        for i in {0, examples - 1}:
            rows.zero_()[i] = 1.0
            if moved(rows, layout) - {i}:
                break
        else:
            return [layout]
    return None
