"""Fast rules for linear layers, convolutions and embeddings, and attention in terms of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning.perturbed.layouts import Layout
from zo_lightning.perturbed.rules import Noise, Operation, is_weight, register_composite, register_rule


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


@register_composite(F.multi_head_attention_forward)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` of [T, B, E], taken apart into projections whose dimension 0 is the example.

    Raises:
        NotImplementedError: self-attention with one packed projection is all it does, without weights to return.
    """
    special = bias_k is not None or bias_v is not None or add_zero_attn or use_separate_proj_weight or need_weights
    if special or query.ndim != 3 or query is not key or key is not value or in_proj_weight is None:
        raise NotImplementedError
    steps, examples, width = query.shape
    mask = None
    if attn_mask is not None:
        mask = _added(attn_mask if attn_mask.ndim == 2 else attn_mask.view(-1, num_heads, steps, steps), query.dtype)
    if key_padding_mask is not None:
        padding = _added(key_padding_mask.view(examples, 1, 1, steps), query.dtype)
        mask = padding if mask is None else mask + padding
    packed = F.linear(query.transpose(0, 1), in_proj_weight, in_proj_bias)
    q, k, v = packed.view(examples, steps, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v, mask, dropout_p if training else 0.0, is_causal and mask is None)
    joined = heads.transpose(1, 2).reshape(examples, steps, width)
    return F.linear(joined, out_proj_weight, out_proj_bias).transpose(0, 1), None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention mask as what is added to the scores; a boolean one is true where no attention is paid."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else mask


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) if len(value) == n else tuple(value) * n
