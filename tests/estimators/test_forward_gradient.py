"""Exact slopes: through attention, in modules with two names, counted as what they cost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import Backprop, ForwardGradient, Objective, Rademacher, ZerothOrder
from zo_lightning.perturbed.weights import Weights


def attention() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(3, 5, 8)


def assert_slope(net: nn.Module, loss: Callable[[], Tensor]) -> None:
    """The slope along a direction is the product of it and backpropagation's gradient."""
    net.zero_grad()
    Backprop().backward(loss, net, 0)
    gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    ForwardGradient(Rademacher(), seed=0).backward(loss, net, 0)
    weights = Weights.of(net)
    u = Rademacher().draw(weights.params, 0, 0, 0, weights.still).tensors()
    slope = sum(float((gradient[name] * t).sum()) for name, t in zip(weights.names, u, strict=True))
    for p, t in zip(weights, u, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, slope * t, rtol=1e-9)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["layer", "examples second", "encoder", "padding", "with weights", "without weights"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_the_slope_through_attention_is_that_of_backpropagation(train: bool, kind: str) -> None:
    """Also in evaluation, where PyTorch has a fast path."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=kind != "examples second")
    encoder, attends = nn.TransformerEncoder(layer, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    padding = torch.tensor([[False] * 4 + [True]] * 3)
    for net in (layer, encoder, attends):
        net.train(train).double()
    losses: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "layer": (layer, lambda: layer(x)),
        "examples second": (layer, lambda: layer(x)),
        "encoder": (encoder, lambda: encoder(x)),
        "padding": (encoder, lambda: encoder(x, src_key_padding_mask=padding)[:, :4]),
        "with weights": (attends, lambda: attends(x, x, x)[0]),
        "without weights": (attends, lambda: attends(x, x, x, need_weights=False)[0]),
    }
    net, output = losses[kind]
    assert_slope(net, lambda: output().square().mean())


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_the_slope_through_the_attention_of_transformers(name: str, way: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = {"vocab_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": way}
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = getattr(transformers, f"{name}Config")(**sizes, **words)
    net = getattr(transformers, f"{name}Model")(config).double().eval()
    ids = torch.randint(3, 16, (3, 5))
    assert_slope(net, lambda: net(input_ids=ids).last_hidden_state.square().mean())


def test_a_direction_counts_two_passes() -> None:
    net, x = attention()
    objective = Objective(lambda: net(x).square().mean(), net)
    ForwardGradient(samples=3, seed=0).backward(objective, net, 0)
    assert objective.forward_passes == 6


def test_a_loss_that_drops_the_tangents_is_refused() -> None:
    net = nn.Linear(2, 2)
    x = torch.randn(3, 2)

    def loss() -> Tensor:
        return F.mse_loss(torch.from_numpy(net(x).detach().numpy()), torch.ones(3, 2))

    with pytest.raises(ValueError, match="no tangent reaches the loss: .* ZerothOrder needs values alone"):
        ForwardGradient(seed=0).backward(loss, net, 0)
    assert net.weight.grad is None
    ZerothOrder(seed=0).backward(loss, net, 0)
    assert net.weight.grad is not None and net.weight.grad.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused() -> None:
    net = nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Linear(4, 1))
    with pytest.raises(ValueError, match="cannot see through TorchScript"):
        ForwardGradient(seed=0).backward(lambda: net(torch.ones(2, 3)).sum(), net, 0)
