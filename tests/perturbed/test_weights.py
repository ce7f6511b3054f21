"""Every use of a weight is displaced, by any function and in any module; the weight itself is never written."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import ScalableCNN
from zo_lightning.perturbed.weights import DisplacedWeights, ExchangedWeights, Recent, Weights


class Last(nn.Module):
    """The first output of a recurrent layer or of attention."""

    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, *x: Tensor) -> Tensor:
        return self.inner(*x, **self.options)[0]


class Direct(nn.Module):
    """Weights in operators, views, lists, in-place operations and functions of several of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(3, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.a.T + 2.0 * self.b[0] - self.c.sum()
        y += self.c[:, 1]
        z = torch.cat([y, self.b.view(9)[:3].expand(len(x), 3)], dim=1)
        z[:, 0] = self.a.data.diagonal().sum()
        return torch.einsum("bi,ij->bj", z, torch.stack([self.a, self.b]).flatten(0, 1)) + torch.linalg.norm(self.c)


def transformer(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn-1k": (lambda: ScalableCNN(1 / 9), (4, 1, 28, 28)),
    "cnn-169k": (lambda: ScalableCNN(12.3333), (4, 1, 28, 28)),
    "cnn-2.8M": (lambda: ScalableCNN(120 - 1 / 9), (4, 1, 28, 28)),
    "lstm": (lambda: Last(nn.LSTM(5, 4, 2, batch_first=True)), (3, 6, 5)),
    "gru": (lambda: Last(nn.GRU(5, 4, bidirectional=True)), (6, 3, 5)),
    "attention": (lambda: Last(nn.MultiheadAttention(8, 2)), (5, 3, 8)),
    "transformer": (lambda: transformer(dropout=0.0), (3, 5, 8)),
    "transformer-fast-path": (lambda: transformer().eval(), (3, 5, 8)),
    "weight-norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), (3, 5)),
    "spectral-norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), (3, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 2, 4, 4)),
    "direct": (Direct, (4, 3)),
}


def inputs(name: str, net: nn.Module, *shape: int) -> tuple[Tensor, ...]:
    x = torch.randn(shape)
    return (x, x, x) if name == "attention" else (x,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_pass_equals_one_over_moved_weights_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    net = make().to(dtype)
    x = tuple(t.to(dtype) for t in inputs(name, net, *shape))
    weights = Weights.of(net)
    moved = [(p + 0.01 * torch.randn_like(p)).requires_grad_() for p in weights]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    versions = [p._version for p in weights]
    watched = DisplacedWeights(weights, moved.__getitem__)
    with watched:
        displaced = net(*x)
    assert [p._version for p in weights] == versions
    for key, value in net.state_dict().items():  # spectral normalisation iterates its own buffers
        assert torch.equal(value, before[key]) or "parametrizations.weight.0._" in key
        value.copy_(before[key])
    for p, value in zip(weights, moved, strict=True):
        p.copy_(value)
    # In evaluation mode attention has a path of its own, which PyTorch does not take where functions are watched.
    with DisplacedWeights(weights, weights.__getitem__) if name == "transformer-fast-path" else nullcontext():
        assert torch.equal(displaced, net(*x))
    assert watched.seen == set(range(len(weights)))
    for key, value in net.state_dict().items():
        value.copy_(before[key])
    with ExchangedWeights(weights, moved):
        assert torch.equal(displaced, net(*x))
    assert [torch.equal(p, before[name]) for name, p in net.named_parameters()] == [True] * len(weights)
    assert not torch.equal(displaced, make().to(dtype)(*x)), "or nothing was displaced"


@torch.no_grad()
def test_what_is_asked_about_a_weight_is_no_use_of_it() -> None:
    weight = nn.Parameter(torch.randn(2, 3))

    def value(position: int) -> Tensor:
        raise AssertionError("nobody has read the weight")

    with DisplacedWeights([weight], value) as watched:
        assert weight.shape == (2, 3) and weight.size(1) == 3 and weight.dim() == 2 and len(weight) == 2
        assert weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.requires_grad
        assert weight.numel() == 6 and weight.is_contiguous() and weight.stride() == (3, 1)
        assert weight.grad is None and isinstance(weight, nn.Parameter)
    assert not watched.seen


@torch.no_grad()
def test_writes_into_a_weight_within_the_pass_are_lost() -> None:
    layer = nn.Embedding(5, 3, max_norm=0.1)  # which shortens the rows it looks up
    weights = Weights.of(layer)
    before = layer.weight.clone()
    with DisplacedWeights(weights, lambda k: weights[k] + 1.0):
        out = layer(torch.tensor([0, 1]))
    assert out.norm(dim=1) == pytest.approx([0.1, 0.1], rel=1e-3)
    assert torch.equal(layer.weight, before)


@torch.no_grad()
def test_weights_in_place_are_moved_and_come_back_bit_for_bit() -> None:
    net: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
    weights = Weights.of(net)
    before = [p.clone() for p in weights]
    raw = net[0].weight.detach()  # shares memory, as an array of NumPy does
    with pytest.raises(KeyboardInterrupt), DisplacedWeights(weights, lambda k: before[k] + 1.0, in_place={0, 1}):
        assert torch.equal(raw, before[0] + 1.0)
        assert torch.equal(net[1].weight.clone(), before[2] + 1.0)
        raise KeyboardInterrupt
    assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))


