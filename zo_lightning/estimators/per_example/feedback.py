"""Predicting the gradient of a layer's output from the gradient of the net's, by feedback weights that are learned."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SHARE = 2
"""One example in so many teaches the maps, which costs as much less."""

MANY = 32
"""Outputs from which on the maps are used, and taught, for the largest errors alone."""

_USED = 32  # of these, by one example
_TAUGHT = 16  # of these, in one step


class Feedback:
    """Linear maps ``hᵢ = mᵢ ∘ (B eᵢ)`` from the gradient ``e`` [B, C] by the net's output to those by layers' outputs.

    ``m`` is 0 where a ReLU hides the layer's output, else 1; of a pooled output only the largest in each window is
    meant. ``Bᵀ`` is learned to be the mean Jacobian from the layer to the net's output: every pass that displaces
    layers by ``δ`` shows how the output moved, ``y``, so no pass is spent on it,

    ``Bᵀ ← Bᵀ + ρ Rᵀ Δ / (α + ‖Rᵀ Δ‖² / ‖R‖²)``  with  ``R = Y − Δ B``,

    where a row of ``Δ`` is one example's ``m ∘ δ`` at all layers, and ``α`` the mean of ``‖m ∘ δ‖²``. The step is
    steepest descent with the exact step size for ``R`` (Barzilai & Borwein 1988 call it the classical choice), kept
    shorter by ``α``, so ``ρ`` < 2 is stable however alike the displacements are. Feedback weights learned from
    perturbations: Lansdell, Prakash & Kording, *Learning to solve the credit assignment problem*, 2020. Feedback
    straight from the output: Nøkland, *Direct feedback alignment*, 2016.

    A net with a thousand outputs must not cost a hundred times as much as one with ten. From ``MANY`` outputs on,
    ``h`` is the sum over the 32 largest errors of each example, which for a softmax are nearly all of it, and a step
    teaches the rows of the sixteen outputs with the largest errors in the batch.

    Attributes:
        maps: ``Bᵀ`` by layer, [C, numbers of one example that the loss sees], float32 or wider.
    """

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}

    def predict(
        self, key: str, error: Tensor, like: Tensor, positive: Tensor | None, largest: Tensor | None = None
    ) -> Tensor | None:
        """``h`` like ``like`` [B, n] of a layer; None before anything was learned, or at another size.

        Args:
            key: of the layer.
            error: ``e`` [B, C].
            like: the displacement of what the loss sees of the layer.
            positive: where that is not hidden by a ReLU.
            largest: from ``used``.
        """
        weight = self.maps.get(key)
        if weight is not None and weight.device != error.device:  # of a checkpoint, which was loaded to the CPU
            weight = self.maps[key] = weight.to(error.device)
        if weight is None or weight.shape != (error.shape[1], like.shape[1]):
            return None
        error = error.to(weight.dtype)
        if largest is None:
            h = error @ weight
        else:
            h = F.embedding_bag(largest, weight, mode="sum", per_sample_weights=error.gather(1, largest))
        h = h.to(like.dtype)
        return h if positive is None else h.mul_(positive.view(h.shape))

    def used(self, error: Tensor) -> Tensor | None:
        """The outputs [B, 32] with the largest errors of each example, if there are so many that it pays."""
        return error.abs().topk(_USED, 1).indices if error.shape[1] >= MANY else None

    def learn(self, displacements: Mapping[str, Tensor], response: Tensor, error: Tensor, rate: float) -> None:
        """Take one step from a batch: each layer's ``m ∘ δ`` [B, n], and ``y`` and ``e`` [B, C]."""
        rows = -(-len(response) // SHARE)
        classes = response.shape[1]
        taught = error.abs().sum(0).topk(_TAUGHT).indices if classes >= MANY else None
        inputs = {key: moved[:rows].to(response.dtype) for key, moved in displacements.items()}
        for key, x in inputs.items():
            if key not in self.maps or self.maps[key].shape != (classes, x.shape[1]):
                self.maps[key] = response.new_zeros(classes, x.shape[1])
        maps = {key: self.maps[key] if taught is None else self.maps[key][taught] for key in inputs}
        response = response[:rows] if taught is None else response[:rows, taught]
        unexplained = response.nan_to_num(0.0, 0.0, 0.0)  # an output may be −inf for good, such as a masked choice
        for key, x in inputs.items():
            torch.addmm(unexplained, x, maps[key].T, alpha=-1, out=unexplained)
        steps = {key: unexplained.T @ x for key, x in inputs.items()}
        tiny = torch.finfo(response.dtype).tiny
        # All read at once: each number read by itself would be a wait for a GPU.
        norms = [torch.linalg.vector_norm(t) for t in (*inputs.values(), *steps.values(), unexplained)]
        *squares, left = (norm**2 for norm in torch.stack(norms).tolist())
        alpha, along = sum(squares[: len(inputs)]) / rows, sum(squares[len(inputs) :]) / (left + tiny)
        size = rate / (alpha + along + tiny)
        for key, step in steps.items():
            if taught is None:
                self.maps[key].add_(step, alpha=size)
            else:
                self.maps[key].index_add_(0, taught, step, alpha=size)

    def state_dict(self) -> dict[str, Any]:
        """The maps."""
        return {"maps": {key: weight.clone() for key, weight in self.maps.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.maps = {key: weight.clone() for key, weight in state["maps"].items()}


class Shrinkage:
    """How much of a noisy but unbiased correction ``c`` to a biased estimate pays: ``λ = b² / (b² + V)``, by layer.

    ``h + λ c`` has mean squared error ``(1 − λ)² b² + λ² V`` if ``c`` has mean ``b`` and variance ``V``, and it is
    smallest there. ``b² = E<c, c̄>``, where ``c̄`` is the running mean of earlier steps, whose noise is independent, less
    two standard errors, so that noise is not taken for bias; and ``b² + V = E‖c‖²``. Measuring costs the layer's way
    back once more, so only one step in ``EVERY`` is measured; ``λ`` stays in between.
    """

    EVERY = 50
    LEAST = 8  # steps that are measured before their scatter says something
    RATE = 0.05  # of the running means, a measured step
    MEMORY = 0.3  # of c̄

    def __init__(self) -> None:
        self.means: dict[str, list[Tensor]] = {}  # c̄, one tensor for each weight of a layer
        self.moments: dict[str, tuple[int, float, float, float]] = {}  # measured steps, E<c, c̄>, E<c, c̄>², E‖c‖²

    def trust(self, key: str) -> float:
        """``λ`` of a layer as measured last; 0 before."""
        steps, along, squared, power = self.moments.get(key, (0, 0.0, 0.0, 0.0))
        rate = self._rate(steps - 1)
        error = math.sqrt(max(squared - along**2, 0.0) * rate / (2 - rate))  # of an exponential mean
        return min(max(along - 2 * error, 0.0) / power, 1.0) if steps > self.LEAST and power else 0.0

    def measure(self, key: str, correction: list[Tensor]) -> float:
        """Take in one step's correction, one tensor for each weight of a layer; returns ``λ``."""
        steps, along, squared, power = self.moments.get(key, (0, 0.0, 0.0, 0.0))
        known = self.means.get(key, [])
        if [mean.shape for mean in known] != [c.shape for c in correction]:  # at first, or of a layer that was replaced
            steps, along, squared, power = 0, 0.0, 0.0, 0.0
            known = [torch.zeros_like(c) for c in correction]
        # A checkpoint's means were loaded to the CPU.
        means = self.means[key] = [mean.to(c.device) for mean, c in zip(known, correction, strict=True)]
        if steps:
            rate = self._rate(steps)
            product = sum(float((c * mean).sum()) for c, mean in zip(correction, means, strict=True))
            along += rate * (product - along)
            squared += rate * (product**2 - squared)
            power += rate * (sum(float(torch.linalg.vector_norm(c)) ** 2 for c in correction) - power)
        for c, mean in zip(correction, means, strict=True):
            mean.lerp_(c, max(self.MEMORY, 1 / (steps + 1)))
        self.moments[key] = steps + 1, along, squared, power
        return self.trust(key)

    def _rate(self, steps: int) -> float:
        return max(self.RATE, 1 / max(steps, 1))  # that of the plain mean, while there are few

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        means = {key: [mean.clone() for mean in means] for key, means in self.means.items()}
        return {"means": means, "moments": dict(self.moments)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.means = {key: [mean.clone() for mean in means] for key, means in state["means"].items()}
        self.moments = dict(state["moments"])
