"""Operations that are linear in their weights: how noise on the weights reaches the output, and the way back.

For ``z = op(x; W, b)`` and an example ``i``, ``spread`` maps changes of the weights to changes of the output, and
``collect`` is its adjoint summed over the examples: ``Σᵢ <spread(U)ᵢ, δᵢ> = Σᵢ <Uᵢ, gradient of example i>``. Both are
ordinary forward arithmetic; no autograd graph is involved.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Noise = tuple[Tensor, ...]
"""Of one weight, for each example: its entries [B, m n], or rows [B, m] and columns [B, n], of which they are products.

``m`` is the length of the weight, ``n`` the numbers in one of its rows. Random signs have the same first two moments in
both forms, ``E[u uᵀ] = I``; entries are independent, rows and columns are ``m + n`` numbers in place of ``m n``.
"""


class Operation(ABC):
    """One use of weights in a forward pass, by an operation that is linear in them.

    Attributes:
        weights: those of its weights that are trainable, in the order of ``spread`` and ``collect``.
        x: the input [B, ...].
        rows_are_alike: whether any of a weight's rows are a fair sample of them.
    """

    rows_are_alike = True

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

    def spread(self, noise: Sequence[Noise]) -> Tensor:
        """The change of the output [B, ...] when each example has its own change of each weight."""
        rest = list(noise)
        total = self._spread_weight(*rest.pop(0)) if self.trains_weight else None
        if self.trains_bias:
            shift = self._spread_bias(*rest.pop(0))
            total = shift if total is None else total.add_(shift)
        assert total is not None
        return total

    def collect(self, delta: Tensor, every: int = 1) -> list[Tensor]:
        """The gradient of each weight, from the gradients [B, ...] of each example's loss by its own output.

        Args:
            delta: the gradients by the outputs.
            every: of each weight's rows only every ``every``-th, for a sample of the gradient.
        """
        grads = []
        if self.trains_weight:
            grads.append(self._collect_weight(delta, every))
        if self.trains_bias:
            grads.append(self._collect_bias(delta, every))
        shapes = [w.shape if every == 1 else (-1, *w.shape[1:]) for w in self.weights]
        return [grad.view(shape) for grad, shape in zip(grads, shapes, strict=True)]

    @abstractmethod
    def _spread_weight(self, *noise: Tensor) -> Tensor: ...

    @abstractmethod
    def _spread_bias(self, *noise: Tensor) -> Tensor: ...

    @abstractmethod
    def _collect_weight(self, delta: Tensor, every: int) -> Tensor: ...

    @abstractmethod
    def _collect_bias(self, delta: Tensor, every: int) -> Tensor: ...


def noise_sizes(weight: Tensor, output: Tensor) -> list[int]:
    """The numbers in the parts of one example's noise on a weight: entries, but rows and columns of a large matrix."""
    if weight.ndim < 2 or weight.numel() <= output[0].numel():
        return [weight.numel()]
    return [len(weight), weight[0].numel()]


def weigh(noise: Noise, slope: Tensor, weight: Tensor) -> Tensor:
    """``Σᵢ cᵢ Uᵢ`` in the shape of a weight, from the noise of each example and its slope [B]."""
    if len(noise) == 1:
        return (slope @ noise[0]).view_as(weight)
    rows, columns = noise
    return ((rows * slope[:, None]).T @ columns).view_as(weight)


