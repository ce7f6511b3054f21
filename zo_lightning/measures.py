"""What gradients and weights are compared by: pure functions of tensors by name, and gradients that leave no trace."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.directions import Gaussian
from zo_lightning.objective import Objective
from zo_lightning.perturbed.weights import DisplacedWeights, Weights

WHOLE = "all"
"""The key of what is measured over all tensors together."""

Tensors = Mapping[str, Tensor]


def cosine(a: Tensors, b: Tensors) -> dict[str, float]:
    """The cosine ``<a, b> / (‖a‖ ‖b‖)`` of each pair of tensors, and of all as one vector under ``"all"``.

    NaN where a norm is zero. Sums are in float64.

    Raises:
        ValueError: names or shapes differ.
    """
    dots = _sums(a, b, lambda x, y: x @ y)
    norms_a, norms_b = _sums(a, a, lambda x, _: x @ x), _sums(b, b, lambda x, _: x @ x)
    return {name: _ratio(dot, math.sqrt(norms_a[name] * norms_b[name])) for name, dot in dots.items()}


def l2_distance(a: Tensors, b: Tensors) -> dict[str, float]:
    """The distance ``‖a − b‖`` of each pair of tensors, and of all as one vector under ``"all"``.

    Raises:
        ValueError: names or shapes differ.
    """
    return {name: math.sqrt(square) for name, square in _sums(a, b, lambda x, y: (x - y).square().sum()).items()}


def norm_ratio(a: Tensors, b: Tensors) -> dict[str, float]:
    """The ratio ``‖a‖ / ‖b‖`` of each pair of tensors, and of all as one vector under ``"all"``; NaN where b is zero.

    Raises:
        ValueError: names or shapes differ.
    """
    _check_alike(a, b)
    return {name: _ratio(norm, norms) for (name, norm), norms in zip(norm(a).items(), norm(b).values(), strict=True)}


def norm(a: Tensors) -> dict[str, float]:
    """The norm ``‖a‖`` of each tensor, and of all as one vector under ``"all"``."""
    return {name: math.sqrt(square) for name, square in _sums(a, a, lambda x, _: x @ x).items()}


def mismatch(a: Tensors, b: Tensors, sides: tuple[str, str] = ("the first", "the second")) -> str | None:
    """In which name or shape two sides differ first, in words; None where they can be compared."""
    for name in (*a, *b):
        if name not in a or name not in b:
            return f"only {sides[0] if name in a else sides[1]} has {name}"
        if a[name].shape != b[name].shape:
            return f"{name} has shape {tuple(a[name].shape)} in {sides[0]} and {tuple(b[name].shape)} in {sides[1]}"
    return None


def match_filters(a: Tensor, b: Tensor) -> Tensor:
    """The order [n] of the filters of ``b`` in which they resemble those of ``a`` most.

    Filters are what lies along dimension 0. The order maximises ``Σᵢ <aᵢ, b_order(i)>``, hence also the cosine of the
    two tensors, and minimises their distance (linear assignment, Kuhn 1955).

    Raises:
        ValueError: shapes differ.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    _check_alike({"filters": a}, {"filters": b})
    gain = a.detach().flatten(1).double().cpu() @ b.detach().flatten(1).double().cpu().T
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])


def matched(a: Tensors, b: Tensors) -> dict[str, float]:
    """The cosine of each pair of convolution weights (three dimensions or more) after optimal matching of filters.

    Each layer is matched by itself: that its inputs are the filters of the layer before, in their order, is not used.

    Raises:
        ValueError: names or shapes differ.
    """
    _check_alike(a, b)
    filters = [name for name, weight in a.items() if weight.ndim > 2]
    ordered = {name: b[name][match_filters(a[name], b[name]).to(b[name].device)] for name in filters}
    similar = cosine({name: a[name] for name in filters}, ordered)
    return {name: similar[name] for name in filters}


def true_gradient(loss: Callable[[], Tensor] | Objective, module: nn.Module) -> dict[str, Tensor]:
    """The gradient of a loss by backpropagation, by name of the weight; weights that the loss does not use get zeros.

    ``.grad``, the random state, buffers and train or eval mode are bit-identical to before. Under an ``Objective`` the
    loss sees the same dropout masks as its probes; what this costs is not added to ``forward_passes``.

    Raises:
        ValueError: no graph leads to the loss.
        NonFiniteLoss: the loss is NaN or infinite.
    """
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with _differentiable(loss, module) as objective:
        grads = torch.autograd.grad(objective.differentiable(), list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(weights.items(), grads, strict=True)
    }


