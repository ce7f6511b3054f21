"""Zeroth order with a direction for every example: one slope per example teaches what one slope per batch cannot."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from zo_lightning.counter import mix
from zo_lightning.distributed import Distributed, finite_everywhere
from zo_lightning.estimators.base import (
    Estimate,
    GradientEstimator,
    Loss,
    check_samples,
    like_weight,
    resolve_seed,
    trained,
)
from zo_lightning.estimators.per_example.feedback import Shrinkage
from zo_lightning.estimators.per_example.look import Look, matching
from zo_lightning.estimators.per_example.loss_alone import LossAlone
from zo_lightning.estimators.per_example.noise import OutputNoise, Seen, SharedNoise
from zo_lightning.estimators.per_example.output import returned_by, summed
from zo_lightning.estimators.per_example.sizes import predicted
from zo_lightning.estimators.per_example.state import PerExampleState
from zo_lightning.objective import Objective
from zo_lightning.parameters import Parameters, as_parameters
from zo_lightning.perturbed.outputs import DisplacedOutputs, Use
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights
from zo_lightning.stencils import CentralDifference, Stencil

Space = Literal["auto", "activations", "weights"]
_SPACES = ("auto", "activations", "weights")
_WAYS = ("auto", "values")


@dataclass(frozen=True)
class PerExample(GradientEstimator):
    """Every example of a batch carries its own noise through every layer, and learns from its own loss.

    Example ``i`` sees each use ``l`` of weights displaced by ``μ δₗᵢ``. Either ``δ = s ξ`` is noise on the output of
    the layer, with random signs ``ξ`` (node perturbation: Dembo & Kailath 1990; for deep nets Ren et al. 2023), or it
    is the change that noise ``s ξ`` on this example's weights makes there (such noise: Flipout, Wen et al. 2018). The
    slope ``cᵢ = (ℓᵢ⁺ − ℓᵢ⁻) / 2μ`` gives the gradient of the example's loss by the output, or by the weights,

    ``ĝₗᵢ = hₗᵢ + λₗ (cᵢ − Σₖ <δₖᵢ, hₖᵢ>) ξₗᵢ / sₗ``,

    and the adjoint of the layer alone turns that into the gradient of the weights. ``h`` predicts ``g`` from the
    gradient of the loss by the *net's output* (``Feedback``): where it is good, little is left for noise to find. With
    ``correction=1`` the estimate is unbiased to O(μ²) however bad ``h`` is; the default chooses each layer's ``λ``
    where the mean squared error is smallest (``Shrinkage``). Along a layer's own weights, where errors add up, its
    gradient is taken from what larger weights do to the net's output (``Sizes``).

    No graph is built through the net, and no layer is run backwards. The gradient of the *loss* by the net's output,
    such as softmax minus target, is another matter: it is asked of autograd through the loss function alone, if that
    has a gradient and its values agree with it (tried once). Where it has none, as a metric of NumPy, or with
    ``loss_gradient="values"``, it is measured by asking the loss alone for its values, with the output displaced:
    twice for each output up to 16, and for more along 16 random directions. Neither runs a layer, so neither counts as
    a forward pass. The layers' adjoints cost about one forward pass, in floating-point operations. The first step runs
    one pass more, to see how the net uses its weights, or three where shapes do not say where the examples are; so does
    a step that uses weights as none before. ``Sizes`` takes two more for each layer, one layer a step, and then two in
    one step in fifty. Memory: the inputs and outputs of all layers in each pass, noise as large, and the maps.

    Layers are displaced by the rules of ``perturbed.layers``; any other function of PyTorch with weights among its
    arguments is differentiated on its own. Where its output has the examples is seen from its shape, or tried: one
    example is displaced, and what moves is its own. Weights that are used in another way (TorchScript, packed
    sequences) get one direction for the whole batch, as in ``ZerothOrder``, and are named in a log line;
    ``shared_weights`` tells which. Compiled code runs as it was written.

    Batch normalisation in training mode couples the examples. All passes of a sample take the statistics of its first
    (where its weights are trainable: others stay coupled), so that a loss depends on its own example's noise alone.
    What this leaves out, how a layer acts through the statistics, is put back for the layer right before, if its noise
    is on the output, and for ``h``. It stays out for layers further back: the price is a bias (docs/estimators.md has
    it measured).

    Args:
        stencil: the finite difference. ``mu`` displaces outputs, which are of order 1, so it can be larger than on
            weights.
        samples: ``q`` ≥ 1 noises per example, averaged; ``CentralDifference`` asks 2q forward passes.
        space: where the noise goes: ``"activations"``, ``"weights"``, or ``"auto"``: on the outputs of convolutions,
            on the weights of normalisations and their like, else per layer where fewer dimensions are perturbed.
        layers: exceptions to ``space``, by patterns of the names of layers' first weights, such as
            ``{"conv*": "weights"}``.
        patch: side of the patches of a convolution's output that share their noise, at most a quarter of its length. A
            deep net on large images has too many outputs for each to have noise of its own: fewer are learned sooner.
            Above 1 what is found is the mean gradient of a patch, and ``correction=1`` is biased by what that blurs.
        feedback: rate ``ρ`` in [0, 2) at which ``h`` learns; 0 leaves it out.
        correction: ``λ`` in [0, 1] for all layers, or ``"auto"``.
        loss_gradient: ``"auto"`` as above, or ``"values"``: never autograd.
        seed: as in ``ZerothOrder``.
        distributed: how several processes share the work of a step. Their estimates are averaged, each as large as the
            weights; ``h`` is learned by each from what it sees, and a checkpoint keeps that of rank zero.

    Raises:
        ValueError: an argument is out of its range; in ``backward``, also where the loss closure gives a scalar
            instead of one loss per example, or the passes of one step use different weights.
    """

    stencil: Stencil = field(default_factory=lambda: CentralDifference(1e-2))
    samples: int = 1
    space: Space = "auto"
    layers: Mapping[str, Space] = field(default_factory=dict)
    patch: int = 1
    feedback: float = 0.3
    correction: float | Literal["auto"] = "auto"
    loss_gradient: Literal["auto", "values"] = "auto"
    seed: int | None = None
    distributed: Distributed = field(default_factory=Distributed)

    needs_example_losses = True
    learns = True

    def __post_init__(self) -> None:
        check_samples(self.samples)
        for space in (self.space, *self.layers.values()):
            if space not in _SPACES:
                raise ValueError(f"space must be one of {', '.join(_SPACES)}, got {space!r}")
        if self.patch < 1:
            raise ValueError(f"patch must be at least 1, got {self.patch}")
        if not 0 <= self.feedback < 2:
            raise ValueError(f"feedback must be in [0, 2), got {self.feedback}")
        if self.correction != "auto" and not (isinstance(self.correction, int | float) and 0 <= self.correction <= 1):
            raise ValueError(f"correction must be 'auto' or in [0, 1], got {self.correction!r}")
        if self.correction == 0 and self.feedback == 0:
            raise ValueError("correction=0 with feedback=0 leaves no estimate: raise one of them")
        if self.loss_gradient not in _WAYS:
            raise ValueError(f"loss_gradient must be one of {', '.join(_WAYS)}, got {self.loss_gradient!r}")

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

    def init(self, module: Parameters) -> PerExampleState:
        """A state that knows nothing."""
        return PerExampleState()

    def phase(self, state: State) -> tuple[bool, bool]:
        """Whether the step measures how far its predictions are off, and a layer that is new."""
        known = cast(PerExampleState, state)
        return known.steps % Shrinkage.EVERY == 0, known.sizes.left > 0

    @torch.no_grad()
    def estimate(
        self, objective: Objective, module: nn.Module, step: int, state: State, lean: bool = False
    ) -> Estimate:
        """Displace every example along ``samples`` noises of its own, and put their slopes together."""
        seed, known = resolve_seed(self.seed), cast(PerExampleState, state)
        objective.begin(mix(seed, step))
        weights = trained(objective, module)
        grads: dict[nn.Parameter, Tensor] = {}
        own, stream = self.distributed.own(self.samples), self.distributed.stream
        with finite_everywhere(weights[0].device, step), objective.guard(), as_parameters(weights):
            if known.trained != weights.names:  # at first, and when weights were frozen or unfrozen
                known.begin([])  # a look that failed is repeated
                self._look(objective, module, weights, known, mix(seed, step))
                known.trained = weights.names
            total = torch.zeros((), device=weights[0].device)
            for index in own:
                sample = mix(seed, step, index, *stream)
                try:
                    total += self._sample(objective, module, weights, known, sample, grads)
                except _Unseen as unseen:
                    if known.alone:
                        known.begin(weights.names)
                    for key in unseen.keys:
                        known.layers.pop(key, None)
                    self._look(objective, module, weights, known, mix(seed, step))
                    total += self._sample(objective, module, weights, known, sample, grads)
        known.steps += 1
        estimate = Estimate(total / len(own), [(p, _like(p, grads.get(p), len(own))) for p in weights])
        means = [estimate.loss, *(gradient for _, gradient in estimate.gradients)]
        self.distributed.reduce(means, self.samples, weights, seed, step)
        return estimate

    def shared_weights(self, loss: Loss | Objective, module: nn.Module) -> dict[str, str]:
        """The weights that would get one direction for the whole batch, by name, and why: what no rule covers.

        Args:
            loss: as for ``backward``.
            module: owns the weights.
        """
        objective, state = Objective.of(loss, module), self.init(module)
        with objective.guard(), as_parameters(weights := trained(objective, module)):
            self._look(objective, module, weights, state, resolve_seed(self.seed))
        return dict(state.shared)

    def _look(
        self, objective: Objective, module: nn.Module, weights: Weights, state: PerExampleState, seed: int
    ) -> None:
        """See how the net uses its weights, in one undisturbed pass or a few more."""
        space = matching(self.layers, self.space)
        Look(objective, module, weights, seed, space, bool(self.feedback), self.patch).take(state)

    def _sample(
        self,
        objective: Objective,
        module: nn.Module,
        weights: Weights,
        state: PerExampleState,
        seed: int,
        grads: dict[nn.Parameter, Tensor],
    ) -> Tensor:
        """Add the estimate from one noise per example to ``grads``, and learn from it; returns the loss."""
        noise = OutputNoise(seed, {key: layer for key, layer in state.layers.items() if key != state.last})
        shared = SharedNoise(weights, set(state.shared), seed)
        gates = {layer.normalized_by: layer.gate for layer in state.layers.values()}
        statistics: dict[str, tuple[Tensor, Tensor]] = {}
        uses: dict[str, Use] = {}
        seen: Set[str] = set()
        losses: list[Tensor] = []
        outputs: list[Tensor] = []
        returned: list[Any] = []
        for offset in self.stencil.offsets:
            distance = offset * self.stencil.mu
            value = shared.displaced(distance).__getitem__ if shared.positions else None
            in_place = weights.opaque | shared.positions_of(state.hidden)
            watched = DisplacedOutputs(
                module,
                weights,
                noise,
                distance,
                statistics,
                shared.positions,
                value,
                in_place,
                objective.before_write,
                {} if uses else gates,
                state.buffers,
            )
            with returned_by(module, state.output) as output, objective.probe(), watched:
                losses.append(objective.losses())
            self._check_uses(watched, state, len(losses[0]))
            seen = seen & watched.uses.keys() if uses else watched.uses.keys()
            uses = uses or watched.uses
            for use in watched.uses.values():
                use.release()
            returned = returned or output
            if state.output is not None:
                outputs.append(state.output.read(output, len(losses[0])))
        y, exact = self._error(objective, outputs, returned, state, seed)
        error = None if exact is None else summed(exact)
        largest = None if error is None else state.feedback.used(error)
        layers = [Seen(key, one, uses, noise, len(losses[0])) for key, one in state.layers.items() if key in seen]
        for layer in layers:
            if exact is not None and layer.key == state.last:
                layer.h = exact.to(layer.use.output.dtype)
            else:
                layer.predict(state.feedback, error, largest)
        slope = self.stencil.quotient(losses) / len(losses[0])
        mean_slope = float(slope.sum()) if shared.params else 0.0
        trusts = [self._trust(layer, state) for layer in layers]
        measured = self.correction == "auto" and state.steps % Shrinkage.EVERY == 0
        if measured or any(trusts):
            slope -= sum(layer.predicted_slope() for layer in layers)
        own = {id(p) for p in shared.params}
        found: dict[nn.Parameter, Tensor] = {}
        for k, (layer, trust) in enumerate(zip(layers, trusts, strict=True)):
            correction = layer.correction(slope) if layer.delta is not None and (trust or measured) else None
            if measured and layer.h is not None and correction is not None:
                trust = trusts[k] = state.shrinkage.measure(layer.key, layer.by_weights(correction))
            each = zip(layer.use.operation.weights, layer.gradients(correction if trust else None, trust), strict=True)
            _add(found, [one for one in each if id(one[0]) not in own])
        if exact is not None and state.output is not None and self.correction == "auto":
            sized = predicted(layers, own)
            by_feedback = [layers[k] for k in sized]
            if not grads:  # the first sample of the step
                state.sizes.measure(objective, module, state.output, exact, by_feedback, state.steps)
            state.sizes.correct(by_feedback, [1 - trusts[k] for k in sized], found, y, exact)
        _add(grads, [*found.items(), *shared.gradients(mean_slope)])
        if error is not None:
            displaced = {one.key: one.delta for one in layers if one.delta is not None}
            state.feedback.learn(displaced, summed(self.stencil.quotient(outputs)), error, self.feedback)
        return torch.stack(losses).mean()

    def _check_uses(self, watched: DisplacedOutputs, state: PerExampleState, examples: int) -> None:
        """Ask for another look where weights are used as never before, or outputs turn out not to be of examples."""
        if unknown := (watched.uses.keys() - state.used) | (watched.opaque.keys() - state.shared.keys()):
            raise _Unseen(
                f"{type(self).__name__} needs passes of one step to use the same weights, and "
                f"{', '.join(sorted(unknown))} comes and goes"
            )
        if state.alone and examples > 1:
            raise _Unseen("the first batch had one example, which does not show where examples are")
        for key in state.layers.keys() & watched.uses.keys():
            shape, layer = watched.uses[key].shape, state.layers[key]
            if not layer.fits(shape, examples):
                raise _Unseen(
                    f"the output {tuple(shape)} of {key} does not hold {examples} examples in dimension "
                    f"{layer.layout.axis}: {type(self).__name__} needs them in one place of every layer's output; "
                    "freeze the weight, or use it in another way",
                    key,
                )

    def _error(
        self, objective: Objective, outputs: list[Tensor], returned: list[Any], state: PerExampleState, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """The net's output [B, C] and the gradient of the mean loss by it, if that is known."""
        if state.output is None:
            return torch.empty(0), None
        rows = torch.stack(outputs).to(torch.promote_types(outputs[0].dtype, torch.float32)).mean(0)
        alone = LossAlone(objective, state.output, returned)
        if state.is_smooth is None:  # at first
            alone.say_if_coupled(rows, seed)
            state.is_smooth = self.loss_gradient == "auto" and alone.is_smooth(rows, seed)
        if state.is_smooth and self.loss_gradient == "auto" and (error := alone.by_autograd(rows)) is not None:
            return rows, error.div_(len(error))
        return rows, alone.by_values(rows, seed).div_(len(rows))

    def _trust(self, layer: Seen, state: PerExampleState) -> float:
        """The weight ``λ`` of what the noise says about a layer: all that there is, where nothing was predicted."""
        if layer.h is None:
            return 1.0
        return state.shrinkage.trust(layer.key) if self.correction == "auto" else float(self.correction)


class _Unseen(ValueError):
    """A pass was not like those that were looked at."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys  # of uses about which the state is wrong


def _add(grads: dict[nn.Parameter, Tensor], found: list[tuple[nn.Parameter, Tensor]]) -> None:
    for p, grad in found:
        grads[p] = grads[p] + grad if p in grads else grad


def _like(p: nn.Parameter, grad: Tensor | None, samples: int) -> Tensor:
    """The mean of some samples as a tensor with the strides of its weight."""
    return like_weight(p, grad if grad is None or samples == 1 else grad / samples)
