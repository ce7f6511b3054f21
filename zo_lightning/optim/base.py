"""What the update rules share: how weights and gradients reach a formula, in which precision and layout."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

Tensors = list[Tensor]
States = list[dict[str, Tensor]]


class UpdateRule(torch.optim.Optimizer, ABC):
    """An optimizer whose formula is written for real, dense tensors of one layout and of at least single precision.

    A rule gets the weights ``x``, their gradients ``g`` and its moments in float32 (float64 for float64 weights), since
    a running mean in a narrower dtype sticks or overflows, and each tensor of a weight in that weight's strides, since
    a fused kernel pairs numbers by their place in memory. What differs is copied: a gradient of other strides; a weight
    in half precision, or one that is a view with gaps, which is rounded once, when its copy is written back. A complex
    weight is updated as its real and imaginary parts (``torch.view_as_real``), as ``torch.optim`` does.

    Attributes:
        separable: whether each weight's update depends on that weight alone, so that weights may be stepped one after
            the other.
    """

    separable: ClassVar[bool]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient.

        Args:
            closure: computes the loss and fills ``.grad``; None where that is already done.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: several numbers of a weight share one place in memory (``torch.Tensor.expand``).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in self._batches(group):
                self._step(params, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned; unlike in ``torch.optim``, the state keeps its own precision.

        Args:
            state_dict: the state, by number of the weight, and the groups.

        Raises:
            ValueError: the groups do not match.
        """
        loaded = [state_dict]
        # Hooks may exchange the dictionary; this one is called after them.
        hook = self.register_load_state_dict_pre_hook(lambda _, final: loaded.append(final))
        try:
            super().load_state_dict(state_dict)  # has rounded the state to the dtype of the weights
        finally:
            hook.remove()
        numbers = [number for group in loaded[-1]["param_groups"] for number in group["params"]]
        weights = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, weights, strict=True):
            for name, value in loaded[-1]["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    kept = name == "step"  # a count, as it is and on the CPU
                    like = value if kept else torch.empty((), dtype=_precision(_real(p)), device=p.device)
                    self.state[p][name] = value.to(like, copy=True)

    @abstractmethod
    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state that has one number per weight, zero at first."""

    @abstractmethod
    def _update(self, x: Tensors, g: Tensors, states: States, group: dict[str, Any]) -> None:
        """Move ``x`` in place, given the gradients and the states of the same weights."""

    def _batches(self, group: dict[str, Any]) -> Iterable[Tensors]:
        """The weights of a group that have a gradient: those of one device and dtype together if separable, else all.

        A weight that needs a copy is then stepped alone, so that one copy exists at a time.
        """
        moving = [p for p in group["params"] if p.grad is not None]
        if not self.separable:
            return [moving] if moving else []
        batches: dict[Any, Tensors] = {}
        for p in moving:
            batches.setdefault((p.device, p.dtype) if _is_plain(_real(p)) else id(p), []).append(p)
        return batches.values()

    def _step(self, params: Tensors, group: dict[str, Any]) -> None:
        targets = [_real(p) for p in params]
        x = [p if _is_plain(p) else torch.empty_like(p, dtype=_precision(p)).copy_(p) for p in targets]
        g = [_matched(_gradient(p), like) for p, like in zip(params, x, strict=True)]
        states: States = [self.state[p] for p in params]
        for state, like in zip(states, x, strict=True):
            fresh = not state
            for name in self._moments(group):
                state[name] = torch.zeros_like(like) if fresh else _matched(state[name], like)
        self._update(x, g, states, group)
        for target, moved in zip(targets, x, strict=True):
            if moved is not target:
                target.copy_(moved)


def _real(p: Tensor) -> Tensor:
    return torch.view_as_real(p) if p.is_complex() else p


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    g = p.grad.to_dense() if p.grad.layout != torch.strided else p.grad
    # A kernel would read a lazily conjugated or negated tensor as what lies in its memory.
    if g.is_complex():
        g = torch.view_as_real(g.resolve_conj())
    return g.resolve_neg() if g.is_neg() else g


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_plain(x: Tensor) -> bool:
    """Whether a formula may work on a weight's own memory: wide enough, and dense, without gaps or overlaps."""
    if x.dtype != _precision(x):
        return False
    # empty_like keeps the strides of dense tensors, and of no others.
    return x.is_contiguous() or torch.empty_like(x, device="meta").stride() == x.stride()


def _matched(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor itself, or a copy in the dtype and the strides of the dense ``x`` where these differ."""
    if tensor.dtype == x.dtype and tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x).copy_(tensor)