def gradient_spread(losses: Callable[[], Tensor], module: nn.Module, seed: int = 0) -> float:
    """How much larger the gradients of single examples are than their mean: ``R = mean ‖gᵢ‖² / ‖mean gᵢ‖²`` ≥ 1.

    Both norms come from one backward pass each; that of the examples from their sum with random signs,
    ``E ‖Σᵢ ±gᵢ‖² = Σᵢ ‖gᵢ‖²``, so it is unbiased, with the error of one sample.

    Args:
        losses: computes the loss of each example, [B], with its graph.
        module: owns the weights.
        seed: of the signs, and of what ``losses`` draws.

    Raises:
        ValueError: the losses have no gradient.
        NonFiniteLoss: one is NaN or infinite.
    """
    weights = Weights.of(module).params
    with _differentiable(losses, module, seed) as objective:
        each = _attached(objective.per_example())
        signs = torch.randint(2, (len(each),), generator=torch.Generator().manual_seed(seed)).mul(2).sub(1).to(each)
        sides = [
            torch.autograd.grad((w * each).sum() / len(each), weights, retain_graph=True, allow_unused=True)
            for w in (signs, torch.ones_like(signs))
        ]
    signed, mean = (sum(float(g.double().square().sum()) for g in side if g is not None) for side in sides)
    return max(1.0, _ratio(len(each) * signed, mean))


def loss_noise(loss: Callable[[], Tensor] | Objective, module: nn.Module, width: float, seed: int = 0) -> float:
    """The standard deviation of the rounding errors in a loss, or in those of the single examples.

    The loss is asked at seven points ``x + k h u`` of a line. Third differences remove its smooth part, and what is
    left has ``20 σ²`` for variance (ECNoise; Moré & Wild, *Estimating computational noise*, 2011). It is at least the
    rounding of the loss itself. Weights and all that ``Objective`` guards are bit-identical afterwards.

    Args:
        loss: returns the loss, or the loss of each example, [B].
        module: owns the weights.
        width: ``h``, the displacement of one weight; well below the ``mu`` of a finite difference.
        seed: of the direction ``u``.
    """
    objective = _afresh(loss, module, seed)
    weights = Weights.of(module)
    u = Gaussian().draw(weights, seed, 0, 0, weights.still).tensors()
    values = []
    for k in range(7):
        moved = [torch.add(p.detach(), t, alpha=k * width) for p, t in zip(weights, u, strict=True)]
        with objective.probe(cost=0), DisplacedWeights(weights, moved.__getitem__, weights.opaque):
            values.append(objective.loss().detach().reshape(-1))
    losses = torch.stack(values)
    precision = max(torch.finfo(t.dtype).eps for t in (losses, *weights))
    rounding = precision * float(losses.double().square().mean().sqrt()) / math.sqrt(12)
    return max(rounding, math.sqrt(float(losses.double().diff(n=3, dim=0).square().mean()) / 20))


def _sums(a: Tensors, b: Tensors, of: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """A bilinear or quadratic form of each pair of tensors as float64 vectors, and its sum under ``"all"``."""
    _check_alike(a, b)
    sums = {name: float(of(_vector(x), _vector(b[name].to(x.device)))) for name, x in a.items()}
    return {**sums, WHOLE: math.fsum(sums.values())}


def _vector(x: Tensor) -> Tensor:
    flat = x.detach().flatten()
    return (flat.cpu() if flat.device.type == "mps" else flat).double()  # Apple's GPUs have no float64


def _check_alike(a: Tensors, b: Tensors) -> None:
    if difference := mismatch(a, b):
        raise ValueError(difference)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _afresh(loss: Callable[[], Tensor] | Objective, module: nn.Module, seed: int = 0) -> Objective:
    """An objective with counts and guards of its own: that of a training step may hold buffers from before the step."""
    return Objective(loss.loss, module, loss.seed) if isinstance(loss, Objective) else Objective(loss, module, seed)


@contextmanager
def _differentiable(loss: Callable[[], Tensor] | Objective, module: nn.Module, seed: int = 0) -> Iterator[Objective]:
    objective = _afresh(loss, module, seed)
    with objective.probe(cost=0), torch.enable_grad():
        yield objective


def _attached(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError("the loss has no gradient: nothing in it requires one")
    return loss
