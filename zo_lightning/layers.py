"""Operations that are linear in their weights: how noise on the weights reaches the output, and the way back.

For ``z = op(x; W, b)`` and an example ``i`` the two maps are adjoint to each other,
``Σᵢ <spread(U)ᵢ, δᵢ> = Σᵢ <Uᵢ, gradient of example i>``, and ``collect(δ)`` sums those gradients over the examples. Both
are ordinary forward arithmetic; no autograd graph is involved.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Operation(ABC):
    """One use of weights in a forward pass, by an operation that is linear in them.

    Attributes:
        weights: those of its weights that are trainable, in the order of ``spread`` and ``collect``.
        x: the input [B, ...].
    """

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.x = x
        self.weight = weight
        self.bias = bias
        self.trains_weight = _is_trainable(weight)
        self.trains_bias = _is_trainable(bias)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The trainable weights."""
        chosen = ((self.weight, self.trains_weight), (self.bias, self.trains_bias))
        return [w for w, trains in chosen if trains and isinstance(w, nn.Parameter)]

    def output(self, original: Callable[[], Tensor]) -> Tensor:
        """What the operation computes in this pass, by default just that."""
        return original()

    def spread(self, noise: Sequence[Tensor]) -> Tensor:
        """The change of the output [B, ...] when each example has its own change [B, *w.shape] of each weight."""
        rest = list(noise)
        total = self._spread_weight(rest.pop(0)) if self.trains_weight else None
        if self.trains_bias:
            shift = self._spread_bias(rest.pop(0))
            total = shift if total is None else total.add_(shift)
        assert total is not None
        return total

    def collect(self, delta: Tensor) -> list[Tensor]:
        """The gradient of each weight, from the gradients [B, ...] of each example's loss by its own output."""
        grads = []
        if self.trains_weight:
            grads.append(self._collect_weight(delta))
        if self.trains_bias:
            grads.append(self._collect_bias(delta))
        return grads

    @abstractmethod
    def _spread_weight(self, noise: Tensor) -> Tensor: ...

    @abstractmethod
    def _spread_bias(self, noise: Tensor) -> Tensor: ...

    @abstractmethod
    def _collect_weight(self, delta: Tensor) -> Tensor: ...

    @abstractmethod
    def _collect_bias(self, delta: Tensor) -> Tensor: ...


