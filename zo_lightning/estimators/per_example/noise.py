"""The noise of one sample, and the gradients that slopes along it tell."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zo_lightning.directions import Rademacher
from zo_lightning.estimators.per_example.feedback import Feedback
from zo_lightning.estimators.per_example.state import Layer
from zo_lightning.perturbed.affine import BatchNormalization
from zo_lightning.perturbed.layouts import FIRST
from zo_lightning.perturbed.outputs import Use
from zo_lightning.perturbed.rules import Noise, noise_sizes, weigh
from zo_lightning.perturbed.weights import Weights

_SIGNS = Rademacher()
_SHARED_SCALE = 0.1  # of weights that all examples share, against outputs: these are of order 1, weights less


class OutputNoise:
    """The displacements of one sample, the same in each of its passes: a ``Displacement``.

    Args:
        seed: of the sample.
        layers: to be displaced, by key.

    Attributes:
        delta: by key, ``s ξ`` on outputs, or what ``s ξ`` on weights made of them in the first pass.
        of_weights: by key, the signs ``ξ`` on the weights.
    """

    def __init__(self, seed: int, layers: Mapping[str, Layer]) -> None:
        self.seed, self.layers = seed, layers
        self.positions = {key: position for position, key in enumerate(layers)}
        self.delta: dict[str, Tensor] = {}
        self.of_weights: dict[str, list[Noise]] = {}

    def __call__(self, use: Use) -> Tensor | None:
        """The displacement of a use's output, [B, ...]."""
        if use.key not in self.delta and use.key in self.layers:
            self.delta[use.key] = self._draw(use, self.layers[use.key])
        return self.delta.get(use.key)

    def _draw(self, use: Use, layer: Layer) -> Tensor:
        if not layer.in_weights:
            return self._draw_on_output(use, layer)
        output, layout = use.output, layer.layout
        examples = output.shape[layout.axis]
        sizes = [noise_sizes(w, output.numel() // examples) for w in use.operation.weights]
        signs = iter(self._signs(use.key, [output.new_empty(examples, n) for parts in sizes for n in parts]))
        noise = self.of_weights[use.key] = [tuple(next(signs) for _ in parts) for parts in sizes]
        delta = use.operation.weight_jvp(noise) if layout == FIRST else use.operation.weight_jvp_in(layout, noise)
        if not layer.scale and (power := float(delta.square().mean())):
            layer.begin(power)
        return delta * layer.scale  # not in place: what bias noise made is one number seen many times

    def _draw_on_output(self, use: Use, layer: Layer) -> Tensor:
        sides = layer.sides(use.shape)
        layer.scale = math.sqrt(math.prod(sides))
        if layer.scale == 1:
            return self._signs(use.key, [use.output])[0]
        sizes = use.shape[2:]
        place = use.output.new_empty(*use.shape[:2], *(-(-n // side) for n, side in zip(sizes, sides, strict=True)))
        signs = self._signs(use.key, [place])[0]
        for d, (n, side) in enumerate(zip(sizes, sides, strict=True), 2):
            signs = signs.repeat_interleave(side, d).narrow(d, 0, n)
        return signs

    def _signs(self, key: str, places: list[Tensor]) -> list[Tensor]:
        return _SIGNS.draw(places, self.seed, self.positions[key], 0).tensors()


class SharedNoise:
    """One direction for all examples, of the weights whose uses cannot be displaced one by one."""

    def __init__(self, weights: Weights, names: set[str], seed: int) -> None:
        self.positions = [k for k, name in enumerate(weights.names) if name in names]
        self.names = [weights.names[k] for k in self.positions]
        self.params = [weights.params[k] for k in self.positions]
        still = {k: weights.still[position] for k, position in enumerate(self.positions) if position in weights.still}
        u = _SIGNS.draw(self.params, seed, -1, 0, still).tensors()
        self.u = dict(zip(self.positions, u, strict=True))

    def positions_of(self, names: set[str]) -> set[int]:
        """The positions of some of these weights."""
        return {k for k, name in zip(self.positions, self.names, strict=True) if name in names}

    def displaced(self, offset: float) -> dict[int, Tensor]:
        """What the uses of these weights see, by position."""
        pairs = zip(self.positions, self.params, strict=True)
        return {k: torch.add(p.detach(), self.u[k], alpha=offset * _SHARED_SCALE) for k, p in pairs}

    def gradients(self, slope: float) -> list[tuple[nn.Parameter, Tensor]]:
        """What the slope of the mean loss says."""
        pairs = zip(self.positions, self.params, strict=True)
        return [(p, self.u[k] * (slope / _SHARED_SCALE)) for k, p in pairs]


# To the gradient of the mean loss: by what the loss sees of each example's output [B, n], or by each weight.
Correction = Tensor | list[Tensor]


class Seen:
    """One use of weights in the passes of one sample, on its way to a gradient.

    Args:
        key: of the use.
        layer: what is known of it.
        uses: all uses of the first pass.
        noise: of the sample.
        examples: in the batch.

    Attributes:
        delta: the displacement of what the loss saw of its output, [B, n], or None: it had none.
        h: the predicted gradient of the mean loss by that, or None.
    """

    def __init__(self, key: str, layer: Layer, uses: Mapping[str, Use], noise: OutputNoise, examples: int) -> None:
        self.key, self.layer, self.examples = key, layer, examples
        self.use = uses[key]
        self.gate = uses.get(layer.normalized_by, self.use)
        self.signs = noise.of_weights.get(key)
        delta = noise.delta.pop(key, None)
        self.delta = None if delta is None else layer.layout.rows(self.gate.visible(delta), examples)
        self.h: Tensor | None = None

    def predict(self, feedback: Feedback, error: Tensor | None, largest: Tensor | None) -> None:
        """Predict ``h`` from the gradient of the mean loss by the net's output."""
        if error is not None and self.delta is not None:
            positive = self.gate.positive
            positive = None if positive is None else self.layer.layout.rows(positive, self.examples)
            self.h = feedback.predict(self.key, error, self.delta, positive, largest)

    def predicted_slope(self) -> Tensor | float:
        """The slopes [B] that ``h`` implies along the displacement."""
        if self.h is None or self.delta is None:
            return 0.0
        return torch.bmm(self.delta.unsqueeze(1), self.h.unsqueeze(2)).flatten()

    def correction(self, slope: Tensor) -> Correction:
        """What slopes [B] of the mean loss along the noise say."""
        if self.signs is not None:
            pairs = zip(self.signs, self.use.operation.weights, strict=True)
            scaled = slope / max(self.layer.scale, 1e-30)
            return [weigh(n, scaled.to(n[0].dtype), w).to(w.dtype) for n, w in pairs]
        assert self.delta is not None
        return self.delta * (slope / self.layer.scale**2).to(self.delta.dtype).unsqueeze(1)

    def by_weights(self, correction: Correction) -> list[Tensor]:
        """A correction as one of the weights."""
        return self._collect(correction) if isinstance(correction, Tensor) else correction

    def gradients(self, correction: Correction | None, trust: float = 1.0) -> list[Tensor]:
        """The gradient of each weight of the mean loss: the prediction plus ``trust`` times the correction."""
        if self.h is None:
            assert correction is not None
            return self.by_weights(correction)
        if isinstance(correction, Tensor):  # both at once
            return self._collect(correction.mul_(trust).add_(self.h))
        grads = self._collect(self.h)
        if correction is not None:
            for grad, part in zip(grads, correction, strict=True):
                grad.add_(part, alpha=trust)
        return grads

    def _collect(self, visible: Tensor) -> list[Tensor]:
        gate, operation = self.gate, self.use.operation
        shape = self.use.shape if gate.indices is None else gate.indices.shape
        delta = gate.dense(self.layer.layout.restore(visible, shape))
        if gate is not self.use and isinstance(gate.operation, BatchNormalization) and gate.operation.couples:
            delta = gate.operation.project(delta)
        weights = operation.weights  # under autocast of another dtype than the outputs
        with torch.autocast(delta.device.type, enabled=False):
            grads = operation.weight_vjp(delta.to(weights[0].dtype))
        return [grad.to(w.dtype) for grad, w in zip(grads, weights, strict=True)]
