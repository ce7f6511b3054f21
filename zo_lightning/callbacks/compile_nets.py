"""Nets compiled by ``torch.compile``."""

from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torchmetrics import Metric


class CompileNets(Callback):
    """Compile what a module is made of, each module within it that has weights, before the first pass.

    Those are its children, and the members of children that are lists or dictionaries of modules. What is compiled is
    their call; a method of theirs that is called by its name is not.

    ``Backprop`` gains as everywhere, and ``ZerothOrder`` from its second step on (docs/how_it_works.md): the first is
    watched, as every step is where memory is lean, weights are frozen or inputs are above 4 MB. Passes that are watched
    run the code as it was written, so that nothing is gained by ``PerExample``, ``ForwardGradient``,
    ``DirectFeedbackAlignment`` and ``Batched``. Checkpoints are those of the plain module. On a CPU a C++ compiler is
    needed.

    Args:
        backend: of ``torch.compile``.
        mode: of ``torch.compile``, such as ``"max-autotune-no-cudagraphs"``; graphs of CUDA have not been tried.
        dynamic: whether shapes may change; None: code for the shapes seen, and other code once they change.
    """

    def __init__(self, backend: str = "inductor", mode: str | None = None, dynamic: bool | None = None) -> None:
        self.settings: dict[str, Any] = {"backend": backend, "mode": mode, "dynamic": dynamic}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile, once."""
        for net in _nets(pl_module):
            if net._compiled_call_impl is None:
                net.compile(**self.settings)


def _nets(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _nets(child)
        elif not isinstance(child, Metric | torch.jit.ScriptModule) and next(child.parameters(), None) is not None:
            yield child
