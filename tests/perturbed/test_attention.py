"""Attention taken apart: the same numbers as PyTorch's, and exact gradients for each example."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.perturbed.exact import assert_exact
from zo_lightning.perturbed.outputs import DisplacedOutputs
from zo_lightning.perturbed.weights import Weights

B, T, S, E = 3, 5, 4, 8


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


CAUSAL = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
PADDING = torch.tensor([[False] * T, [False] * 4 + [True], [False] * 3 + [True] * 2])
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(T).double(), "is_causal": True},
    "boolean": {"attn_mask": CAUSAL.expand(B * 2, T, T)},
    "padding": {"key_padding_mask": PADDING},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "three projections": {"kdim": E, "vdim": 6},
}


def displaced(net: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad(), DisplacedOutputs(net, Weights.of(net)) as watched:
        output = net(*args, **kwargs)
    assert not watched.opaque
    return output


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_equals_pytorchs(masks: str, kind: str, weights: dict[str, bool], batch_first: bool) -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(E, 2, batch_first=batch_first, dtype=torch.float64, **KINDS[kind])
    x = tensor(B, T, E) if batch_first else tensor(T, B, E)
    value = x[..., :6] if kind == "three projections" else x
    actual = displaced(net, x, x, value, **weights, **MASKS[masks])
    expected = net(x, x, value, **weights, **MASKS[masks])
    torch.testing.assert_close(actual[0], expected[0])
    assert (actual[1] is None) is (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(actual[1], expected[1])


def test_across_sequences_equals_pytorchs() -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(E, 2, dtype=torch.float64)
    x, memory = tensor(T, B, E), tensor(S, B, E)
    torch.testing.assert_close(displaced(net, x, memory, memory), net(x, memory, memory))


def test_the_dropout_of_attention_is_that_of_training() -> None:
    net = nn.MultiheadAttention(E, 2, dropout=0.9, dtype=torch.float64)
    x = tensor(T, B, E)
    torch.manual_seed(0)
    assert not torch.equal(displaced(net, x, x, x)[0], displaced(net, x, x, x)[0])
    torch.testing.assert_close(displaced(net.eval(), x, x, x), net(x, x, x))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("space", ["auto", "activations", "weights"])
@pytest.mark.parametrize("kind", ["self", "across", "more keys", "encoder", "evaluation", "transformer"])
def test_gradients_of_each_example(kind: str, space: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    x, memory = tensor(B, T, E), tensor(B, S, E)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    options: dict[str, Any] = {"batch_first": batch_first, "dtype": torch.float64}
    net: nn.Module
    if kind == "transformer":
        net, inputs = nn.Transformer(E, 2, 1, 1, 16, **options), (memory, x)
    elif kind in ("encoder", "evaluation"):
        net, inputs = nn.TransformerEncoderLayer(E, 2, 16, **options).train(kind == "encoder"), (x,)
    else:
        keys, more = x if kind == "self" else memory, KINDS["more keys"] if kind == "more keys" else {}
        net, inputs = nn.MultiheadAttention(E, 2, **more, **options), (x, keys, keys)

    def losses() -> Tensor:
        output = net(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        return (output if batch_first else output.transpose(0, 1)).tanh().flatten(1).sum(1)

    assert_exact(net, losses, space)


def test_one_sequence_without_a_batch_stays_pytorchs() -> None:
    net = nn.MultiheadAttention(E, 2, dtype=torch.float64)
    x = tensor(T, E)
    with torch.no_grad(), DisplacedOutputs(net, Weights.of(net)) as watched:
        output = net(x, x, x)
    torch.testing.assert_close(output, net(x, x, x))
    assert "in_proj_weight" in watched.opaque
    assert F.multi_head_attention_forward.__name__ in watched.opaque["in_proj_weight"]
