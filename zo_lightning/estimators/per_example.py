"""Zeroth order with a direction for every example: one slope per example teaches what one slope per batch cannot."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from zo_lightning.directions import Rademacher, mix
from zo_lightning.estimators.base import Estimate, GradientEstimator, check_samples, resolve_seed, trained
from zo_lightning.feedback import Feedback, Shrinkage
from zo_lightning.layers import Affine, Noise, Operation, count, noise_sizes, weigh
from zo_lightning.objective import Objective
from zo_lightning.output import module_calls, output_of_the_net, replaced_output, watched_output
from zo_lightning.passes import Use, WatchedPass
from zo_lightning.perturbed.state import State
from zo_lightning.stencils import CentralDifference, Stencil

_log = logging.getLogger(__name__)
_SIGNS = Rademacher()

Space = Literal["auto", "activations", "weights"]
_SPACES = ("auto", "activations", "weights")
_LOSS_MU = 1e-2  # displaces the net's output, where the loss alone is asked
_SAMPLE = 2**17  # numbers of a weight that are enough to measure bias and noise by,
_LEAST_ROWS = 8  # in as many rows at least
_SHARED_SCALE = 0.1  # of weights without a rule, against outputs: these are of order 1, weights less


@dataclass(frozen=True)
class PerExample(GradientEstimator):
    """Every example of a batch carries its own noise through every layer, and learns from its own loss.

    Example ``i`` sees each use ``l`` of weights displaced by ``μ δₗᵢ``. Either ``δ = s ξ`` is noise on the output of
    the layer, with random signs ``ξ`` (node perturbation: Dembo & Kailath 1990; for deep nets Ren et al. 2023), or it
    is the change that noise ``s ξ`` on this example's weights makes there (such noise: Flipout, Wen et al. 2018). The
    slope ``cᵢ = (ℓᵢ⁺ − ℓᵢ⁻) / 2μ`` gives the gradient of the example's loss by the output, or by the weights,

    ``ĝₗᵢ = hₗᵢ + λₗ (cᵢ − Σₖ <δₖᵢ, hₖᵢ>) ξₗᵢ / sₗ``,

    and the layer's own formula turns that into the gradient of the weights. ``h`` predicts ``g`` from the gradient of
    the loss by the *net's output* (``Feedback``): where it is good, little is left for noise to find. With
    ``correction=1`` the estimate is unbiased to O(μ²) however bad ``h`` is; the default chooses each layer's ``λ``
    where the mean squared error is smallest (``Shrinkage``). Forward passes only; no autograd graph.

    The gradient by the net's output is measured by asking the loss alone again, with the output displaced one number at
    a time; no layer is run, so these are not counted as forward passes. Neither is the layers' formula for the weights,
    which costs about one. The first step runs one forward pass more, to see how the net uses its weights. Memory: the
    inputs and outputs of all layers in each pass and noise as large, and the maps of ``Feedback``.

    Weights that something without a rule uses (rules: linear, convolutions, embedding, attention, normalisations,
    addition, multiplication) get one direction for the whole batch, as in ``ZerothOrder``, and are named in a log line.
    Examples are dimension 0 of every layer's output.

    Batch normalisation in training mode couples the examples. All passes of a sample take the statistics of its first
    (where its weights are trainable: others stay coupled), so that a loss depends on its own example's noise alone.
    What this leaves out, how a layer acts through the statistics, is put back for the layer right before, if its noise
    is on the output, and for ``h``. It stays out for layers further back: the price is a bias (docs/estimators.md has
    it measured).

    Args:
        stencil: the finite difference. ``mu`` displaces outputs, which are of order 1, so it can be larger than on
            weights.
        samples: ``q`` ≥ 1 noises per example, averaged; ``CentralDifference`` asks 2q forward passes.
        space: where the noise goes: ``"activations"``, ``"weights"``, or ``"auto"``: per layer the one with fewer
            perturbed dimensions, not counting outputs that a ReLU or a max-pooling hides.
        layers: exceptions to ``space``, by patterns of the names of layers' first weights, such as
            ``{"conv*": "weights"}``.
        feedback: rate ``ρ`` in [0, 2) at which ``h`` learns; 0 leaves it out.
        correction: ``λ`` in [0, 1] for all layers, or ``"auto"``.
        balance: adapt the scales ``sₗ`` to the predicted gradients, ``sₗ² ∝ √dimₗ / ‖gₗ‖``, where the sum of the
            layers' variances is smallest; False: to the sizes of the layers only.
        seed: as in ``ZerothOrder``.

    Raises:
        ValueError: an argument is out of its range; in ``backward``, also where the loss closure gives a scalar
            instead of one loss per example, or a weight is used more often than in the first step.
    """

    stencil: Stencil = field(default_factory=lambda: CentralDifference(1e-2))
    samples: int = 1
    space: Space = "auto"
    layers: Mapping[str, Space] = field(default_factory=dict)
    feedback: float = 0.3
    correction: float | Literal["auto"] = "auto"
    balance: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        check_samples(self.samples)
        for space in (self.space, *self.layers.values()):
            if space not in _SPACES:
                raise ValueError(f"space must be one of {', '.join(_SPACES)}, got {space!r}")
        if not 0 <= self.feedback < 2:
            raise ValueError(f"feedback must be in [0, 2), got {self.feedback}")
        if self.correction != "auto" and not (isinstance(self.correction, int | float) and 0 <= self.correction <= 1):
            raise ValueError(f"correction must be 'auto' or in [0, 1], got {self.correction!r}")
        if self.correction == 0 and self.feedback == 0:
            raise ValueError("correction=0 with feedback=0 leaves no estimate: raise one of them")

    needs_example_losses = True
    learns = True

    @property
    def mu(self) -> float:
        """The stencil's."""
        return self.stencil.mu

    def with_mu(self, mu: float) -> Self:
        """The same estimator with another ``mu``."""
        return replace(self, stencil=replace(self.stencil, mu=mu))

    def expected_cosine(self, d: float, share: float = 1.0, examples: int = 1, spread: float = 1.0) -> float:
        """``1 / √(1 + s (d − 1) R / (q B))`` without feedback, whose gain comes on top.

        ``d`` counts the perturbed dimensions of one example, ``s`` is the share of the layers that are perturbed, ``B``
        the number of examples, and ``R`` their spread (``measures.gradient_spread``).
        """
        return 1 / math.sqrt(1 + share * (d - 1) * spread / (self.samples * examples))

    def init(self, module: nn.Module) -> "_Memory":
        """A memory of nothing."""
        return _Memory()

    @torch.no_grad()
    def estimate(
        self, objective: Objective, module: nn.Module, step: int, state: State, lean: bool = False
    ) -> Estimate:
        """Displace every example along ``samples`` noises of its own, and put their slopes together."""
        seed, memory = resolve_seed(self.seed), cast(_Memory, state)
        objective.begin(mix(seed, step))
        params = list(trained(objective, module))
        grads: dict[nn.Parameter, Tensor] = {}
        with objective.guard():
            names = sorted(name for name, p in module.named_parameters() if p.requires_grad)
            if memory.trained != names:  # at first, and when weights were frozen or unfrozen
                memory.trained, memory.layers, memory.shrinkage = [], {}, Shrinkage()
                self._look(objective, module, memory)
                memory.trained = names  # not before: a look that failed is repeated
            total = torch.zeros((), device=params[0].device)
            for index in range(self.samples):
                total += self._sample(objective, module, memory, mix(seed, step, index), grads)
            if self.balance:
                memory.rebalance()
        like = [(p, grads[p] if p in grads else torch.zeros_like(p)) for p in params]
        return Estimate(total / self.samples, [(p, torch.empty_like(p).copy_(g)) for p, g in like])

    def _look(self, objective: Objective, module: nn.Module, memory: "_Memory") -> None:
        """Run the net once, undisturbed, to see how it uses its weights and which module makes its output."""
        watched = WatchedPass(module, _nothing, 0.0, {})
        with module_calls(module, watched) as calls, objective.probe(), watched:
            losses = objective.losses()
        watched.finish()
        uses = {k: u for k, u in watched.uses.items() if u.output.ndim > 1 and len(u.output) == len(losses)}
        alien = {id(w) for k, use in watched.uses.items() if k not in uses for w in use.operation.weights}
        memory.used = set(watched.uses)
        memory.shared = watched.opaque | {watched.names[i] for i in alien}
        if memory.shared:
            _log.warning(
                "%s: no rule covers the use of %s: one direction for the whole batch, as in ZerothOrder",
                type(self).__name__,
                ", ".join(sorted(memory.shared)),
            )
        for key, use in uses.items():
            if not {watched.names[id(w)] for w in use.operation.weights} <= memory.shared:
                memory.layers[key] = self._layer(key, use)
        if self.feedback:
            memory.net, memory.last = output_of_the_net(calls, watched, len(losses))
            if memory.net is None:
                _log.warning(
                    "%s: no module's output [B, C] leads to the loss alone: no feedback is learned", type(self).__name__
                )

    def _layer(self, key: str, use: Use) -> "_Layer":
        in_weights = float(count(use.operation.weights))
        visible = use.output[0].numel() if use.visible is None else use.visible.flatten(1).sum(1).mean()
        in_activations = max(float(visible), 1.0)
        chosen = next(
            (space for pattern, space in self.layers.items() if fnmatchcase(key.partition(":")[0], pattern)), self.space
        )
        if chosen == "auto":
            chosen = "weights" if in_weights < in_activations else "activations"
        if isinstance(use.operation, Affine):
            chosen = "weights"
        return _Layer(chosen == "weights", in_weights if chosen == "weights" else in_activations)

    def _sample(
        self, objective: Objective, module: nn.Module, memory: "_Memory", seed: int, grads: dict[nn.Parameter, Tensor]
    ) -> Tensor:
        """Add the estimate from one noise per example to ``.grad``, and learn from it; returns the loss."""
        noise = _Noise(seed, memory)
        shared = _SharedDirection(module, memory.shared, seed)
        statistics: dict[str, tuple[Tensor, Tensor]] = {}
        losses, passes, outputs = [], [], []
        try:
            for offset in self.stencil.offsets:
                shared.move_to(offset * self.stencil.mu)
                watched = WatchedPass(module, noise, offset * self.stencil.mu, statistics)
                with watched_output(module, memory.net) as output, objective.probe(), watched:
                    losses.append(objective.losses())
                watched.finish()
                passes.append(watched)
                outputs += output
        finally:
            shared.move_to(0.0)
        self._check_uses(passes[0], memory, len(losses[0]))
        slope = self._difference(losses)
        error = None
        if self.feedback and memory.net is not None:
            output = torch.stack(outputs).to(torch.promote_types(outputs[0].dtype, torch.float32)).mean(0)
            error = self._error(objective, module, memory.net, output)
        seen = [
            _Seen(key, layer, [one.uses[key] for one in passes], noise)
            for key, layer in memory.layers.items()
            if all(key in one.uses for one in passes)
        ]
        for layer in seen:
            if error is not None and layer.key == memory.last:
                layer.h = error.to(layer.like.dtype)
            else:
                slope -= layer.predict(memory.feedback, error)
        for layer in seen:
            found = self._gradients(layer, slope / len(slope), memory.shrinkage)
            for p, grad in zip(layer.operation.weights, found, strict=True):
                if not shared.has(p):
                    grad /= self.samples
                    grads[p] = grads[p].add_(grad) if p in grads else grad
        shared.accumulate(float(slope.mean()) / self.samples, grads)
        if error is not None:
            displaced = {one.key: one.delta for one in seen if one.delta is not None}
            memory.feedback.learn(displaced, self._difference(outputs), self.feedback)
        return torch.stack(losses).mean()

    def _check_uses(self, watched: WatchedPass, memory: "_Memory", examples: int) -> None:
        """Refuse uses of weights that the first step did not show, and outputs that turn out not to be of examples."""
        if unknown := (watched.uses.keys() - memory.used) | (watched.opaque - memory.shared):
            raise ValueError(
                f"{type(self).__name__} needs to see all uses of weights in its first step: "
                f"{', '.join(sorted(unknown))} is new"
            )
        for key in memory.layers.keys() & watched.uses.keys():
            if (rows := len(watched.uses[key].output)) != examples:
                raise ValueError(
                    f"the output of {key} has {rows} rows for {examples} examples: {type(self).__name__} needs "
                    "examples as dimension 0 of every layer's output; freeze the weight, or use it in another way"
                )

    def _difference(self, values: list[Tensor]) -> Tensor:
        """The stencil's difference quotient of tensors, in float32 at least."""
        dtype = torch.promote_types(values[0].dtype, torch.float32)
        weights = torch.tensor(self.stencil.coefficients, dtype=dtype, device=values[0].device)
        # Not as a matrix product, whose precision autocast would lower.
        return (torch.stack(values, -1).to(dtype) * weights).sum(-1) / self.stencil.mu

    def _gradients(self, layer: "_Seen", slope: Tensor, shrinkage: Shrinkage) -> list[Tensor]:
        """The gradient of each weight of a layer, from slopes [B] that were divided by the number of examples."""
        if layer.delta is None or (layer.h is not None and self.correction == 0):
            return layer.gradients(None)
        correction = layer.correction(slope)
        if layer.h is None:
            return layer.gradients(correction)
        trust = self.correction
        if trust == "auto":
            trust = shrinkage.measure(layer.key, layer.sample(correction))
        return layer.gradients(correction, float(trust))

    def _error(self, objective: Objective, module: nn.Module, net: str, output: Tensor) -> Tensor:
        """The gradient [B, C] of each example's loss by the net's output."""
        error = torch.empty_like(output)
        for c in range(output.shape[1]):
            ends = []
            for mu in (_LOSS_MU, -_LOSS_MU):
                moved = output.clone()
                moved[:, c] += mu
                with objective.probe(cost=0), replaced_output(module, net, moved):
                    ends.append(objective.losses())
            error[:, c] = (ends[0] - ends[1]) / (2 * _LOSS_MU)
        return error


