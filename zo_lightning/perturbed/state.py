"""What is known of one module from step to step: how its weights can be displaced, and memory to do it in."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zo_lightning.compiled import is_compiled
from zo_lightning.directions import Direction
from zo_lightning.objective import Objective
from zo_lightning.perturbed.weights import DisplacedWeights, ExchangedWeights, Points, Recent, Value, Weights
from zo_lightning.vectors import Vector

T = TypeVar("T")

_log = logging.getLogger(__name__)


class State:
    """What an estimator has learned about one module, to be passed to each of its steps, saved and loaded.

    Estimators that learn more have a state of their own class.

    Attributes:
        visible: by name of a weight, whether a pass has shown its use; if not, it is moved in place.
        chunk_size: directions of which the points fit into memory together, once that was measured.
    """

    def __init__(self) -> None:
        self.visible: dict[str, bool] = {}
        self.chunk_size: int | None = None
        self._shown: list[str] = []  # names of the weights, once a pass has shown that nothing has to be watched
        self._estimate: object = None  # the latest, and whether its passes are not watched
        self._exchanges = False
        self._pools = False  # whether passes that are not watched are to be, for their poolings alone
        self._scratch: dict[str, list[tuple[Vector, int | None, list[Any]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has memory of its own."""
        return {**vars(self), "_scratch": {}}

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how a run goes on, as plain containers and tensors."""
        known = {"visible": dict(self.visible), "chunk_size": self.chunk_size}
        return known | {"shown": list(self._shown), "pools": self._pools}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.visible, self.chunk_size = dict(state["visible"]), state["chunk_size"]
        self._shown, self._pools = list(state.get("shown", ())), state.get("pools", False)

    def run(self, objective: Objective, weights: Weights, value: Value, ask: Callable[[Any], T]) -> T:
        """What ``ask`` returns for the context of a pass in which the uses of the weights see ``value``.

        A weight whose use the first pass does not show is not used, or read by code that cannot be watched. From then
        on it is moved in place; the pass is repeated. Once a pass has shown the uses of all, written into nothing and
        asked for no ``.grad``, those of later steps are not watched, but for poolings. Within a step all are watched or
        none: compiled code, which runs as it was written where it is watched, rounds otherwise, and draws other dropout
        masks.
        """
        if self._can_exchange(objective, weights) and isinstance(value, Points):
            answer = ask(ExchangedWeights(weights, value, self._pools))
            if objective.has_written:
                self._shown, self._exchanges = [], False
            return answer
        hidden = {k for k, name in enumerate(weights.names) if not self.visible.get(name, k not in weights.opaque)}
        watched = DisplacedWeights(weights, value, hidden, objective.before_write)
        answer = ask(watched)
        new = [k for k, name in enumerate(weights.names) if name not in self.visible]
        touches = objective.has_written or watched.reads_gradients
        self._pools = self._pools or (watched.pools and not is_compiled(objective.module))
        if not touches and len(watched.seen) == len(weights) and all(map(_is_plain, weights)):
            self._shown = weights.names
        if not new:
            return answer
        self.visible |= {weights.names[k]: k in watched.seen for k in new}
        if missed := [weights.names[k] for k in new if k not in watched.seen]:
            names = ", ".join(missed[:5]) + (f" and {len(missed) - 5} more" if len(missed) > 5 else "")
            _log.warning("no use of %s shows in a forward pass: moved in place for each, and put back", names)
        return answer if watched.seen | hidden >= set(new) else self.run(objective, weights, value, ask)

    def _can_exchange(self, objective: Objective, weights: Weights) -> bool:
        if self._estimate is not objective.estimate:  # the first pass of a step decides for all
            self._estimate = objective.estimate
            shown = self._shown == weights.names and not weights.opaque and not weights.frozen
            self._exchanges = shown and objective.keeps_inputs()
        return self._exchanges

    def loss_at(self, objective: Objective, weights: Weights, value: Value) -> float:
        """The loss where the uses of the weights see ``value``.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        return self.run(objective, weights, value, objective)

    def loss_along(self, objective: Objective, weights: Weights, direction: Direction, distance: float) -> float:
        """The loss at ``x + distance · u``.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        return self.loss_at(objective, weights, self.along(weights, direction, distance))

    @torch.no_grad()
    def along(self, weights: Weights, direction: Direction, distance: float) -> Value:
        """The point ``x + distance · u``, until the next one is asked for, in memory that is kept from step to step.

        Memory is that of one tensor unless the direction holds its tensors. The points require a gradient as the
        weights do: some of PyTorch's functions round differently by that alone.
        """
        if direction.held is None:

            def moved(position: int) -> Tensor:
                u = direction[position]
                return torch.add(weights[position].detach(), u, alpha=distance, out=u).requires_grad_()

            return Recent(weights, moved)
        points = self._points(weights)
        for p, u, point in zip(weights.params, direction.held, points, strict=True):
            torch.add(p, u, alpha=distance, out=point)
        return points

    @torch.no_grad()
    def here(self, weights: Weights, direction: Direction | None) -> Value:
        """The weights themselves, as ``along`` gives the points of a direction, so that passes are alike."""
        if direction is None or direction.held is None:  # a loss may write into it
            return Recent(weights, lambda k: weights[k].detach().clone().requires_grad_())
        points = self._points(weights)
        for p, point in zip(weights.params, points, strict=True):
            point.copy_(p)
        return points

    def _points(self, weights: Weights) -> Points:
        points = self.scratch("points", weights)
        if not points[0].requires_grad:  # new ones
            for point in points:
                point.requires_grad_()
        return Points(points)

    def scratch(self, name: str, weights: Weights, rows: int | None = None) -> Vector:
        """Tensors like the weights, or [rows, ...], whose memory is kept from one step to the next, unless it is lent.

        Memory that is given back and asked for again comes as new pages, each at the price of a page fault: on a net of
        2.8 million weights those took longer than the arithmetic of the whole step. While ``.grad`` still holds the
        latest estimate, a second piece serves the next one.
        """
        known = [one for one in self._scratch.get(name, ()) if one[1] == rows and one[2] == weights.kinds]
        for kept, *_ in known:
            if kept.is_free:
                return kept
        with torch.inference_mode(False):  # or no other mode could write into it
            kept = Vector.like(weights) if rows is None else Vector.stack(weights, rows)
        self._scratch[name] = [*known[-1:], (kept, rows, weights.kinds)]
        return kept


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight's data can be exchanged for another tensor."""
    return type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
