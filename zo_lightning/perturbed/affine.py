"""Fast rules for weights that are broadcast: normalisations, summands and factors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_lightning.perturbed.layers import LinearOperation
from zo_lightning.perturbed.layouts import Layout
from zo_lightning.perturbed.rules import is_weight, register_rule


class Affine(LinearOperation):
    """``z = x ∘ γ + β`` with weights that are broadcast: a normalisation's last step, a position embedding, a gain.

    Attributes:
        x: the input [B, ...], already normalised where the operation does so: how is no matter here.
        shape: of the weights, as they are broadcast to one example.
        leading: how many dimensions the weights do not have, the first ones.
    """

    few_weights = True
    uses_all = True

    def spread(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> None:
        """Set the input and the weights, of this shape within one example."""
        self.take(x, weight, bias)
        self.leading = x.ndim - len(shape)
        self.shape = (*[1] * (self.leading - 1), *shape)

    def takes(self, layout: Layout) -> bool:
        """Any dimension that the weights do not have."""
        return layout.axis < self.leading

    def _weight_jvp(self, *noise: Tensor) -> Tensor:
        return self.x * self._aligned(*noise)

    def _bias_jvp(self, *noise: Tensor) -> Tensor:
        return self._aligned(*noise).expand_as(self.x)

    def _aligned(self, *noise: Tensor) -> Tensor:
        values = noise[0] if len(noise) == 1 else noise[0].unsqueeze(2) * noise[1].unsqueeze(1)
        return values.view(len(values), *self.shape)

    def _weight_vjp(self, delta: Tensor) -> Tensor:
        return self._bias_vjp(delta * self.x)

    def _bias_vjp(self, delta: Tensor) -> Tensor:
        return delta.sum_to_size(1, *self.shape)


@register_rule(F.batch_norm)
class BatchNormalization(Affine):
    """Batch normalisation, whose statistics couple the examples: those of a step's first pass serve all its passes.

    So an example's loss depends on its own noise alone. What that leaves out, how the input acts through the
    statistics, ``project`` puts back for a layer right before.

    """

    def bind(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        """Take the arguments of the call."""
        self.couples, self.input, self.eps = training, input, eps
        self.running = running_mean, running_var
        self.spread(input, weight, bias, _by_channel(input))

    def begin(self, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Normalise by the statistics of the step's first pass, or, as this is the first, by the input's own."""
        self.own_output = statistics is not None
        mean, var = self.running if statistics is None else statistics
        if statistics is None and self.couples:
            return self._normalise_by_batch()
        assert mean is not None and var is not None
        self.x = F.batch_norm(self.input, mean, var, eps=self.eps)
        return mean, var

    def _normalise_by_batch(self) -> tuple[Tensor, Tensor]:
        # In float32, as the net's own pass has them: the passes of a step must not differ by more than rounding.
        wide = self.input.to(torch.promote_types(self.input.dtype, torch.float32))
        if wide.numel() == 0:  # which PyTorch's kernel refuses, and a layer takes
            self.x = self.input
            return wide.new_zeros(wide.shape[1]), wide.new_zeros(wide.shape[1])
        x, mean, inverse = torch.native_batch_norm(wide, None, None, None, None, True, 0.0, self.eps)
        self.x = x.to(self.input.dtype)
        # The kernel, several times faster than torch.var_mean, gives 1/√(var + ε): of a smaller variance than ε only
        # the sum is exact, and nothing else is asked of it.
        return mean, inverse**-2 - self.eps

    def output(self, original: Callable[[], Tensor]) -> Tensor:
        """By the statistics of the step's first pass."""
        if not self.own_output:  # only the first pass updates the running statistics
            return original()
        z = self.x if self.weight is None else self.x * self.weight.detach().view(-1, *[1] * (self.x.ndim - 2))
        return z if self.bias is None else z + self.bias.detach().view(-1, *[1] * (self.x.ndim - 2))

    def project(self, delta: Tensor) -> Tensor:
        """The gradient by the input from the one at fixed statistics: ``δ − mean(δ) − x̂ mean(δ x̂)``, means by channel.

        Source: Ioffe & Szegedy, *Batch normalization*, 2015.
        """
        others = [d for d in range(delta.ndim) if d != 1]
        along = (delta * self.x).mean(others, keepdim=True)
        return torch.addcmul(delta - delta.mean(others, keepdim=True), self.x, along, value=-1)


@register_rule(F.layer_norm)
class LayerNormalization(Affine):
    """Layer normalisation."""

    def bind(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        """Take the arguments of the call."""
        shape = list(normalized_shape)
        self.spread(F.layer_norm(input, shape, None, None, eps), weight, bias, shape)


@register_rule(F.rms_norm)
class RMSNormalization(Affine):
    """Root-mean-square normalisation."""

    def bind(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> None:
        """Take the arguments of the call."""
        shape = list(normalized_shape)
        self.spread(F.rms_norm(input, shape, None, eps), weight, None, shape)


@register_rule(F.group_norm)
class GroupNormalization(Affine):
    """Group normalisation."""

    def bind(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        """Take the arguments of the call."""
        self.spread(F.group_norm(input, num_groups, None, None, eps), weight, bias, _by_channel(input))


@register_rule(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
class Shift(Affine):
    """A trainable summand, such as position embeddings."""

    def bind(self, input: Tensor, other: Any, *, alpha: float = 1) -> None:
        """Take the arguments of the call."""
        x, bias = _with_one_weight(input, other)
        if alpha != 1:
            raise NotImplementedError
        self.spread(x, None, bias, _by_example(bias, x))


@register_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__)
class Gain(Affine):
    """A trainable factor, number by number."""

    def bind(self, input: Tensor, other: Any) -> None:
        """Take the arguments of the call."""
        x, weight = _with_one_weight(input, other)
        if self.func in (Tensor.mul_, Tensor.__imul__):  # which overwrite the input
            x = x.clone()
        self.spread(x, weight, None, _by_example(weight, x))


def _by_channel(x: Tensor) -> list[int]:
    return [x.shape[1], *[1] * (x.ndim - 2)]


def _with_one_weight(input: Tensor, other: Any) -> tuple[Tensor, Tensor]:
    """Two operands, the trainable one last."""
    if not isinstance(other, Tensor) or is_weight(input) == is_weight(other):
        raise NotImplementedError
    return (other, input) if is_weight(input) else (input, other)


def _by_example(weight: Tensor, x: Tensor) -> list[int]:
    """The shape of a weight as it is broadcast to one example; the same weight must serve all."""
    shape = list(weight.shape)
    if len(shape) == x.ndim and shape[0] == 1:
        shape = shape[1:]
    pairs = zip(reversed(shape), reversed(x.shape[1:]), strict=False)
    # Or else the result is larger than the input, or each example has a weight of its own.
    if len(shape) >= x.ndim or not all(n in (1, m) for n, m in pairs):
        raise NotImplementedError
    return shape
