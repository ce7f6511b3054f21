"""SGD with momentum whose steps have one size, whatever the size of the gradient."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zo_lightning.optim.base import States, Tensors, UpdateRule
from zo_lightning.optim.checks import check_at_least_0, check_lr, check_unit_interval


class NormalizedSGD(UpdateRule):
    """Momentum SGD over the running size of the whole gradient: Adam whose weights share one second moment.

    ``m ← β₁ m + (1 − β₁) g``, ``v ← β₂ v + (1 − β₂) ‖g‖² / d``,
    ``x ← (1 − lr · weight_decay) x − lr · m̂ / (√v̂ + eps)``
    with Adam's bias corrections ``m̂ = m / (1 − β₁ᵗ)`` and ``v̂ = v / (1 − β₂ᵗ)``, one ``v`` for all ``d`` weights
    (AdaGrad-Norm, Ward, Wu & Bottou 2019, with a running mean in place of the sum). An estimate ``c u`` along a random
    direction has the same second moment in every weight, so that Adam's own ``v`` would be a noisier copy of this one.
    The noise of the estimate also makes each weight wander, by about ``lr √t`` in ``t`` steps: the decoupled weight
    decay bounds that.

    Args:
        params: weights, or groups of them, each with a ``v`` of its own.
        lr: ≥ 0, the typical step of a weight.
        betas: ``(β₁, β₂)``, each in [0, 1).
        eps: ≥ 0.
        weight_decay: ≥ 0.

    Raises:
        ValueError: an argument is out of its range.
    """

    separable = False  # the step of a weight depends on the gradients of all weights of its group

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
    ) -> None:
        check_lr(lr)
        for index, beta in enumerate(betas):
            check_unit_interval(f"betas[{index}]", beta)
        check_at_least_0("eps", eps)
        check_at_least_0("weight_decay", weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("m",)

    def _update(self, x: Tensors, g: Tensors, states: States, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        # Each tensor keeps its own part of v, one number, so that the state is by weight as any optimizer's.
        for p, state in zip(x, states, strict=True):
            state.setdefault("step", torch.zeros(())).add_(1)
            state.setdefault("v", p.new_zeros(()))
        steps = [state["step"].item() for state in states]
        torch._foreach_lerp_([state["m"] for state in states], g, 1 - beta1)
        for state, norm in zip(states, torch._foreach_norm(g), strict=True):
            state["v"].lerp_(norm.square(), 1 - beta2)
        square = torch.zeros((), device=x[0].device)
        for state, t in zip(states, steps, strict=True):
            square = square + (state["v"] / (1 - beta2**t)).to(square.device)
        size = (square / sum(map(torch.numel, x))).sqrt() + group["eps"]
        if group["weight_decay"]:
            torch._foreach_mul_(x, 1 - lr * group["weight_decay"])
        for p, state, t in zip(x, states, steps, strict=True):
            p.addcdiv_(state["m"], size.to(p), value=-lr / (1 - beta1**t))