class Linear(Operation):
    """``z = x Wᵀ + b`` over the last dimension."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(input, weight, bias)

    def _spread_weight(self, *noise: Tensor) -> Tensor:
        x = self.x.reshape(len(self.x), -1, self.x.shape[-1])
        if len(noise) == 1:
            return torch.bmm(x, noise[0].view(len(x), -1, x.shape[-1]).mT).view(*self.x.shape[:-1], -1)
        rows, columns = noise
        along = torch.bmm(x, columns.unsqueeze(2))
        return (along * rows.unsqueeze(1)).view(*self.x.shape[:-1], -1)

    def _spread_bias(self, *noise: Tensor) -> Tensor:
        return noise[0].view(len(self.x), *[1] * (self.x.ndim - 2), -1).expand(*self.x.shape[:-1], -1)

    def _collect_weight(self, delta: Tensor, every: int) -> Tensor:
        return delta[..., ::every].flatten(0, -2).T @ self.x.flatten(0, -2).to(delta.dtype)

    def _collect_bias(self, delta: Tensor, every: int) -> Tensor:
        return delta[..., ::every].flatten(0, -2).sum(0)


class Convolution(Operation):
    """Convolutions in one, two or three dimensions."""

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

    def _spread_weight(self, *noise: Tensor) -> Tensor:
        assert self.weight is not None
        examples, channels = self.x.shape[:2]
        if len(noise) == 1:
            filters = noise[0].view(-1, *self.weight.shape[1:])
        else:  # one filter per example and group, then its multiples for the channels of the group
            filters = noise[1].view(examples, *self.weight.shape[1:]).repeat_interleave(self.groups, 0)
        z = self.convolve(
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

    def _spread_bias(self, *noise: Tensor) -> Tensor:
        shift = noise[0].view(len(self.x), -1, *[1] * (self.x.ndim - 2))
        return shift if self.trains_weight else shift.expand(-1, -1, *self._size())

    def _size(self) -> list[int]:
        assert self.weight is not None
        geometry = zip(self.x.shape[2:], self.padding, self.dilation, self.weight.shape[2:], self.stride, strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in geometry]

    def _collect_weight(self, delta: Tensor, every: int) -> Tensor:
        assert self.weight is not None
        skipped = every if self.groups == 1 else 1  # the channels of a group belong together
        grad = torch.ops.aten.convolution_backward(
            delta[:, ::skipped].contiguous(),
            self.x.to(delta.dtype),
            self.weight.detach()[::skipped].to(delta.dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            [False, True, False],
        )[1]
        return grad if skipped == every else grad[::every]

    def _collect_bias(self, delta: Tensor, every: int) -> Tensor:
        return delta[:, ::every].flatten(2).sum((0, 2))


class Embedding(Operation):
    """``z = W[x]`` for whole numbers ``x`` [B, ...]; a padding row stays without a gradient."""

    rows_are_alike = False  # each is of other examples

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

    def _spread_weight(self, *noise: Tensor) -> Tensor:
        assert self.weight is not None
        if len(noise) == 1:
            examples = torch.arange(len(self.x), device=self.x.device).view(-1, *[1] * (self.x.ndim - 1))
            z = noise[0].view(-1, *self.weight.shape)[examples, self.x]
        else:
            rows, columns = noise
            z = rows.gather(1, self.x.flatten(1)).view(*self.x.shape, 1)
            z = z * columns.view(len(columns), *[1] * (self.x.ndim - 1), -1)
        return z if self.padding_idx is None else z * (self.x != self.padding_idx).unsqueeze(-1)

    def _spread_bias(self, *noise: Tensor) -> Tensor:
        raise AssertionError("an embedding has no bias")

    def _collect_weight(self, delta: Tensor, every: int) -> Tensor:
        assert self.weight is not None
        grad = torch.zeros_like(self.weight).index_add_(0, self.x.flatten(), delta.flatten(0, -2))
        if self.padding_idx is not None:
            grad[self.padding_idx] = 0
        return grad[::every]

    def _collect_bias(self, delta: Tensor, every: int) -> Tensor:
        raise AssertionError("an embedding has no bias")


class Affine(Operation):
    """``z = x ∘ γ + β`` with weights that are broadcast: a normalisation's last step, a position embedding, a gain.

    Args:
        x: the input [B, ...], already normalised where the operation does so: how is no matter here.
        weight: ``γ`` or None.
        bias: ``β`` or None.
        shape: of the weights, as they are broadcast to one example.
    """

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> None:
        super().__init__(x, weight, bias)
        self.shape = (*[1] * (x.ndim - 1 - len(shape)), *shape)

    def _spread_weight(self, *noise: Tensor) -> Tensor:
        return self.x * self._aligned(*noise)

    def _spread_bias(self, *noise: Tensor) -> Tensor:
        return self._aligned(*noise).expand_as(self.x)

    def _aligned(self, *noise: Tensor) -> Tensor:
        values = noise[0] if len(noise) == 1 else noise[0].unsqueeze(2) * noise[1].unsqueeze(1)
        return values.view(len(values), *self.shape)

    def _collect_weight(self, delta: Tensor, every: int) -> Tensor:
        return self._collect_bias(delta * self.x, every)

    def _collect_bias(self, delta: Tensor, every: int) -> Tensor:
        grad = delta.sum_to_size(1, *self.shape)
        return grad if every == 1 else grad.view(self.weights[0].shape)[::every]


class BatchNormalization(Affine):
    """Batch normalisation, whose statistics couple the examples: those of a step's first pass serve all its passes.

    So an example's loss depends on its own noise alone. What that leaves out, how the input acts through the
    statistics, ``project`` puts back for a layer right before.
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
        self.couples = training
        if statistics is None and training:
            # In float32, as the net's own pass has them: the passes of a step must not differ by rounding.
            wide = input.to(torch.promote_types(input.dtype, torch.float32))
            var, mean = torch.var_mean(wide, [d for d in range(input.ndim) if d != 1], correction=0)
            statistics = mean, var
        elif statistics is None:
            assert running_mean is not None and running_var is not None
            statistics = running_mean, running_var
        self.statistics = statistics
        self.input = input
        super().__init__(F.batch_norm(input, *statistics, eps=eps), weight, bias, _by_channel(input))

    def output(self, original: Callable[[], Tensor]) -> Tensor:
        """By the statistics of the step's first pass; only that one updates the running statistics."""
        if not self.frozen:
            return original()
        z = self.x if self.weight is None else self.x * self.weight.view(-1, *[1] * (self.x.ndim - 2))
        return z if self.bias is None else z + self.bias.view(-1, *[1] * (self.x.ndim - 2))

    def project(self, delta: Tensor) -> Tensor:
        """The gradient by the input from the one at fixed statistics: ``δ − mean(δ) − x̂ mean(δ x̂)``, means by channel.

        Source: Ioffe & Szegedy, *Batch normalization*, 2015.
        """
        others = [d for d in range(delta.ndim) if d != 1]
        along = (delta * self.x).mean(others, keepdim=True)
        return torch.addcmul(delta - delta.mean(others, keepdim=True), self.x, along, value=-1)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Affine:
    """The use of a layer normalisation's weights."""
    shape = list(normalized_shape)
    return Affine(F.layer_norm(input, shape, None, None, eps), weight, bias, shape)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Affine:
    """The use of a root-mean-square normalisation's weight."""
    shape = list(normalized_shape)
    return Affine(F.rms_norm(input, shape, None, eps), weight, None, shape)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Affine:
    """The use of a group normalisation's weights."""
    return Affine(F.group_norm(input, num_groups, None, None, eps), weight, bias, _by_channel(input))


