"""A loss whose derivative is an estimate: how what an estimator found gets into ``loss.backward()``."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zo_lightning.estimators.base import Estimate

Deliver = Callable[[float], Sequence[Tensor | None]]


def whole(estimate: Estimate) -> tuple[Deliver, list[nn.Parameter]]:
    """What delivers an estimate, and its weights; afterwards its tensors are ``.grad``, and nothing is kept."""
    pairs = list(estimate.gradients)
    params, gradients = [p for p, _ in pairs], [gradient for _, gradient in pairs]

    def deliver(scale: float) -> list[Tensor]:
        given = gradients.copy()
        gradients.clear()
        if not given:
            raise RuntimeError("this loss has handed its gradient over already: differentiate it once")
        if scale != 1:
            torch._foreach_mul_(given, scale)
        return given

    return deliver, params


class _Delivery(torch.autograd.Function):
    """The identity, whose derivative by some weights is what it is told."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, deliver: Deliver, *params: Tensor) -> Tensor:
        ctx.deliver = deliver
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Give the gradients, times what the loss has been scaled by: for accumulation, or in 16-bit precision."""
        return None, None, *ctx.deliver(float(scale))


def delivering(loss: Tensor, deliver: Deliver, params: Iterable[Tensor] = ()) -> Tensor:
    """A loss that asks for gradients when it is differentiated.

    Args:
        loss: its value.
        deliver: called with what the loss has been scaled by; gives the gradients by ``params``, or Nones.
        params: the weights; without any there is a stand-in, and ``deliver`` gives one None.
    """
    inputs = tuple(params) or (torch.zeros((), requires_grad=True),)
    with torch.enable_grad():
        return cast(Tensor, _Delivery.apply(loss, deliver, *inputs))


def without_gradient(loss: float, module: LightningModule, is_exact: bool = False) -> Tensor:
    """The loss of a batch that is left out: nothing reaches ``.grad``, unless someone waits for all gradients.

    Args:
        loss: its value.
        module: in training.
        is_exact: whether the other batches are differentiated, so that processes add their gradients up.
    """
    value, trainer = torch.tensor(loss, device=module.device), module.trainer
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # it skips the step by itself
    if not scaled and not (is_exact and trainer.world_size > 1):
        return delivering(value, lambda scale: [None])
    nothing = math.nan if scaled else 0.0
    params = [p for p in module.parameters() if p.requires_grad]
    return delivering(value, lambda scale: [torch.full_like(p, nothing) for p in params], params)
