"""How the losses along the directions of a step are obtained."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zo_lightning.black_box import BlackBoxLoss
from zo_lightning.compiled import as_written
from zo_lightning.directions import Direction, hold_all
from zo_lightning.low_rank import Factors
from zo_lightning.objective import Objective, check_loss
from zo_lightning.perturbed.many import Displaced, losses_at
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Value, Weights
from zo_lightning.stencils import Stencil

Probe = tuple[Direction, tuple[float, ...]]
"""A direction, and the losses at the stencil's offsets along it."""


_CACHE = 32 << 20


@dataclass(frozen=True)
class Evaluation(ABC):
    """A way to ask an objective for its losses along several directions.

    Attributes:
        draws: whether it draws the directions itself, into memory of its own; otherwise they may come drawn.
    """

    draws: ClassVar[bool] = False

    @abstractmethod
    def probes(
        self, objective: Objective, weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
    ) -> Iterator[Probe]:
        """Yield each direction with its losses at the stencil's offsets. Weights are displaced where they are used.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite.
        """


@dataclass(frozen=True)
class OneByOne(Evaluation):
    """One forward pass after the other; the loss at the weights themselves is asked once and shared.

    A black box that takes many candidates (``BlackBox.after``) then gets the outputs of all passes of the step at once.
    """

    def probes(
        self, objective: Objective, weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
    ) -> Iterator[Probe]:
        """Yield one direction after the other, each drawn when it is its turn."""
        loss = objective.loss
        if isinstance(loss, BlackBoxLoss) and loss.takes_many:
            yield from _together(loss, objective, weights, directions, stencil, state)
            return
        first, directions = _peek(directions)
        centre = state.loss_at(objective, weights, state.here(weights, first)) if 0.0 in stencil.offsets else 0.0
        for direction in directions:
            moved = (state.along(weights, direction, offset * stencil.mu) for offset in stencil.offsets if offset)
            losses = iter(objective.read([state.run(objective, weights, at, objective.unread) for at in moved]))
            yield direction, tuple(next(losses) if offset else centre for offset in stencil.offsets)


@dataclass(frozen=True)
class Batched(Evaluation):
    """Many forward passes as one: ``torch.func.vmap`` over the displaced weights of a number of directions.

    For many directions and small batches, where one pass alone does not fill the processor. The step's first pass is
    one by itself: what it leaves, such as BatchNorm's statistics and metrics, is what the step leaves. Directions are
    exactly those of ``OneByOne``, losses are equal to rounding. ``LowRank`` directions of linear layers stay factors.
    The directions of a chunk are held in memory, with lean updates too.

    Args:
        chunk_size: directions at once; None takes as many as fit into half of a GPU's free memory, or 32 MB otherwise:
            beyond a processor's cache more at once are slower.

    Raises:
        ValueError: ``chunk_size`` < 1; in ``probes``, also where a weight's use does not show, and where the loss
            branches on a value, calls ``.item()``, is a black box, or does another thing that ``vmap`` does not allow.
    """

    chunk_size: int | None = None

    draws = True

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None for what fits, got {self.chunk_size}")

    def probes(
        self, objective: Objective, weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
    ) -> Iterator[Probe]:
        """Yield the directions of one chunk after the other."""
        drawn = list(directions)
        if not drawn:  # of this process
            return
        offsets = [offset for offset in stencil.offsets if offset]
        is_central = 0.0 not in stencil.offsets
        at = state.along(weights, drawn[0], offsets[0] * stencil.mu) if is_central else state.here(weights, None)
        measured = self.chunk_size is not None or state.chunk_size is not None
        with nullcontext() if measured else _Largest() as largest, as_written():  # as vmap runs the others
            first = state.run(objective, weights, at, objective.unread)
        if hidden := [name for name in weights.names if not state.visible[name]]:
            raise ValueError(
                f"Batched has to see every use of a weight, and none of {', '.join(hidden[:5])} shows: freeze what is "
                "not used, or take OneByOne()"
            )
        if largest is not None:
            state.chunk_size = _fitting(weights, len(offsets), largest.bytes)
        size = min(self.chunk_size or state.chunk_size or 1, len(drawn))
        known: list[float] = []
        for begin in range(0, len(drawn), size):
            chunk = drawn[begin : begin + size]
            seen, distances = self._points(weights, chunk, [offset * stencil.mu for offset in offsets], size, state)
            rows = slice(int(is_central and begin == 0), None)  # one of these points was the first pass
            seen = [[t[rows] for t in one] if isinstance(one, list) else one[rows] for one in seen]
            losses = losses_at(objective, weights, seen, distances[rows]) if len(distances[rows]) else []
            known = known or objective.read([first])  # a GPU has had the others in the meantime
            losses = [*known[: rows.start], *losses]
            for index, direction in enumerate(chunk):
                if begin == index == 0 and direction.held is not None:  # which becomes the estimate
                    direction.held = state.scratch("estimate", weights).copy_(direction.held)
                along = Told([*([] if is_central else known), *losses[index :: len(chunk)]])
                yield from along.probes(objective, weights, [direction], stencil, state)

    def _points(
        self, weights: Weights, chunk: list[Direction], moves: list[float], size: int, state: State
    ) -> tuple[list[Displaced], Tensor]:
        """What the uses of each weight see at the points of a chunk, in the order of moves, then of directions."""
        count = len(chunk)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in weights) else torch.float32
        distances = torch.tensor(moves, dtype=dtype, device=weights[0].device).repeat_interleave(count)
        if (factors := Factors.of(chunk)) is not None:
            seen: list[Displaced] = []
            for p, part in zip(weights, factors.parts, strict=True):
                if isinstance(part, tuple):
                    a, b = (of.repeat(len(moves), 1, 1) for of in part)
                    seen.append([a / math.sqrt(factors.rank), b])
                else:
                    seen.append(torch.cat([torch.add(p.detach(), part, alpha=move) for move in moves]))
            return seen, distances
        u, points = state.scratch("batch", weights, size), state.scratch("batch's points", weights, size * len(moves))
        hold_all(chunk, u.rows(slice(count)))
        for k, p in enumerate(weights):
            for turn, move in enumerate(moves):
                rows = slice(turn * count, (turn + 1) * count)
                torch.add(p.detach(), u[k][:count], alpha=move, out=points[k][rows])
        return [point[: count * len(moves)] for point in points], distances


