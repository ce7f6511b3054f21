"""SGD that keeps only the signs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zo_lightning.optim.base import States, Tensors, UpdateRule
from zo_lightning.optim.checks import check_lr, check_unit_interval


class SignSGD(UpdateRule):
    """Sign descent, ``m ← β m + (1 − β) g``, ``x ← x − lr · sign(m)`` (Bernstein et al. 2018; ZO: Liu et al. 2019).

    Args:
        params: weights, or groups of them.
        lr: ≥ 0, the step of every weight.
        momentum: ``β`` in [0, 1); 0 takes the sign of the gradient itself.

    Raises:
        ValueError: an argument is out of its range.
    """

    separable = True

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float = 1e-3, momentum: float = 0.0
    ) -> None:
        check_lr(lr)
        check_unit_interval("momentum", momentum)
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("m",) if group["momentum"] else ()

    def _update(self, x: Tensors, g: Tensors, states: States, group: dict[str, Any]) -> None:
        m = g
        if group["momentum"]:
            m = [state["m"] for state in states]
            torch._foreach_lerp_(m, g, 1 - group["momentum"])
        for p, moment in zip(x, m, strict=True):
            p.add_(moment.sign(), alpha=-float(group["lr"]))
