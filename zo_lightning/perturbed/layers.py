"""Fast rules for linear layers, convolutions and embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning.perturbed.layouts import Layout
from zo_lightning.perturbed.rules import Noise, Operation, is_weight, register_rule


class LinearOperation(Operation):
    """``z = op(x; W) + b``: a subclass says how each of the two weights acts.

    Attributes:
        x: the input [B, ...].
        weight: ``W``, trainable or not, or None.
        bias: ``b``, likewise.
    """

    in_place = True
    is_ruled = True

    def take(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Set the input and the weights."""
        self.x, self.weight, self.bias = x, weight, bias
        self.weights = [w for w in (weight, bias) if isinstance(w, nn.Parameter) and w.requires_grad]

    def weight_jvp(self, noise: Sequence[Noise]) -> Tensor:
        """The sum of what both weights do."""
        rest = list(noise)
        total = self._weight_jvp(*rest.pop(0)) if is_weight(self.weight) else None
        if rest:
            shift = self._bias_jvp(*rest.pop(0))
            total = shift if total is None else total.add_(shift)
        assert total is not None
        return total

    def weight_jvp_in(self, layout: Layout, noise: Sequence[Noise]) -> Tensor:
        """The same with the examples elsewhere: those of the input are brought to the front."""
        x, self.x = self.x, self.x.movedim(layout.axis, 0)
        try:
            return self.weight_jvp(noise).movedim(0, layout.axis)
        finally:
            self.x = x

    def weight_vjp(self, delta: Tensor) -> list[Tensor]:
        """The gradient of each of the two."""
        grads = []
        if is_weight(self.weight):
            grads.append(self._weight_vjp(delta))
        if is_weight(self.bias):
            grads.append(self._bias_vjp(delta))
        return [grad.reshape(w.shape) for grad, w in zip(grads, self.weights, strict=True)]

    def _weight_jvp(self, *noise: Tensor) -> Tensor:
        raise NotImplementedError

    def _bias_jvp(self, *noise: Tensor) -> Tensor:
        raise NotImplementedError

    def _weight_vjp(self, delta: Tensor) -> Tensor:
        raise NotImplementedError

    def _bias_vjp(self, delta: Tensor) -> Tensor:
        raise NotImplementedError


