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
                lambda *a, name=name: calls.append(_Call(name, a[2], began.pop(), watched.events))
            )
        )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output_of_the_net(calls: list[_Call], watched: WatchedPass, examples: int) -> tuple[str | None, str | None]:
    """The name of the innermost module in which all weights are used, and the key of the use that makes its output.

    The module is None where no module's output [B, C] is all that the loss sees of the weights; the key is None where
    something else, such as a softmax, makes the output.
    """
    for call in calls:
        once = sum(other.name == call.name for other in calls) == 1
        if not once or call.before != 0 or call.after != watched.events or not isinstance(call.output, Tensor):
            continue
        if call.output.ndim == 2 and len(call.output) == examples and call.output.shape[1] <= LARGEST:
            return call.name, next((key for key, use in watched.uses.items() if use.output is call.output), None)
    return None, None


@contextmanager
def watched_output(module: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """What one submodule returns within the context, call by call."""
    outputs: list[Tensor] = []
    if name is None:
        yield outputs
        return
    handle = module.get_submodule(name).register_forward_hook(lambda *a: outputs.append(a[2]))
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
