"""One undisturbed pass, to see how a net uses its weights: which of them can have noise for each example, and where."""

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from zo_lightning.directions import Rademacher
from zo_lightning.estimators.per_example.containers import tensors_of
from zo_lightning.estimators.per_example.loss_alone import find_output
from zo_lightning.estimators.per_example.output import Call, candidates, module_calls
from zo_lightning.estimators.per_example.state import Layer, PerExampleState
from zo_lightning.objective import Objective
from zo_lightning.perturbed.affine import BatchNormalization
from zo_lightning.perturbed.gates import Gate
from zo_lightning.perturbed.layers import Convolution
from zo_lightning.perturbed.layouts import FIRST, Layout, layouts_of
from zo_lightning.perturbed.outputs import DisplacedOutputs, Use
from zo_lightning.perturbed.rules import count
from zo_lightning.perturbed.weights import Value, Weights

_log = logging.getLogger(__name__)

PASSES = 32
"""Most passes that are spent on finding the examples in outputs whose shape does not show them."""

_SIZE = 0.1  # of displacements that do so
_SIGNS = Rademacher()


@dataclass(frozen=True)
class Look:
    """What a look at a net needs to know.

    Attributes:
        objective: the loss.
        module: the net.
        weights: of it.
        seed: of displacements.
        space: from a layer's name to ``"auto"``, ``"activations"`` or ``"weights"``.
        feedback: whether the net's output is looked for.
        patch: side of the patches of a convolution's output that share their noise.
    """

    objective: Objective
    module: nn.Module
    weights: Weights
    seed: int
    space: Callable[[str], str]
    feedback: bool
    patch: int = 1

    def take(self, state: PerExampleState) -> None:
        """Add what one pass shows to a state, which may know some uses already."""
        statistics: dict[str, tuple[Tensor, Tensor]] = {}
        watched = self.watched(state.buffers, statistics=statistics)
        with module_calls(self.module, watched) as calls, self.objective.probe(), watched:
            losses = self.objective.losses()
        if not watched.events and not watched.opaque:
            raise ValueError(
                f"PerExample sees no use of {self.weights.names[0]} or another weight: functions of PyTorch must use "
                "them within the loss; ZerothOrder needs values alone"
            )
        if state.buffers and watched.is_constant(losses):  # they may be of the batch
            state.buffers = False
            self.take(state)
            return
        examples = len(losses)
        state.alone = examples == 1
        layouts = self._layouts(watched.uses, _Search(self, losses, state.buffers, statistics))
        shared = dict(watched.opaque)
        if watched.is_constant(losses):
            shared |= dict.fromkeys(self.weights.names, "the losses depend on nothing but weights")
        else:
            hidden = self._hidden(watched, losses, state)
            shared |= dict.fromkeys(hidden, "NumPy or Python reads it")
            state.hidden |= hidden
        for key, use in watched.uses.items():
            if key not in layouts:
                shape, function = tuple(use.shape), getattr(use.operation.func, "__name__", "a function")
                why = f"no dimension of the output {shape} of {function} holds the {examples} examples"
                shared |= dict.fromkeys((watched.names[id(w)] for w in use.operation.weights), why)
        if shared.keys() - state.shared.keys():
            self._warn(shared | state.shared)
        state.used |= watched.uses.keys()
        state.shared |= shared
        for key, layout in layouts.items():
            use = watched.uses[key]
            if not {watched.names[id(w)] for w in use.operation.weights} <= state.shared.keys():
                state.layers.setdefault(key, self._layer(use, layout, examples))
        if self.feedback:
            self._find_output(calls, watched, losses, state)

    def _hidden(self, watched: DisplacedOutputs, losses: Tensor, state: PerExampleState) -> set[str]:
        """The weights of which the pass showed no use, if moving them changes the losses."""
        names = self.weights.names
        used = {watched.names[id(w)] for use in watched.uses.values() for w in use.operation.weights}
        unseen = {k for k, name in enumerate(names) if name not in used | state.seen | watched.opaque.keys()}
        state.seen |= set(names)
        if not unseen:
            return set()
        points = {k: self.weights[k] + _SIZE * _SIGNS.draw([self.weights[k]], self.seed, -3, 0)[0] for k in unseen}
        moved = self.watched(state.buffers, shared=unseen, value=points.__getitem__)
        with self.objective.probe(), moved:
            return {names[k] for k in unseen} if not torch.equal(self.objective.losses(), losses) else set()

    def _find_output(
        self, calls: list[Call], watched: DisplacedOutputs, losses: Tensor, state: PerExampleState
    ) -> None:
        found = candidates(calls, watched, losses)
        state.output = find_output(self.objective, found, losses, self.seed) if found else None
        state.last = None
        if state.output is None:
            _log.warning(
                "PerExample: no outputs of modules are all that the losses depend on, each on its own example's: no "
                "feedback is learned. Where the loss of an example depends on the outputs of others, as a contrastive "
                "loss does, the estimate is biased: take ZerothOrder"
            )
            return
        if len(state.output.parts) == 1 and watched.uses:
            (k, layout), (key, use) = state.output.parts[0], list(watched.uses.items())[-1]
            made = tensors_of([call.output for call in found])[k]
            layer = state.layers.get(key)
            if use.output is made and use.version == found[-1].version and layer and layer.layout == layout:
                state.last = key

    def watched(
        self,
        buffers: bool,
        displacement: Callable[[Use], Tensor | None] | None = None,
        statistics: dict[str, tuple[Tensor, Tensor]] | None = None,
        shared: Collection[int] = (),
        value: Value | None = None,
    ) -> DisplacedOutputs:
        """The context of a pass."""
        return DisplacedOutputs(
            self.module,
            self.weights,
            displacement,
            1.0,
            statistics,
            shared,
            value,
            shared,
            self.objective.before_write,
            buffers=buffers,
        )

    def _warn(self, shared: Mapping[str, str]) -> None:
        sizes = {name: p.numel() for name, p in zip(self.weights.names, self.weights, strict=True)}
        share = sum(sizes[name] for name in shared) / sum(sizes.values())
        names: dict[str, list[str]] = {}
        for name, why in sorted(shared.items()):
            names.setdefault(why, []).append(name)
        some = [
            f"{', '.join(of[:3])}{f' and {len(of) - 3} more' if len(of) > 3 else ''} ({why})"
            for why, of in names.items()
        ]
        _log.warning(
            "PerExample: %s of %s weights, %.2g %% of the numbers, get one direction for the whole batch, as in "
            "ZerothOrder: %s",
            len(shared),
            len(sizes),
            100 * share,
            "; ".join(some),
        )

    def _layouts(self, uses: Mapping[str, Use], search: "_Search") -> dict[str, Layout]:
        """By key of a use, where its output has the examples; without those for which that cannot be said.

        An output that its shape or a rule does not explain is tried: one example is displaced in layers that are
        known, or in that output itself, and what moves shows where the example is.
        """
        examples = search.examples
        usual = {key for key, use in uses.items() if use.is_by_example(examples)}
        found = {key: FIRST for key in usual if not _is_ambiguous(uses[key], examples)}
        if len(found) < len(uses) and examples > 1:
            search.begin()
            if found:
                found = search.below(found)[0] | found
            for key in [key for key in uses if key not in found]:
                for layout in [] if key in found else layouts_of(uses[key].shape, examples):
                    below, moved = search.below({key: layout})
                    if moved == {search.example}:
                        found = {**below, **found, key: layout}
                        break
        if examples == 1:  # every place is as good
            usual |= {key for key, use in uses.items() if FIRST.fits(use.shape, 1)}
        found = dict.fromkeys(usual, FIRST) | found
        return {key: found[key] for key, use in uses.items() if key in found and _has_derivative(use)}

    def _layer(self, use: Use, layout: Layout, examples: int) -> Layer:
        name, one = use.key.partition(":")[0], use.operation
        chosen = self.space(name)
        numbers = use.output.numel() // examples
        if one.few_weights:
            chosen = "weights"
        elif chosen == "auto":
            fewer = not one.costly_noise and count(one.weights) < numbers
            chosen = "weights" if fewer else "activations"
        joined = use.shape[layout.axis] != examples
        if chosen == "weights" and (joined or not one.takes(layout)):
            chosen = "activations"
        if chosen == "weights" and not one.is_ruled:  # not every function has a forward derivative
            still = [(use.output.new_zeros(examples, w.numel()),) for w in one.weights]
            chosen = chosen if one.can(one.weight_jvp, still) else "activations"
        reader = None if use.tracked is None else use.tracked.only_reader
        gated = reader if isinstance(reader, Use) and isinstance(reader.operation, BatchNormalization) else use
        gate = Gate() if gated.tracked is None else gated.tracked.gate()
        visible = 1.0 if gated.tracked is None else max(gated.tracked.visible() / examples, 1.0)
        has_patches = chosen == "activations" and isinstance(one, Convolution) and layout == FIRST and not joined
        patch = self.patch if has_patches else 1
        layer = Layer(chosen == "weights", visible, layout, joined, gate.rectified, gate.pooled, gated.key, patch)
        dims = float(count(one.weights)) if layer.in_weights else max(visible / math.prod(layer.sides(use.shape)), 1.0)
        return replace(layer, dims=dims)