def shift(input: Tensor, other: Any, *, alpha: float = 1) -> Affine:
    """The use of a trainable summand, such as position embeddings."""
    x, bias = _with_one_weight(input, other)
    if alpha != 1:
        raise NotImplementedError
    return Affine(x, None, bias, _by_example(bias, x))


def gain(input: Tensor, other: Any) -> Affine:
    """The use of a trainable factor, number by number."""
    x, weight = _with_one_weight(input, other)
    return Affine(x, weight, None, _by_example(weight, x))


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
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), shift),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), gain),
    # In place the input is overwritten.
    **dict.fromkeys((Tensor.mul_, Tensor.__imul__), lambda input, other: gain(input.clone(), other)),
}
"""The operations that have a rule, as the functions that PyTorch's own modules call."""

COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {F.multi_head_attention_forward: attention}
"""Functions that use weights inside, and the same in terms of functions that have a rule."""


def _is_trainable(weight: Tensor | None) -> bool:
    return isinstance(weight, nn.Parameter) and weight.requires_grad


def _by_channel(x: Tensor) -> list[int]:
    return [x.shape[1], *[1] * (x.ndim - 2)]


def _with_one_weight(input: Tensor, other: Any) -> tuple[Tensor, Tensor]:
    """Two operands, the trainable one last."""
    if not isinstance(other, Tensor) or _is_trainable(input) == _is_trainable(other):
        raise NotImplementedError
    return (other, input) if _is_trainable(input) else (input, other)


def _by_example(weight: Tensor, x: Tensor) -> list[int]:
    """The shape of a weight as it is broadcast to one example; the same weight must serve all."""
    shape = list(weight.shape)
    if len(shape) == x.ndim and shape[0] == 1:
        shape = shape[1:]
    pairs = zip(reversed(shape), reversed(x.shape[1:]), strict=False)
    if len(shape) >= x.ndim or not all(
        n in (1, m) for n, m in pairs
    ):  # the result is larger than the input, or each example has a weight of its own
        raise NotImplementedError
    return shape


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) if len(value) == n else tuple(value) * n


def count(weights: Sequence[Tensor]) -> int:
    """The numbers in some tensors."""
    return sum(math.prod(w.shape) for w in weights)
