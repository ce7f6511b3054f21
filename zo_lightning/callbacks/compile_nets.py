"""Nets compiled by ``torch.compile``."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torchmetrics import Metric


class CompileNets(Callback):
    """Compile what a module is made of, each module within it that has weights, before the first pass.

    ``Backprop`` gains as everywhere, and ``ZerothOrder`` from its second step on (docs/how_it_works.md): the first is
    watched, as every step is where memory is lean, weights are frozen or inputs are above 4 MB. Passes that are watched
    run the code as it was written, so that nothing is gained by ``PerExample``, ``ForwardGradient``,
    ``DirectFeedbackAlignment`` and ``Batched``. Checkpoints are those of the plain module. On a CPU a C++ compiler is
    needed.

    Args:
        backend: of ``torch.compile``.
        mode: of ``torch.compile``, such as ``"max-autotune"``.
        dynamic: whether shapes may change; None: code for the shapes seen, and other code once they change.
    """

    def __init__(self, backend: str = "inductor", mode: str | None = None, dynamic: bool | None = None) -> None:
        self.settings: dict[str, Any] = {"backend": backend, "mode": mode, "dynamic": dynamic}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile, once."""
        for net in pl_module.children():
            if _can_compile(net) and net._compiled_call_impl is None:
                net.compile(**self.settings)


def _can_compile(module: nn.Module) -> bool:
    return not isinstance(module, Metric | torch.jit.ScriptModule) and next(module.parameters(), None) is not None