@dataclass(frozen=True)
class ActivationPerturbation(PerExample):
    """Node perturbation: every layer's noise is on its output, except normalisations' (``PerExample`` has the rest)."""

    space: Space = "activations"


@dataclass(frozen=True)
class ExampleDirections(PerExample):
    """Every example perturbs the weights, each in a direction of its own (``PerExample`` has the rest)."""

    space: Space = "weights"


@dataclass
class _Layer:
    """What is known of one use of weights.

    Attributes:
        in_weights: whether its noise is on the weights.
        dims: how many numbers of it the loss can depend on.
        scale: ``s`` of its noise.
        power: mean square of its output's displacement at scale 1; 0 until it was displaced.
        norm: running mean of ``‖g‖²`` by what the noise is on.
    """

    in_weights: bool
    dims: float
    scale: float = 1.0
    power: float = 0.0
    norm: float = 0.0

    def begin(self, power: float) -> None:
        """Choose the first scale: as if the gradients by all outputs had the same norm."""
        self.power = self.norm = power
        self.scale = 1 / math.sqrt(power)


class _Memory(State):
    """What an estimator knows of one module: how it uses its weights, and what was learned."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[str] = []  # names of the weights that the look below was for
        self.layers: dict[str, _Layer] = {}
        self.used: set[str] = set()  # keys of all uses
        self.shared: set[str] = set()  # names of weights that no rule covers
        self.net: str | None = None  # name of the module that makes the net's output
        self.last: str | None = None  # key of the use that makes it
        self.feedback = Feedback()
        self.shrinkage = Shrinkage()

    def rebalance(self) -> None:
        """Set ``sₗ² ∝ √dimₗ / ‖gₗ‖``, so that the largest displacement has mean square 1."""
        layers = [layer for layer in self.layers.values() if layer.power]
        for layer in layers:
            layer.scale = (layer.dims / max(layer.norm, 1e-30)) ** 0.25
        largest = max((layer.scale * math.sqrt(layer.power) for layer in layers), default=1.0)
        for layer in layers:
            layer.scale /= largest

    def state_dict(self) -> dict[str, Any]:
        return {
            "trained": list(self.trained),
            "used": sorted(self.used),
            "layers": {key: dict(vars(layer)) for key, layer in self.layers.items()},
            "shared": sorted(self.shared),
            "net": self.net,
            "last": self.last,
            "feedback": self.feedback.state_dict(),
            "shrinkage": self.shrinkage.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layers = {key: _Layer(**layer) for key, layer in state["layers"].items()}
        self.trained, self.used = list(state["trained"]), set(state["used"])
        self.shared = set(state["shared"])
        self.net, self.last = state["net"], state["last"]
        self.feedback.load_state_dict(state["feedback"])
        self.shrinkage.load_state_dict(state["shrinkage"])


class _Noise:
    """The displacements of one sample, the same in each of its passes: a ``Displacement``.

    Attributes:
        delta: by key, ``s ξ`` on outputs, or what ``s ξ`` on weights made of them in the first pass.
        of_weights: by key, the signs ``ξ`` on the weights.
    """

    def __init__(self, seed: int, memory: _Memory) -> None:
        self.seed = seed
        self.memory = memory
        self.positions = {key: position for position, key in enumerate(memory.layers)}
        self.delta: dict[str, Tensor] = {}
        self.of_weights: dict[str, list[Noise]] = {}

    def __call__(self, key: str, operation: Operation, output: Tensor) -> Tensor | None:
        if key not in self.positions or key == self.memory.last:
            return None
        if key not in self.delta:
            self.delta[key] = self._draw(key, self.memory.layers[key], operation, output)
        return self.delta[key]

    def _draw(self, key: str, layer: _Layer, operation: Operation, output: Tensor) -> Tensor:
        if not layer.in_weights:
            delta = self._signs(key, [output])[0]
        else:
            sizes = [noise_sizes(w, output) for w in operation.weights]
            signs = iter(self._signs(key, [output.new_empty(len(output), n) for parts in sizes for n in parts]))
            self.of_weights[key] = [tuple(next(signs) for _ in parts) for parts in sizes]
            delta = operation.spread(self.of_weights[key])
        if not layer.power and (power := float(delta.square().mean())):
            layer.begin(power)
        return delta * layer.scale  # not in place: what bias noise made is one number seen many times

    def _signs(self, key: str, places: list[Tensor]) -> list[Tensor]:
        return _SIGNS.draw(places, self.seed, self.positions[key], 0).tensors()


# To the gradient of the mean loss: by each example's output [B, ...], or by each weight where the noise is on weights.
_Correction = Tensor | list[Tensor]


class _Seen:
    """One use of weights in the passes of one sample, on its way to a gradient.

    Attributes:
        delta: the displacement of its output where the loss could depend on it, or None: it had none.
        h: the predicted gradient of each example's loss by its output, or None.
    """

    def __init__(self, key: str, layer: _Layer, uses: list[Use], noise: _Noise) -> None:
        self.key = key
        self.layer = layer
        self.operation = uses[0].operation
        self.follower = uses[0].follower
        self.like = uses[0].output
        self.mask = _mask(uses)
        self.signs = noise.of_weights.get(key)
        self.delta = noise.delta.get(key)
        if self.delta is not None and self.mask is not None:
            self.delta.mul_(self.mask)
        self.h: Tensor | None = None

    def predict(self, feedback: Feedback, error: Tensor | None) -> Tensor | float:
        """Predict ``h``, and return the slopes [B] that it implies along the displacement."""
        if error is None or self.delta is None:
            return 0.0
        self.h = feedback.predict(self.key, error, self.like, self.mask)
        if self.h is None:
            return 0.0
        along = torch.bmm(self.delta.flatten(1).unsqueeze(1), self.h.flatten(1).unsqueeze(2)).flatten()
        norm = float(along.square().mean()) / self.layer.scale**2
        self.layer.norm += 0.01 * (norm - self.layer.norm)
        return along

    def correction(self, slope: Tensor) -> _Correction:
        """What slopes [B] along the noise say."""
        if self.signs is not None:
            pairs = zip(self.signs, self.operation.weights, strict=True)
            return [weigh(n, (slope / self.layer.scale).to(n[0].dtype), w).to(w.dtype) for n, w in pairs]
        assert self.delta is not None
        factors = (slope / self.layer.scale**2).to(self.delta.dtype)
        return self.delta * factors.view(-1, *[1] * (self.delta.ndim - 1))

    def sample(self, correction: _Correction) -> list[Tensor]:
        """A correction of the weights, or of every n-th row of weights so large that this saves time and memory."""
        weights = self.operation.weights
        every = 1
        if self.operation.rows_are_alike and (parts := max(w.numel() for w in weights) // _SAMPLE) > 1:
            every = max(1, min(parts, len(weights[0]) // _LEAST_ROWS))
        if isinstance(correction, Tensor):
            return self._collect(correction, every)
        return [part[::every] for part in correction] if every > 1 else correction

    def gradients(self, correction: _Correction | None, trust: float = 1.0) -> list[Tensor]:
        """The gradient of each weight of the mean loss: the prediction plus ``trust`` times the correction."""
        if self.h is None:
            assert correction is not None
            return self._collect(correction) if isinstance(correction, Tensor) else correction
        if isinstance(correction, Tensor):  # both at once
            return self._collect(correction.mul_(trust).add_(self.h, alpha=1 / len(self.h)))
        grads = self._collect(self.h / len(self.h))
        if correction is not None:
            for grad, part in zip(grads, correction, strict=True):
                grad.add_(part, alpha=trust)
        return grads

    def _collect(self, delta: Tensor, every: int = 1) -> list[Tensor]:
        delta = delta if self.follower is None else self.follower.project(delta)
        weights = self.operation.weights  # under autocast of another dtype than the outputs
        with torch.autocast(delta.device.type, enabled=False):
            grads = self.operation.collect(delta.to(weights[0].dtype), every)
        return [grad.to(w.dtype) for grad, w in zip(grads, weights, strict=True)]


def _mask(uses: list[Use]) -> Tensor | None:
    """1 where the loss could depend on the output in one pass at least, else 0; None: everywhere."""
    visible = [use.visible for use in uses if use.visible is not None]
    return reduce(torch.maximum, visible) if len(visible) == len(uses) else None


class _SharedDirection:
    """One direction of the whole batch for the weights that no rule covers."""

    def __init__(self, module: nn.Module, names: set[str], seed: int) -> None:
        self.params = [p for name, p in module.named_parameters() if name in names]
        self._ids = {id(p) for p in self.params}
        self._saved = [p.detach().clone() for p in self.params]
        self._u = _SIGNS.draw(self.params, seed, -1, 0).tensors()

    def has(self, p: nn.Parameter) -> bool:
        return id(p) in self._ids

    def move_to(self, offset: float) -> None:
        for p, saved, u in zip(self.params, self._saved, self._u, strict=True):
            torch.add(saved, u, alpha=offset * _SHARED_SCALE, out=p.data) if offset else p.data.copy_(saved)

    def accumulate(self, slope: float, grads: dict[nn.Parameter, Tensor]) -> None:
        for p, u in zip(self.params, self._u, strict=True):
            grad = u * (slope / _SHARED_SCALE)
            grads[p] = grads[p].add_(grad) if p in grads else grad


def _nothing(key: str, operation: Operation, output: Tensor) -> None:
    return None
