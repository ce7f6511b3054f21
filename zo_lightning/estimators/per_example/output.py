"""A net's output, the last tensors that all weights act through: finding it, reading it, and putting in others."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.estimators.per_example.containers import replaced, tensors_of
from zo_lightning.perturbed.layouts import Layout
from zo_lightning.perturbed.outputs import DisplacedOutputs

LARGEST = 4096
"""Numbers per example in an output that is taken as it is; a larger one is taken in as many random sums as follow."""

SUMS = 256


@dataclass(frozen=True)
class Output:
    """All that the loss sees of the weights.

    Attributes:
        modules: the names of the modules that return it, in the order of their calls.
        parts: which of the tensors of numbers in what they return, counted through, and where each has the examples.
    """

    modules: tuple[str, ...]
    parts: tuple[tuple[int, Layout], ...]

    def read(self, returned: Sequence[Any], examples: int) -> Tensor:
        """Its numbers for each example, [B, C]."""
        tensors = tensors_of(returned)
        rows = [layout.rows(tensors[k], examples) for k, layout in self.parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def write(self, returned: Sequence[Any], rows: Tensor) -> list[Any]:
        """What the modules would return with other numbers in it."""
        tensors, parts, at = tensors_of(returned), {}, 0
        for k, layout in self.parts:
            size = tensors[k].numel() // len(rows)
            part = rows[:, at : at + size].reshape(len(rows), -1)  # as exact as it is, for the sake of differences
            parts[k] = layout.restore(part, tensors[k].shape).clone()  # the loss may change the output in place
            at += size
        return _with_parts(returned, parts)

    def state_dict(self) -> dict[str, Any]:
        """As plain containers."""
        return {"modules": list(self.modules), "parts": [[k, *layout] for k, layout in self.parts]}

    @classmethod
    def of_state(cls, state: Mapping[str, Any] | None) -> "Output | None":
        """The inverse."""
        if state is None:
            return None
        return cls(tuple(state["modules"]), tuple((k, Layout(*layout)) for k, *layout in state["parts"]))


def _with_parts(returned: Sequence[Any], parts: Mapping[int, Tensor]) -> list[Any]:
    """What modules return, with some of the tensors in it, counted through, replaced."""
    count = -1

    def one(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return parts.get(count, tensor)

    return replaced(list(returned), one)


@lru_cache(maxsize=4)
def _sums(numbers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(numbers)
    places = torch.randint(SUMS, (numbers,), generator=generator)
    signs = torch.randint(2, (numbers,), generator=generator) * 2.0 - 1
    return places.to(device), signs.to(device)


def summed(rows: Tensor) -> Tensor:
    """``R y`` for each row ``y``, with ``E[Rᵀ R] = I``, where there are too many numbers; else the rows themselves.

    Each number goes into one of the sums, with a random sign. Source: Charikar, Chen & Farach-Colton, *Finding frequent
    items in data streams*, 2002.
    """
    if rows.shape[1] <= LARGEST:
        return rows
    places, signs = _sums(rows.shape[1], rows.device)
    return rows.new_zeros(len(rows), SUMS).index_add_(1, places, rows * signs.to(rows.dtype))


@dataclass(eq=False)
class Call:
    """One call of a module: what it returned, and how many uses of weights there had been before and after it.

    Attributes:
        depth: how many calls it is within.
    """

    name: str
    output: Any
    version: int
    before: int
    after: int
    depth: int

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of numbers that it returned."""
        return tensors_of(self.output)


@contextmanager
def module_calls(module: nn.Module, watched: DisplacedOutputs) -> Iterator[list[Call]]:
    """The calls of a module's submodules within a pass, in the order in which they end; TorchScript shows none."""
    calls: list[Call] = []
    began: list[int] = []
    handles = []
    for name, submodule in module.named_modules():
        if isinstance(submodule, torch.jit.ScriptModule):
            continue
        handles.append(submodule.register_forward_pre_hook(lambda *_: began.append(watched.events)))
        handles.append(
            submodule.register_forward_hook(
                lambda *a, name=name: calls.append(
                    Call(name, a[2], getattr(a[2], "_version", 0), began.pop(), watched.events, len(began))
                )
            )
        )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def candidates(calls: list[Call], watched: DisplacedOutputs, losses: Tensor) -> list[Call]:
    """The calls whose outputs are all that the loss sees of the weights; none where there are no such.

    One call may hold all uses of weights; of several that do, the first is taken that returns a matrix, or else
    anything, and of those that return the same thing the outermost: with its output replaced the least is left to
    compute. Else it is a few calls, such as those of an encoder and a head, that follow each other.
    """
    whole = [c for c in calls if c.before == 0 and c.after == watched.events and c.after]
    inner = [c for c in whole if c.tensors and not any(t is losses for t in c.tensors)]
    matrices = [c for c in inner if _is_matrix(c.output, len(losses))]
    if inner:
        first = (matrices or inner)[0]
        return [[c for c in inner if c.output is first.output and c.version == first.version][-1]]
    depth = max((c.depth for c in whole), default=-1) + 1
    few = [c for c in calls if c.depth == depth and c.after > c.before]
    covered = sum(c.after - c.before for c in few) == watched.events
    return few if covered and all(c.tensors for c in few) else []


def _is_matrix(output: Any, examples: int) -> bool:
    return isinstance(output, Tensor) and output.ndim == 2 and len(output) == examples and output.shape[1] <= LARGEST


@contextmanager
def returned_by(module: nn.Module, output: Output | None) -> Iterator[list[Any]]:
    """What the modules that make the output return within the context, call by call; the output itself is copied."""
    returned: list[Any] = []
    depth = count = 0
    if output is None:
        yield returned
        return
    parts = {k for k, _ in output.parts}

    def begin(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def end(_: nn.Module, __: Any, value: Any) -> None:
        nonlocal depth, count
        depth -= 1
        if depth == 0:  # else it is within another call that is read

            def kept(tensor: Tensor) -> Tensor:
                nonlocal count
                count += 1
                return tensor.clone() if count - 1 in parts else tensor

            returned.append(replaced(value, kept))

    handles = []
    for name in dict.fromkeys(output.modules):
        one = module.get_submodule(name)
        handles += [one.register_forward_pre_hook(begin), one.register_forward_hook(end)]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def returning(module: nn.Module, names: Iterable[str], values: Iterable[Any]) -> Iterator[None]:
    """Let some submodules return these values, call by call, without computing anything."""
    rest = iter(values)
    before = []
    for name in dict.fromkeys(names):
        own = vars(module.get_submodule(name))
        before.append((own, own.get("forward")))
        own["forward"] = lambda *_, **__: next(rest)
    try:
        yield
    finally:
        for own, forward in before:
            del own["forward"]
            if forward is not None:
                own["forward"] = forward