@torch.no_grad()
def test_weights_that_cannot_all_be_moved_in_place_come_back() -> None:
    weights = Weights.of(nn.Linear(3, 3))
    before = [p.clone() for p in weights]

    def value(position: int) -> Tensor:
        if position:
            raise RuntimeError("no memory")
        return before[position] + 1.0

    with pytest.raises(RuntimeError, match="no memory"), DisplacedWeights(weights, value, in_place={0, 1}):
        pass
    assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))
    assert torch.equal(weights[0] * 1.0, before[0]), "the pass has not begun"


def test_weights_of_a_module() -> None:
    net: Any = nn.Module()
    net.words = nn.Embedding(5, 4, padding_idx=2)
    net.tied = nn.Embedding(5, 4, padding_idx=1)
    net.out = nn.Linear(4, 5, bias=False)
    net.out.weight = net.tied.weight
    net.again = net.out
    net.frozen = nn.Linear(2, 2).requires_grad_(False)
    weights = Weights.of(net)
    assert weights.names == ["words.weight", "tied.weight"] == [n for n, p in net.named_parameters() if p.requires_grad]
    assert weights.still == {0: 2}, "a weight that another layer shares is trained there, the padding row too"
    assert list(weights) == weights.params and len(weights) == 2
    with pytest.raises(ValueError, match="Linear has no parameter with requires_grad=True"):
        Weights.of(net.frozen)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_weights_of_code_that_cannot_be_watched() -> None:
    modules: Any = {"a": nn.Linear(2, 2), "b": torch.jit.script(nn.Linear(2, 2))}
    weights = Weights.of(nn.ModuleDict(modules))
    assert [weights.names[k] for k in sorted(weights.opaque)] == ["b.weight", "b.bias"]


def test_recent_values_are_one_large_and_some_small_ones() -> None:
    weights = [torch.zeros(n) for n in (80, 40, 4, 4, 4)]
    asked: list[int] = []
    recent = Recent(weights, lambda k: asked.append(k) or weights[k] + k)  # type: ignore[func-returns-value]
    for position in (0, 2, 0, 3, 0, 2, 1, 2, 3, 0, 4, 3, 2):
        assert torch.equal(recent(position), weights[position] + position)
    assert asked == [0, 2, 3, 1, 0, 4, 2], "40 evicts 80, and three of 4 are more than an eighth of 80"


@torch.no_grad()
def test_a_lean_value_serves_all_steps_of_a_sequence() -> None:
    cell = nn.Linear(30, 30)
    weights = Weights.of(cell)
    asked: list[int] = []
    recent = Recent(weights, lambda k: asked.append(k) or weights[k].detach().clone())  # type: ignore[func-returns-value]
    x = torch.randn(2, 30)
    with DisplacedWeights(weights, recent):
        for _ in range(20):
            x = F.linear(x, cell.weight, cell.bias).tanh()
    assert sorted(asked) == [0, 1]


@torch.no_grad()
@pytest.mark.parametrize("failing", [None, KeyboardInterrupt])
def test_exchanged_weights_come_back_with_their_gradients(failing: type[BaseException] | None) -> None:
    net = nn.Linear(2, 1)
    net.weight.grad = gradient = torch.ones(1, 2)
    weights = Weights.of(net)
    before, places = [p.clone() for p in weights], [p.data_ptr() for p in weights]
    with pytest.raises(failing) if failing else nullcontext(), ExchangedWeights(weights, [p + 1.0 for p in weights]):
        assert torch.equal(net.weight, before[0] + 1.0)
        net.weight.mul_(2.0)
        with torch.enable_grad():
            net(torch.ones(1, 2)).sum().backward()
        if failing:
            raise failing
    assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))
    assert [p.data_ptr() for p in weights] == places
    assert net.weight.grad is gradient and torch.equal(gradient, torch.ones(1, 2)) and net.bias.grad is None


@torch.no_grad()
def test_an_interrupt_amid_the_exchange_leaves_no_weight_displaced() -> None:
    weights = Weights.of(nn.Linear(2, 1))
    before = [p.clone() for p in weights]

    class Interrupted(list[Tensor]):
        def __iter__(self) -> Any:
            yield self[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ExchangedWeights(weights, Interrupted(p + 1.0 for p in before)):
        pass
    assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))
