"""Predicting the gradient of a layer's output from the gradient further on, by feedback weights that are learned."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Feedback:
    """One linear map per layer, ``hᵢ = mᵢ ∘ (B eᵢ)``, from the gradients ``e`` [B, C] at a tap to a layer's output.

    A *tap* is a narrow place that all paths from the layer to the loss go through, at best the net's output; ``m`` is
    the layer's mask. ``Bᵀ`` is learned to be the mean Jacobian from the layer to the tap: both see the displacements of
    every forward pass, so every pass shows how ``δ`` at the layers moved the tap, ``y``, and no pass is spent on it,

    ``B ← B + ρ Δᵀ (Δ Δᵀ + λ I)⁻¹ (Y − Δ B)``,

    where a row of ``Δ`` is one example's ``m ∘ δ`` at all layers before the tap, and ``λ`` is the mean of ``‖δ‖²``: ridge
    regression on what the maps leave unexplained (affine projection: Ozeki & Umeda, 1984). It is stable for ``ρ`` < 2
    whatever the displacements. That feedback can be learned from perturbations: Lansdell et al., *Learning to solve the
    credit assignment problem*, 2020.

    Attributes:
        maps: by layer, [numbers in the output of one example, C].
    """

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}

    def predict(self, key: str, error: Tensor, like: Tensor, mask: Tensor | None) -> Tensor | None:
        """``h`` [B, ...] of a layer whose output is ``like``; None before anything was learned, or at another size."""
        weight = self.maps.get(key)
        if weight is None or weight.shape != (like[0].numel(), error.shape[1]):
            return None
        h = (error @ weight.T).view_as(like)
        return h if mask is None else h.mul_(mask)

    def learn(self, displacements: Mapping[str, Tensor], response: Tensor, rate: float) -> None:
        """Take one step from a batch: each layer's ``m ∘ δ`` [B, ...], and ``Y`` [B, C]."""
        inputs = {key: displacement.flatten(1) for key, displacement in displacements.items()}
        for key, x in inputs.items():
            if key not in self.maps or self.maps[key].shape != (x.shape[1], response.shape[1]):
                self.maps[key] = response.new_zeros(x.shape[1], response.shape[1])
        unexplained = response.clone()
        gram = torch.zeros(len(response), len(response)).to(response)
        for key, x in inputs.items():
            unexplained.addmm_(x, self.maps[key], alpha=-1)
            gram.addmm_(x, x.T)
        power = gram.diagonal().mean()
        gram.diagonal().add_(power + torch.finfo(gram.dtype).tiny)
        step = torch.cholesky_solve(unexplained, torch.linalg.cholesky(gram)).mul_(rate)
        for key, x in inputs.items():
            self.maps[key].addmm_(x.T, step)