@register_rule(F.linear)
class Linear(LinearOperation):
    """``z = x Wᵀ + b`` over the last dimension."""

    uses_all = True

    def bind(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take the arguments of the call."""
        self.take(input, weight, bias)

    def takes(self, layout: Layout) -> bool:
        """Any but the last dimension."""
        return layout.axis < self.x.ndim - 1

    def _weight_jvp(self, *noise: Tensor) -> Tensor:
        examples, features = len(noise[0]), self.x.shape[-1]
        x = self.x.reshape(examples, -1, features)
        if len(noise) == 1:
            return torch.bmm(x, noise[0].view(examples, -1, features).mT).view(*self.x.shape[:-1], -1)
        rows, columns = noise
        along = torch.bmm(x, columns.unsqueeze(2))
        return (along * rows.unsqueeze(1)).view(*self.x.shape[:-1], -1)

    def _bias_jvp(self, *noise: Tensor) -> Tensor:
        return noise[0].view(len(self.x), *[1] * (self.x.ndim - 2), -1).expand(*self.x.shape[:-1], -1)

    def _weight_vjp(self, delta: Tensor) -> Tensor:
        return delta.flatten(0, -2).T @ self.x.flatten(0, -2).to(delta.dtype)

    def _bias_vjp(self, delta: Tensor) -> Tensor:
        return delta.flatten(0, -2).sum(0)


@register_rule(F.conv1d, F.conv2d, F.conv3d)
class Convolution(LinearOperation):
    """Convolutions in one, two or three dimensions."""

    costly_noise = True
    uses_all = True

    def bind(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        """Take the arguments of the call."""
        n = weight.ndim - 2
        if input.ndim != weight.ndim:  # one example without a batch
            raise NotImplementedError
        self.filters = weight
        self.stride, self.dilation, self.groups = _tuple(stride, n), _tuple(dilation, n), groups
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, weight.shape[2:], strict=True)]
            input = F.pad(input, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
        self.padding = _tuple(0 if isinstance(padding, str) else padding, n)
        self.take(input, weight, bias)

    def _weight_jvp(self, *noise: Tensor) -> Tensor:
        examples, channels = self.x.shape[:2]
        if len(noise) == 1:
            filters = noise[0].view(-1, *self.filters.shape[1:])
        else:  # one filter per example and group, then its multiples for the channels of the group
            filters = noise[1].view(examples, *self.filters.shape[1:]).repeat_interleave(self.groups, 0)
        z = self.func(
            self.x.reshape(1, examples * channels, *self.x.shape[2:]),
            filters,
            None,
            self.stride,
            self.padding,
            self.dilation,
            examples * self.groups,
        )
        if len(noise) == 1:
            return z.view(examples, -1, *z.shape[2:])
        z = z.view(examples, self.groups, 1, *z.shape[2:])
        return (z * noise[0].view(examples, self.groups, -1, *[1] * (z.ndim - 3))).flatten(1, 2)

    def _bias_jvp(self, *noise: Tensor) -> Tensor:
        shift = noise[0].view(len(self.x), -1, *[1] * (self.x.ndim - 2))
        return shift if is_weight(self.weight) else shift.expand(-1, -1, *self._size())

    def _size(self) -> list[int]:
        geometry = zip(self.x.shape[2:], self.padding, self.dilation, self.filters.shape[2:], self.stride, strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in geometry]

    def _weight_vjp(self, delta: Tensor) -> Tensor:
        return torch.ops.aten.convolution_backward(
            delta,
            self.x.to(delta.dtype),
            self.filters.detach().to(delta.dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            [False, True, False],
        )[1]

    def _bias_vjp(self, delta: Tensor) -> Tensor:
        return delta.sum([d for d in range(delta.ndim) if d != 1])


@register_rule(F.embedding)
class Embedding(LinearOperation):
    """``z = W[x]`` for whole numbers ``x`` [B, ...]; a padding row stays without a gradient."""

    def bind(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> None:
        """Take the arguments of the call."""
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise NotImplementedError
        self.padding_idx = None if padding_idx is None else padding_idx % len(weight)
        self.table = weight
        self.take(input, weight, None)

    def takes(self, layout: Layout) -> bool:
        """Any dimension of the input."""
        return layout.axis < self.x.ndim

    def _weight_jvp(self, *noise: Tensor) -> Tensor:
        if len(noise) == 1:
            examples = torch.arange(len(self.x), device=self.x.device).view(-1, *[1] * (self.x.ndim - 1))
            z = noise[0].view(-1, *self.table.shape)[examples, self.x]
        else:
            rows, columns = noise
            z = rows.gather(1, self.x.flatten(1)).view(*self.x.shape, 1)
            z = z * columns.view(len(columns), *[1] * (self.x.ndim - 1), -1)
        return z if self.padding_idx is None else z * (self.x != self.padding_idx).unsqueeze(-1)

    def _weight_vjp(self, delta: Tensor) -> Tensor:
        grad = delta.new_zeros(self.table.shape).index_add_(0, self.x.flatten(), delta.flatten(0, -2))
        if self.padding_idx is not None:
            grad[self.padding_idx] = 0
        return grad


@register_rule(F.embedding_bag)
class EmbeddingBag(Operation):
    """Sums, means or largest rows of an embedding, one for each example; noise is on the output."""

    in_place = True
    is_ruled = True

    def takes(self, layout: Layout) -> bool:
        """PyTorch has no forward derivative."""
        return False


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) if len(value) == n else tuple(value) * n
