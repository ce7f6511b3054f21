"""Recurrent layers step by step: the same numbers as PyTorch's, and exact gradients for each example."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests.perturbed.exact import assert_exact
from zo_lightning.perturbed.outputs import DisplacedOutputs
from zo_lightning.perturbed.weights import Weights

B, T, E, H = 3, 4, 5, 6
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
}
LAYERS = [
    *((kind, options) for kind in (nn.LSTM, nn.GRU, nn.RNN) for options in KINDS.values()),
    (nn.LSTM, {"proj_size": 2, "num_layers": 2}),
    (nn.RNN, {"nonlinearity": "relu"}),
]
layers = pytest.mark.parametrize(("kind", "options"), LAYERS)


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for part in output for t in flat(part)]


def displaced(net: nn.Module, *args: Any) -> list[Tensor]:
    with torch.no_grad(), DisplacedOutputs(net, Weights.of(net)) as watched:
        output = net(*args)
    assert not watched.opaque
    return flat(output)


@layers
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_equals_pytorchs(kind: Any, options: dict[str, Any], batch_first: bool, with_state: bool) -> None:
    torch.manual_seed(0)
    net = kind(E, H, batch_first=batch_first, **options).double().eval()
    args: list[Any] = [tensor(B, T, E)]
    if with_state:
        ends = [end.detach() + 0.1 for end in flat(net(*args)[1])]
        args.append(ends[0] if len(ends) == 1 else tuple(ends))
    torch.testing.assert_close(displaced(net, *args), flat(net(*args)))


@layers
@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_of_each_example(kind: Any, options: dict[str, Any], batch_first: bool) -> None:
    torch.manual_seed(0)
    net = kind(E, H, batch_first=batch_first, **options).double()
    x = tensor(B, T, E) if batch_first else tensor(T, B, E)

    def losses() -> Tensor:
        z = net(x)[0]
        return (z if batch_first else z.transpose(0, 1)).flatten(1).square().sum(1)

    assert_exact(net, losses)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any) -> None:
    torch.manual_seed(0)
    net = kind(E, H).double()
    x = tensor(B, E)
    torch.testing.assert_close(displaced(net, x), flat(net(x)))

    def losses() -> Tensor:
        state = net(tensor(B, E), net(x))
        return flat(state)[0].square().sum(1)

    assert_exact(net, losses)


def test_a_packed_sequence_stays_pytorchs_and_is_named() -> None:
    net = nn.LSTM(E, H, batch_first=True).double()
    packed = pack_padded_sequence(tensor(B, T, E), [4, 3, 1], batch_first=True)
    with torch.no_grad(), DisplacedOutputs(net, Weights.of(net)) as watched:
        output = net(packed)[0]
    torch.testing.assert_close(output.data, net(packed)[0].data)
    assert watched.opaque.keys() == dict(net.named_parameters()).keys()