class Linear(Operation):
    """``z = x Wᵀ + b`` over the last dimension."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(input, weight, bias)

    def _spread_weight(self, noise: Tensor) -> Tensor:
        x = self.x.reshape(len(self.x), -1, self.x.shape[-1])
        return torch.bmm(x, noise.mT).view(*self.x.shape[:-1], noise.shape[1])

    def _spread_bias(self, noise: Tensor) -> Tensor:
        return noise.view(len(noise), *[1] * (self.x.ndim - 2), -1).expand(*self.x.shape[:-1], -1)

    def _collect_weight(self, delta: Tensor) -> Tensor:
        return delta.flatten(0, -2).T @ self.x.flatten(0, -2)

    def _collect_bias(self, delta: Tensor) -> Tensor:
        return delta.flatten(0, -2).sum(0)


class Convolution(Operation):
    """Convolutions in one, two or three dimensions; per example one group, or one set of groups, of a large one."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        n = weight.ndim - 2
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
        self.stride, self.dilation, self.groups = _tuple(stride, n), _tuple(dilation, n), groups
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, weight.shape[2:], strict=True)]
            input = F.pad(input, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
        self.padding = _tuple(0 if isinstance(padding, str) else padding, n)
        super().__init__(input, weight, bias)

    def _spread_weight(self, noise: Tensor) -> Tensor:
        examples, channels = self.x.shape[:2]
        z = self.convolve(
            self.x.reshape(1, examples * channels, *self.x.shape[2:]),
            noise.flatten(0, 1),
            None,
            self.stride,
            self.padding,
            self.dilation,
            examples * self.groups,
        )
        return z.view(examples, noise.shape[1], *z.shape[2:])

    def _spread_bias(self, noise: Tensor) -> Tensor:
        shift = noise.view(*noise.shape, *[1] * (self.x.ndim - 2))
        return shift if self.trains_weight else shift.expand(-1, -1, *self._size())

    def _size(self) -> list[int]:
        assert self.weight is not None
        geometry = zip(self.x.shape[2:], self.padding, self.dilation, self.weight.shape[2:], self.stride, strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in geometry]

    def _collect_weight(self, delta: Tensor) -> Tensor:
        assert self.weight is not None
        return torch.ops.aten.convolution_backward(
            delta.contiguous(),
            self.x,
            self.weight.detach(),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            [False, True, False],
        )[1]

    def _collect_bias(self, delta: Tensor) -> Tensor:
        return delta.flatten(2).sum((0, 2))


class Embedding(Operation):
    """``z = W[x]`` for whole numbers ``x`` [B, ...]; a padding row stays without a gradient."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> None:
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise NotImplementedError
        self.padding_idx = padding_idx
        super().__init__(input, weight, None)

    def _spread_weight(self, noise: Tensor) -> Tensor:
        examples = torch.arange(len(self.x), device=self.x.device).view(-1, *[1] * (self.x.ndim - 1))
        z = noise[examples, self.x]
        return z if self.padding_idx is None else z * (self.x != self.padding_idx).unsqueeze(-1)

    def _spread_bias(self, noise: Tensor) -> Tensor:
        raise AssertionError("an embedding has no bias")

    def _collect_weight(self, delta: Tensor) -> Tensor:
        assert self.weight is not None
        grad = torch.zeros_like(self.weight).index_add_(0, self.x.flatten(), delta.flatten(0, -2))
        if self.padding_idx is not None:
            grad[self.padding_idx] = 0
        return grad

    _collect_bias = _spread_bias


class Normalization(Operation):
    """``z = γ x̂ + β``: what normalises is no matter here, and ``x̂`` is the same operation without its weights."""

    def __init__(self, normalized: Tensor, weight: Tensor | None, bias: Tensor | None, trailing: int | None) -> None:
        super().__init__(normalized, weight, bias)
        self.trailing = (
            trailing  # dimensions at the end that have weights of their own; None: dimension 1, the channels
        )

    def _spread_weight(self, noise: Tensor) -> Tensor:
        return self.x * self._aligned(noise)

    def _spread_bias(self, noise: Tensor) -> Tensor:
        return self._aligned(noise).expand_as(self.x)

    def _aligned(self, noise: Tensor) -> Tensor:
        missing = [1] * (self.x.ndim - noise.ndim)
        after = missing if self.trailing is None else []
        return noise.view(len(noise), *([] if after else missing), *noise.shape[1:], *after)

    def _collect_weight(self, delta: Tensor) -> Tensor:
        return self._collect_bias(delta * self.x)

    def _collect_bias(self, delta: Tensor) -> Tensor:
        if self.trailing is None:
            return delta.flatten(2).sum((0, 2)) if delta.ndim > 2 else delta.sum(0)
        return delta.sum(tuple(range(delta.ndim - self.trailing)))


class BatchNormalization(Normalization):
    """Batch normalisation, whose statistics couple the examples: those of a step's first pass serve all its passes.

    So an example's loss depends on its own noise alone. What is left out is how the weights act through the
    statistics, the two mean-subtracting terms of batch normalisation's own backward formula.
    """

    def __init__(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.frozen = statistics is not None
        if statistics is None and training:
            var, mean = torch.var_mean(input, [d for d in range(input.ndim) if d != 1], correction=0)
            statistics = mean, var
        elif statistics is None:
            assert running_mean is not None and running_var is not None
            statistics = running_mean, running_var
        self.statistics = statistics
        self.input = input
        super().__init__(F.batch_norm(input, *statistics, eps=eps), weight, bias, None)

    def output(self, original: Callable[[], Tensor]) -> Tensor:
        """By the statistics of the step's first pass; only that one updates the running statistics."""
        if not self.frozen:
            return original()
        z = self.x if self.weight is None else self.x * self.weight.view(-1, *[1] * (self.x.ndim - 2))
        return z if self.bias is None else z + self.bias.view(-1, *[1] * (self.x.ndim - 2))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Normalization:
    """The use of a layer normalisation's weights."""
    shape = list(normalized_shape)
    return Normalization(F.layer_norm(input, shape, None, None, eps), weight, bias, len(shape))


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Normalization:
    """The use of a root-mean-square normalisation's weight."""
    shape = list(normalized_shape)
    return Normalization(F.rms_norm(input, shape, None, eps), weight, None, len(shape))


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Normalization:
    """The use of a group normalisation's weights."""
    return Normalization(F.group_norm(input, num_groups, None, None, eps), weight, bias, None)


RULES: dict[Callable[..., Any], Callable[..., Operation]] = {
    F.linear: Linear,
    F.conv1d: Convolution,
    F.conv2d: Convolution,
    F.conv3d: Convolution,
    F.embedding: Embedding,
    F.batch_norm: BatchNormalization,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
}
"""The operations that have a rule, as the functions that PyTorch's own modules call."""


def _is_trainable(weight: Tensor | None) -> bool:
    return isinstance(weight, nn.Parameter) and weight.requires_grad


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) if len(value) == n else tuple(value) * n


def count(weights: Sequence[Tensor]) -> int:
    """The numbers in some tensors."""
    return sum(math.prod(w.shape) for w in weights)