class _Search:
    """Passes in which one example is displaced, against one in which none is."""

    def __init__(self, look: Look, losses: Tensor, buffers: bool, statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.look, self.losses, self.buffers, self.statistics = look, losses, buffers, statistics
        self.examples, self.example = len(losses), len(losses) - 1
        self.still: dict[str, Tensor] = {}
        self.passes = 0

    def begin(self) -> None:
        """Run the pass in which none is displaced, and which rounds as the others do."""
        self.losses = self._losses(lambda use: self.still.update({use.key: use.output.clone()}))

    def below(self, sources: Mapping[str, Layout]) -> tuple[dict[str, Layout], set[int]]:
        """The layouts of outputs that an example's displacement in ``sources`` reaches, and which losses it moves."""
        found: dict[str, Layout] = {}

        def displaced(use: Use) -> Tensor | None:
            if use.key not in self.still or self.still[use.key].shape != use.shape:
                return None
            if layout := self._moved_in(use.output, self.still[use.key]):
                found[use.key] = layout
            return self._displacement(use.output, sources[use.key]) if use.key in sources else None

        if self.passes >= PASSES:
            return {}, set()
        change = (self._losses(displaced) - self.losses).abs()
        moved = change > 1e-3 * change.max().clamp_min(torch.finfo(change.dtype).tiny)
        return found, set(moved.nonzero().flatten().tolist())

    def _losses(self, displacement: Callable[[Use], Tensor | None]) -> Tensor:
        self.passes += 1
        with self.look.objective.probe(), self.look.watched(self.buffers, displacement, self.statistics):
            return self.look.objective.losses()

    def _displacement(self, output: Tensor, layout: Layout) -> Tensor:
        rows = torch.zeros_like(layout.rows(output, self.examples))
        rows[self.example] = _SIGNS.draw([rows[self.example]], self.look.seed, -3, 0)[0]
        return layout.restore(rows, output.shape) * _SIZE

    def _moved_in(self, output: Tensor, still: Tensor) -> Layout | None:
        """The layout in which what has moved is of that example alone."""
        change = (output - still).abs()
        largest = change.max()
        if not largest > 8 * torch.finfo(output.dtype).eps * still.abs().max():
            return None
        moved = change > 1e-3 * largest
        for layout in layouts_of(output.shape, self.examples):
            by_example = layout.rows(moved, self.examples).any(1)
            if by_example.sum() == by_example[self.example]:
                return layout
        return None


def _is_ambiguous(use: Use, examples: int) -> bool:
    """Whether the examples could as well be in the second dimension of a function that works in any of them."""
    return use.output.ndim > 2 and use.shape[1] == examples and use.operation.takes(Layout(1))


def _has_derivative(use: Use) -> bool:
    return use.operation.is_ruled or use.operation.can(use.operation.weight_vjp, torch.zeros_like(use.output))


def matching(patterns: Mapping[str, str], otherwise: str) -> Callable[[str], str]:
    """From a name to what the first pattern that it matches stands for."""
    return lambda name: next((of for pattern, of in patterns.items() if fnmatchcase(name, pattern)), otherwise)
