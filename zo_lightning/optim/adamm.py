"""AMSGrad without bias correction, the update rule of AdaMM."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zo_lightning.optim.base import States, Tensors, UpdateRule
from zo_lightning.optim.checks import check_at_least_0, check_lr, check_unit_interval


class AdaMM(UpdateRule):
    """Adaptive momentum method (Reddi et al., *On the convergence of Adam and beyond*, 2018; Chen et al. 2019).

    ``m ← β₁ m + (1 − β₁) g``, ``v ← β₂ v + (1 − β₂) g²``, ``v̂ ← max(v̂, v)``, ``x ← x − lr · m / (√v̂ + eps)``, all
    starting at zero and without bias correction; ``torch.optim.Adam(amsgrad=True)`` is the same with it.

    Args:
        params: weights, or groups of them.
        lr: ≥ 0.
        betas: ``(β₁, β₂)``, each in [0, 1).
        eps: ≥ 0.
        weight_decay: ≥ 0, decoupled: ``x ← (1 − lr · weight_decay) x`` first (Loshchilov & Hutter 2019).
        foreach: True updates by horizontally fused operations, on every device; False by PyTorch's fused kernel of
            AdamW, which goes through memory once. None takes the kernel on the CPU and on CUDA.

    Raises:
        ValueError: an argument is out of its range.
    """

    separable = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        check_lr(lr)
        for index, beta in enumerate(betas):
            check_unit_interval(f"betas[{index}]", beta)
        check_at_least_0("eps", eps)
        check_at_least_0("weight_decay", weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "foreach": foreach}
        super().__init__(params, defaults)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "m", "v", "v_hat"

    def _update(self, x: Tensors, g: Tensors, states: States, group: dict[str, Any]) -> None:
        m, v, v_hat = ([state[name] for state in states] for name in ("m", "v", "v_hat"))
        foreach = group["foreach"]
        if foreach is None:
            foreach = x[0].device.type not in ("cpu", "cuda")
        (_foreach if foreach else _fused)(x, g, m, v, v_hat, group)


def _foreach(x: Tensors, g: Tensors, m: Tensors, v: Tensors, v_hat: Tensors, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    torch._foreach_maximum_(v_hat, v)
    denominator = torch._foreach_sqrt(v_hat)
    torch._foreach_add_(denominator, group["eps"])
    torch._foreach_mul_(x, 1 - lr * group["weight_decay"])
    torch._foreach_addcdiv_(x, m, denominator, -lr)


def _fused(x: Tensors, g: Tensors, m: Tensors, v: Tensors, v_hat: Tensors, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    # AdamW with a running maximum, at a step so late that its bias corrections 1 − βᵗ are exactly 1.
    late = [torch.full((), torch.inf, device=x[0].device)] * len(x)
    torch._fused_adamw_(
        x,
        g,
        m,
        v,
        v_hat,
        late,
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=True,
        maximize=False,
    )