def _fitting(weights: Weights, moves: int, largest: int) -> int:
    """How many directions fit into memory, if a pass takes three times its largest tensor."""
    device = weights[0].device
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _CACHE
    own = sum(p.numel() * p.element_size() for p in weights)
    return max(1, room // (own + moves * (own + 3 * largest)))


class _Largest(TorchDispatchMode):
    """Context of a pass: the bytes of its largest tensor."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for one in output if isinstance(output, list | tuple) else [output]:
            if isinstance(one, torch.Tensor):
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return output


@dataclass(frozen=True)
class Told(Evaluation):
    """Losses that someone else has found at the points of a step.

    Args:
        losses: at the weights themselves, if the stencil asks there, then along one direction after the other.
    """

    losses: Sequence[float]

    def probes(
        self, objective: Objective, weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
    ) -> Iterator[Probe]:
        """Yield each direction with its losses among those told; nothing is asked."""
        told = iter(self.losses)
        centre = next(told) if 0.0 in stencil.offsets else 0.0
        for direction in directions:
            yield direction, tuple(next(told) if offset else centre for offset in stencil.offsets)


def points(
    weights: Weights, directions: Iterable[Direction], stencil: Stencil, state: State
) -> Iterator[tuple[Direction | None, Value]]:
    """The points of a step in the order of ``Told``, each until the next, with its direction."""
    first, directions = _peek(directions)
    if 0.0 in stencil.offsets:
        yield None, state.here(weights, first)
    for direction in directions:
        for offset in stencil.offsets:
            if offset:
                yield direction, state.along(weights, direction, offset * stencil.mu)


def _together(
    loss: BlackBoxLoss,
    objective: Objective,
    weights: Weights,
    directions: Iterable[Direction],
    stencil: Stencil,
    state: State,
) -> Iterator[Probe]:
    """Run the part in PyTorch at one point after the other, then let the black box find all losses."""
    candidates: list[Any] = []
    drawn: dict[int, Direction] = {}
    for direction, value in points(weights, directions, stencil, state):
        candidates.append(state.run(objective, weights, value, partial(objective.ask, loss.front)))
        if direction is not None:
            drawn.setdefault(id(direction), direction)
    losses = [check_loss(one) for one in objective.ask(lambda: loss.box.evaluate(candidates), cost=0)]
    objective.values += losses
    # The next direction was drawn into the memory of the one before.
    again = (u if u.held is None else u.hold(u.held) for u in drawn.values())
    yield from Told(losses).probes(objective, weights, again, stencil, state)


def _peek(directions: Iterable[Direction]) -> tuple[Direction | None, Iterator[Direction]]:
    """The first of some directions, if there is one, and all."""
    rest = iter(directions)
    first = next(rest, None)
    return first, rest if first is None else chain([first], rest)
