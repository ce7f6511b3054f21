"""Every rule: that it is recognised, that spreading and collecting are adjoint, and that collecting is the gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zo_lightning.layers import COMPOSITES, RULES, Affine, BatchNormalization, Operation, noise_sizes, weigh

B = 3


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(tensor(*shape))


# The function, its arguments, and those that have a name.
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = {
    "linear": (F.linear, (tensor(B, 4), weight(2, 4), weight(2)), {}),
    "linear, tokens, no bias": (F.linear, (tensor(B, 5, 4), weight(2, 4)), {}),
    "linear, frozen weight": (F.linear, (tensor(B, 5, 4), tensor(2, 4), weight(2)), {}),
    "conv1d": (F.conv1d, (tensor(B, 2, 9), weight(4, 2, 3), weight(4), 2, 1), {}),
    "conv2d": (F.conv2d, (tensor(B, 2, 7, 6), weight(3, 2, 3, 2), weight(3)), {"stride": (2, 1), "dilation": 2}),
    "conv2d, groups": (F.conv2d, (tensor(B, 4, 5, 5), weight(6, 2, 3, 3), weight(6)), {"groups": 2, "padding": 1}),
    "conv2d, same": (F.conv2d, (tensor(B, 2, 5, 6), weight(3, 2, 4, 3)), {"padding": "same"}),
    "conv2d, valid, frozen weight": (F.conv2d, (tensor(B, 2, 5, 6), tensor(3, 2, 4, 3), weight(3), 1, "valid"), {}),
    "conv3d": (F.conv3d, (tensor(B, 1, 4, 4, 4), weight(2, 1, 3, 3, 3), weight(2)), {"padding": 1}),
    "embedding": (F.embedding, (torch.tensor([[0, 2, 1], [2, 2, 3], [0, 0, 0]]), weight(4, 2)), {}),
    "embedding, padding": (F.embedding, (torch.tensor([[0, 2], [2, 2], [1, 0]]), weight(4, 2), 0), {}),
    "layer_norm": (F.layer_norm, (tensor(B, 5, 4), [4], weight(4), weight(4)), {}),
    "layer_norm, two dimensions": (F.layer_norm, (tensor(B, 2, 5, 4), [5, 4], weight(5, 4), weight(5, 4)), {}),
    "rms_norm": (F.rms_norm, (tensor(B, 5, 4), [4], weight(4)), {}),
    "group_norm": (F.group_norm, (tensor(B, 4, 3, 2), 2, weight(4), weight(4)), {}),
    "batch_norm, evaluation": (F.batch_norm, (tensor(B, 4, 3), tensor(4), tensor(4).exp(), weight(4), weight(4)), {}),
    "batch_norm, training": (F.batch_norm, (tensor(B, 4), tensor(4), tensor(4), weight(4), weight(4), True), {}),
    "position embedding": (torch.add, (tensor(B, 5, 4), weight(1, 5, 4)), {}),
    "position embedding, first": (Tensor.add, (weight(5, 1), tensor(B, 5, 4)), {}),
    "gain": (torch.mul, (tensor(B, 5, 4), weight(4)), {}),
}
cases = pytest.mark.parametrize("name", CASES)


def operation(name: str) -> Operation:
    function, args, kwargs = CASES[name]
    return RULES[function](*args, **kwargs)


def output(name: str) -> Tensor:
    function, args, kwargs = CASES[name]
    return function(*args, **kwargs)


@cases
def test_collect_is_the_gradient_of_the_weights(name: str) -> None:
    one, z = operation(name), output(name)
    delta = tensor(*z.shape)
    expected = torch.autograd.grad((z * delta).sum(), one.weights)
    for actual, gradient in zip(one.collect(delta), expected, strict=True):
        assert actual.shape == gradient.shape
        assert torch.allclose(actual, gradient)


@cases
def test_collects_a_sample_of_the_rows(name: str) -> None:
    one, delta = operation(name), tensor(*output(name).shape)
    for part, whole in zip(one.collect(delta, every=2), one.collect(delta), strict=True):
        assert torch.allclose(part.view_as(whole[::2]), whole[::2])


@cases
@pytest.mark.parametrize("factored", [False, True])
def test_spread_is_the_adjoint_of_collect(name: str, factored: bool) -> None:
    """``Σᵢ <spread(U)ᵢ, δᵢ> = Σᵢ <Uᵢ, collect(δᵢ)>``, with independent entries and with outer products."""
    one, delta = operation(name), tensor(*output(name).shape)
    noise = []
    for w in one.weights:
        sizes = [len(w), w[0].numel()] if factored and w.ndim > 1 else [w.numel()]
        noise.append(tuple(tensor(B, size) + index for index, size in enumerate(sizes)))
    left = (one.spread(noise) * delta).sum()
    right = torch.zeros((), dtype=torch.float64)
    for only in torch.eye(B, dtype=torch.float64):
        grads = one.collect(delta * only.view(-1, *[1] * (delta.ndim - 1)))
        for w, parts, grad in zip(one.weights, noise, grads, strict=True):
            right += (weigh(parts, only, w) * grad).sum()
    assert torch.allclose(left, right)


@cases
def test_the_output_is_that_of_the_function(name: str) -> None:
    assert torch.equal(operation(name).output(lambda: output(name)), output(name))


def test_small_weights_have_independent_noise_and_large_ones_outer_products() -> None:
    assert noise_sizes(torch.zeros(3, 4), torch.zeros(B, 12)) == [12]
    assert noise_sizes(torch.zeros(3, 4), torch.zeros(B, 3)) == [3, 4]
    assert noise_sizes(torch.zeros(7), torch.zeros(B, 3)) == [7]


def test_what_has_no_rule_is_refused() -> None:
    x, w = tensor(B, 4), weight(4)
    for make in (
        lambda: RULES[torch.add](x, 1.0),
        lambda: RULES[torch.add](x, w, alpha=2),
        lambda: RULES[torch.mul](w, weight(4)),
        lambda: RULES[torch.mul](tensor(B, 1), weight(B, 1)),  # a weight for each example
        lambda: RULES[torch.mul](tensor(B, 1), w),  # the result is larger than the input
        lambda: RULES[F.embedding](torch.tensor([[0]]), weight(2, 2), max_norm=1.0),
    ):
        with pytest.raises(NotImplementedError):
            make()


def test_batch_normalization_with_the_statistics_of_another_pass() -> None:
    x, gamma, beta = tensor(5, 2, 3), weight(2), weight(2)
    first = BatchNormalization(x, None, None, gamma, beta, training=True)
    later = BatchNormalization(x, None, None, gamma, beta, training=True, statistics=first.statistics)
    expected = F.batch_norm(x, None, None, gamma, beta, training=True)
    assert torch.allclose(later.output(lambda: torch.zeros(())), expected)


def test_project_turns_the_gradient_at_fixed_statistics_into_the_gradient() -> None:
    x = tensor(5, 2, 3).requires_grad_()
    gamma, delta = weight(2), tensor(5, 2, 3)
    (expected,) = torch.autograd.grad((F.batch_norm(x, None, None, gamma, training=True) * delta).sum(), x)
    norm = BatchNormalization(x.detach(), None, None, gamma, training=True)
    mean, var = norm.statistics
    at_fixed = delta * (gamma / (var + 1e-5).sqrt()).view(1, -1, 1)
    assert torch.allclose(norm.project(at_fixed), expected)


@pytest.mark.parametrize("masks", ["none", "causal", "boolean", "padding", "both"])
def test_attention_equals_pytorchs(masks: str) -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x, steps = tensor(B, 5, 8), 5
    causal = torch.triu(torch.ones(steps, steps, dtype=torch.bool), 1)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(steps).double(), "is_causal": True},
        "boolean": {"attn_mask": causal.expand(B * 2, steps, steps)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
    }
    expected = net(x, x, x, need_weights=False, **options[masks])[0]
    original = F.multi_head_attention_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "multi_head_attention_forward", COMPOSITES[original])
        actual = net(x, x, x, need_weights=False, **options[masks])[0]
    assert torch.allclose(actual, expected)


def test_attention_of_another_kind_is_refused() -> None:
    net = nn.MultiheadAttention(8, 2, kdim=4, batch_first=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "multi_head_attention_forward", COMPOSITES[F.multi_head_attention_forward])
        with pytest.raises(NotImplementedError):
            net(torch.zeros(B, 5, 8), torch.zeros(B, 5, 4), torch.zeros(B, 5, 8))


def test_affine_weights_may_lack_dimensions() -> None:
    assert Affine(tensor(B, 2, 3, 4), weight(3, 1), None, (3, 1)).shape == (1, 3, 1)
