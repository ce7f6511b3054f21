"""A net's output: the last tensor that all weights act through; found, watched and replaced by hooks on modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zo_lightning.passes import WatchedPass

LARGEST = 1024
"""Numbers per example in an output that counts as one."""


@dataclass(eq=False)
class _Call:
    """One call of a module: its output, and how many uses of weights there had been before and after it."""

    name: str
    output: Any
    version: int
    before: int
    after: int


@contextmanager
def module_calls(module: nn.Module, watched: WatchedPass) -> Iterator[list[_Call]]:
    """The calls of a module's submodules within a pass, in the order in which they end."""
    calls: list[_Call] = []
    began: list[int] = []
    handles = []
    for name, submodule in module.named_modules():
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


def output_of_the_net(calls: list[_Call], watched: WatchedPass, examples: int) -> tuple[str | None, str | None]:
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
