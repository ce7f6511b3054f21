"""SGD that keeps only the signs."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zo_lightning.optim.checks import check_lr, check_unit_interval


class SignSGD(torch.optim.Optimizer):
    """Sign descent, ``m ← β m + (1 − β) g``, ``x ← x − lr · sign(m)`` (Bernstein et al. 2018; ZO: Liu et al. 2019).

    Args:
        params: weights, or groups of them.
        lr: ≥ 0, the step of every weight.
        momentum: ``β`` in [0, 1); 0 takes the sign of the gradient itself.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float = 1e-3, momentum: float = 0.0
    ) -> None:
        check_lr(lr)
        check_unit_interval("momentum", momentum)
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            x = [p for p in group["params"] if p.grad is not None]
            for p in x:
                m = p.grad
                if group["momentum"]:
                    if not self.state[p]:
                        self.state[p]["m"] = torch.zeros_like(p)
                    m = self.state[p]["m"].lerp_(p.grad, 1 - group["momentum"])
                p.add_(m.sign(), alpha=-float(group["lr"]))
        return loss
