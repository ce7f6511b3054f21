"""A net's output, the last tensor that all weights act through, and the gradient of the loss by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.directions import Rademacher
from zo_lightning.objective import Objective
from zo_lightning.perturbed.outputs import DisplacedOutputs

LARGEST = 4096
"""Numbers per example in an output that counts as one."""

EXACT = 16
"""Outputs up to which finite differences are along each of them; as many random directions serve for more."""

_MU = 1e-2  # displaces the net's output, where the loss alone is asked
_SIGNS = Rademacher()


@dataclass(eq=False)
class _Call:
    """One call of a module: its output, and how many uses of weights there had been before and after it."""

    name: str
    output: Any
    version: int
    before: int
    after: int


@contextmanager
def module_calls(module: nn.Module, watched: DisplacedOutputs) -> Iterator[list[_Call]]:
    """The calls of a module's submodules within a pass, in the order in which they end; TorchScript shows none."""
    calls: list[_Call] = []
    began: list[int] = []
    handles = []
    for name, submodule in module.named_modules():
        if isinstance(submodule, torch.jit.ScriptModule):
            continue
        handles.append(submodule.register_forward_pre_hook(lambda *_: began.append(watched.events)))
        handles.append(
            submodule.register_forward_hook(
                lambda *a, name=name: calls.append(
                    _Call(name, a[2], getattr(a[2], "_version", 0), began.pop(), watched.events)
                )
            )
        )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output_of_the_net(calls: list[_Call], watched: DisplacedOutputs, examples: int) -> tuple[str | None, str | None]:
    """The name of the module whose output is all that the loss sees of the weights, and the key of the use behind it.

    Of modules that return the same tensor it is the outermost: with its output replaced the least is left to compute.
    The module is None where there is no such output [B, C]; the key is None where something else, such as a softmax or
    a change in place, makes the output.
    """
    names = [call.name for call in calls]
    once = [call for call in calls if names.count(call.name) == 1 and isinstance(call.output, Tensor)]
    for call in once:
        shape = tuple(call.output.shape)
        whole = call.before == 0 and call.after == watched.events
        if not whole or len(shape) != 2 or shape[0] != examples or shape[1] > LARGEST:
            continue
        outermost = [c for c in once if c.output is call.output and c.version == call.version][-1]
        made_by = [k for k, u in watched.uses.items() if u.output is call.output and u.version == call.version]
        return outermost.name, made_by[0] if made_by else None
    return None, None


@contextmanager
def watched_output(module: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """What one submodule returns within the context, call by call."""
    outputs: list[Tensor] = []
    if name is None:
        yield outputs
        return
    handle = module.get_submodule(name).register_forward_hook(lambda *a: outputs.append(a[2].clone()))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def replaced_output(module: nn.Module, name: str, output: Tensor) -> Iterator[None]:
    """Let one submodule return ``output`` without computing anything."""
    net = module.get_submodule(name)
    before = vars(net).get("forward")
    vars(net)["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        del vars(net)["forward"]
        if before is not None:
            vars(net)["forward"] = before


def gradient_by_autograd(objective: Objective, net: str, output: Tensor) -> Tensor | None:
    """The gradient [B, C] of each example's loss by the net's output, or None where autograd does not give one.

    The loss is asked once, and no layer is run: the graph is that of the loss function alone.
    """
    leaf = output.detach().requires_grad_()
    with objective.probe(cost=0), torch.enable_grad():
        # A copy of its own: the loss may change the output in place.
        with replaced_output(objective.module, net, leaf.clone()):
            losses = objective.per_example()
        if not isinstance(losses, Tensor) or not losses.requires_grad:
            return None
        return torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0]


def gradient_by_values(objective: Objective, net: str, output: Tensor, seed: int) -> Tensor:
    """The same gradient by central differences of the loss alone: exact up to ``EXACT`` outputs, else unbiased.

    With more outputs than that it is ``(1/K) Σₖ cᵢₖ rᵢₖ`` with ``K = EXACT`` random signs ``rᵢₖ`` [C] for each example.
    """
    examples, classes = output.shape
    error = torch.zeros_like(output)
    for k in range(min(classes, EXACT)):
        if classes <= EXACT:
            direction = torch.zeros_like(output)
            direction[:, k] = 1.0
        else:
            direction = _SIGNS.draw([output], seed, -2, k)[0]
        slope = slopes(objective, net, output, direction)
        error.addcmul_(direction, slope.unsqueeze(1), value=1.0 if classes <= EXACT else 1 / EXACT)
    return error


def slopes(objective: Objective, net: str, output: Tensor, direction: Tensor) -> Tensor:
    """The central difference [B] of the losses along a direction [B, C] of the net's output."""
    ends = []
    for mu in (_MU, -_MU):
        with objective.probe(cost=0), replaced_output(objective.module, net, torch.add(output, direction, alpha=mu)):
            ends.append(objective.losses())
    return (ends[0] - ends[1]).to(output.dtype) / (2 * _MU)


def is_smooth(objective: Objective, net: str, output: Tensor, seed: int) -> bool:
    """Whether autograd's gradient of the loss alone is what the loss's values say, along one random direction."""
    try:
        error = gradient_by_autograd(objective, net, output)
    except RuntimeError:  # something in the loss has no derivative
        return False
    if error is None:
        return False
    direction = _SIGNS.draw([output], seed, -2, 0)[0]
    values, exact = slopes(objective, net, output, direction), (error * direction).sum(1)
    # A kink under one example's step, or rounding, moves this by far less than a missing factor or term.
    return bool(torch.linalg.vector_norm(values - exact) <= 0.1 * torch.linalg.vector_norm(values) + 1e-3)
