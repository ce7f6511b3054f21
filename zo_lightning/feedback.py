"""Predicting the gradient of a layer's output from the gradient of the net's, by feedback weights that are learned."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Feedback:
    """One linear map per layer, ``hᵢ = mᵢ ∘ (B eᵢ)``, from the gradient ``e`` [B, C] of the net's output to a layer's.

    ``m`` is 0 where a ReLU or a pooling hides the layer's output, else 1. ``Bᵀ`` is learned to be the mean Jacobian from
    the layer to the net's output: every pass that displaces layers by ``δ`` shows how the output moved, ``y``, so no pass
    is spent on it,

    ``B ← B + ρ Δᵀ (Δ Δᵀ + λ I)⁻¹ (Y − Δ B)``,

    where a row of ``Δ`` is one example's ``m ∘ δ`` at all layers, and ``λ`` the mean of ``‖m ∘ δ‖²``: ridge regression on
    what the maps leave unexplained, stable for ``ρ`` < 2 whatever the displacements (affine projection, Ozeki & Umeda
    1984). That feedback weights can be learned from perturbations: Lansdell, Prakash & Kording, *Learning to solve the
    credit assignment problem*, 2020; that nets train with feedback straight from the output: Nøkland, *Direct feedback
    alignment*, 2016.

    Attributes:
        maps: by layer, [numbers in the output of one example, C], float32.
    """

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}

    def predict(self, key: str, error: Tensor, like: Tensor, mask: Tensor | None) -> Tensor | None:
        """``h`` [B, ...] of a layer whose output is ``like``; None before anything was learned, or at another size."""
        weight = self.maps.get(key)
        if weight is None or weight.shape != (like[0].numel(), error.shape[1]):
            return None
        h = (error.to(weight.dtype) @ weight.T).to(like.dtype).view_as(like)
        return h if mask is None else h.mul_(mask)

    def learn(self, displacements: Mapping[str, Tensor], response: Tensor, rate: float) -> None:
        """Take one step from a batch: each layer's ``m ∘ δ`` [B, ...], and ``y`` [B, C]."""
        inputs = {key: displacement.flatten(1).to(response.dtype) for key, displacement in displacements.items()}
        for key, x in inputs.items():
            if key not in self.maps or self.maps[key].shape != (x.shape[1], response.shape[1]):
                self.maps[key] = response.new_zeros(x.shape[1], response.shape[1])
        unexplained = response.clone()
        gram = torch.zeros(len(response), len(response)).to(response)
        for key, x in inputs.items():
            unexplained.addmm_(x, self.maps[key], alpha=-1)
            gram.addmm_(x, x.T)
        gram.diagonal().add_(gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
        step = torch.cholesky_solve(unexplained, torch.linalg.cholesky(gram)).mul_(rate)
        for key, x in inputs.items():
            self.maps[key].addmm_(x.T, step)

    def state_dict(self) -> dict[str, Any]:
        """The maps."""
        return {"maps": self.maps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.maps = dict(state["maps"])


class Shrinkage:
    """How much of a noisy but unbiased correction to a biased estimate pays: ``λ = b² / (b² + V/τ)``, for each layer.

    ``h + λ c`` has mean squared error ``(1 − λ)² b² + λ² V`` if the correction ``c`` has mean ``b`` and variance ``V``;
    it is smallest there for ``τ = 1``. An optimizer with momentum averages noise over some ``τ`` steps but keeps the
    bias, so its ``λ`` is larger. Both are measured from the corrections ``c₁`` and ``c₂`` of two halves of a batch, whose
    noise is independent: ``b² = E<c₁, c₂>`` and ``V = E‖c₁ − c₂‖² / 4`` for ``c = (c₁ + c₂) / 2``, as running means. Of
    ``b²`` two standard errors are taken off, so that noise is not mistaken for bias.
    """

    TAU = 10.0
    RATE = 0.05

    def __init__(self) -> None:
        self.moments: dict[str, list[float]] = {}  # running sums of 1, <c₁, c₂>, its square, and V

    def weight(self, key: str, samples: int = 1) -> float:
        """``λ`` of a layer for the mean of ``samples`` corrections, 0 before enough was measured."""
        count, bias, squared, variance = self.moments.get(key, (0.0, 0.0, 0.0, 0.0))
        if not count:
            return 0.0
        bias, squared, variance = bias / count, squared / count, variance / count
        error = math.sqrt(max(squared - bias**2, 0.0) * self.RATE / (2 - self.RATE) / count)
        bias = max(bias - 2 * error, 0.0) if count > self.RATE else 0.0
        return bias / (bias + variance / (self.TAU * samples)) if bias else 0.0

    def measure(self, key: str, first: list[Tensor], second: list[Tensor]) -> None:
        """Add the corrections of two halves of a batch, one tensor for each weight of a layer."""
        pairs = list(zip(first, second, strict=True))
        product = sum(float((a * b).sum()) for a, b in pairs)
        variance = sum(float((a - b).square().sum()) for a, b in pairs) / 4
        sums = self.moments.setdefault(key, [0.0, 0.0, 0.0, 0.0])
        for index, value in enumerate((1.0, product, product**2, variance)):
            sums[index] += self.RATE * (value - sums[index])

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"moments": {key: list(sums) for key, sums in self.moments.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.moments = {key: list(sums) for key, sums in state["moments"].items()}
