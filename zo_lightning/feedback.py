"""Predicting the gradient of a layer's output from the gradient of the net's, by feedback weights that are learned."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Feedback:
    """One linear map per layer, ``hᵢ = mᵢ ∘ (B eᵢ)``, from output gradients ``e`` [B, C] to a layer's output.

    ``m`` is the layer's mask. The maps start at zero and learn from the slopes that are measured anyway, by normalised
    least mean squares on the error ``rᵢ = cᵢ − Σₗ <δₗᵢ, hₗᵢ>`` of the predicted slope ``c`` along the displacements ``δ``,

    ``Bₗ ← Bₗ + ρ Σᵢ rᵢ (mᵢ ∘ δₗᵢ) (C⁻¹ eᵢ)ᵀ / (Σₖ ‖mₖᵢ ∘ δₖᵢ‖² (C + eᵢᵀ C⁻¹ eᵢ))``,

    where the matrix ``C`` is the running mean of ``e eᵀ`` and the number C its size, the mean of ``eᵀ C⁻¹ e``: a step of
    ``ρ = 1`` would explain the slope of a single example exactly (Lansdell et al., *Learning to solve the credit
    assignment problem*, 2020, learn feedback from node perturbation; NLMS: Nagumo & Noda, 1967).

    Attributes:
        maps: by layer, [numbers in the output of one example, C].
        covariance: ``C``, [C, C], or None before the first batch.
    """

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}
        self.covariance: Tensor | None = None
        self.batches = 0

    def predict(self, key: str, error: Tensor, like: Tensor, mask: Tensor | None) -> Tensor | None:
        """``h`` [B, ...] of a layer whose output is ``like``; None before anything was learned, or at another size."""
        weight = self.maps.get(key)
        if weight is None or len(weight) != like[0].numel() or weight.shape[1] != error.shape[1]:
            return None
        h = (error @ weight.T).view_as(like)
        return h if mask is None else h.mul_(mask)

    def learn(self, error: Tensor, residual: Tensor, displacements: Mapping[str, Tensor], rate: float) -> None:
        """Take one step from a batch: ``r`` [B] and each layer's ``m ∘ δ`` [B, ...]."""
        size = error.shape[1]
        seen = error.T @ error / len(error)
        self.batches += 1
        if self.covariance is None or self.covariance.shape != seen.shape:
            self.covariance, self.batches = seen, 1
        else:
            self.covariance = self.covariance.lerp(seen, max(0.01, 1 / self.batches))
        ridge = self.covariance.diagonal().mean() * 1e-3 + torch.finfo(seen.dtype).tiny
        whitened = torch.linalg.solve(self.covariance + ridge * torch.eye(size).to(seen), error.T).T
        power = torch.stack([d.flatten(1).square().sum(1) for d in displacements.values()]).sum(0)
        norm = power * (size + (whitened * error).sum(1))
        step = whitened * (rate * residual / norm.clamp_min(torch.finfo(norm.dtype).tiny))[:, None]
        for key, displacement in displacements.items():
            numbers = displacement[0].numel()
            if key not in self.maps or self.maps[key].shape != (numbers, size):
                self.maps[key] = error.new_zeros(numbers, size)
            self.maps[key].addmm_(displacement.flatten(1).T, step)
