"""What a watched pass sees of a net, and what it changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning.perturbed.outputs import DisplacedOutputs, Use
from zo_lightning.perturbed.weights import Weights

B = 4


def watch(net: nn.Module, x: Tensor, gated: bool = False) -> tuple[DisplacedOutputs, Tensor]:
    """A pass that keeps track of readers, or then one that keeps what the gates let through."""
    watched = DisplacedOutputs(net, Weights.of(net))
    with torch.no_grad(), watched:
        output = net(x)
    if gated:
        gates = {key: use.tracked.gate() for key, use in watched.uses.items() if use.tracked is not None}
        watched = DisplacedOutputs(net, Weights.of(net), lambda use: None, 1.0, gates=gates)
        with torch.no_grad(), watched:
            output = net(x)
    return watched, output


def visible(net: nn.Module, x: Tensor) -> Tensor:
    """1 where the loss can depend on the output of the use of ``w``, else 0."""
    use = watch(net, x, gated=True)[0].uses["w"]
    return use.dense(use.visible(torch.ones_like(use.output)))


class Function(nn.Module):
    """A net written as one function of its weights."""

    w: Tensor
    v: Tensor
    b: Tensor

    def __init__(self, function: Callable[["Function", Tensor], Tensor], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def test_every_use_is_seen_in_order_by_the_name_of_its_first_weight() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    watched, _ = watch(net, torch.randn(B, 1, 6, 6))
    assert list(watched.uses) == ["0.weight", "1.weight", "4.weight"]
    assert not watched.opaque


def test_batch_statistics_are_float32_under_autocast() -> None:
    """Passes without displacement agree: the first one, which normalises by itself, and those by its statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    x, statistics = torch.randn(B, 1, 8, 8) + 1, {}
    outputs = []
    for _ in range(2):
        watched = DisplacedOutputs(net, Weights.of(net), lambda use: None, 1.0, statistics)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), watched:
            outputs.append(net(x).float())
    assert statistics["1.weight"][0].dtype == torch.float32
    # Only the rounding of the result to bfloat16 is left, in one of the passes: 2^-8 of numbers up to 4.
    assert (outputs[0] - outputs[1]).abs().max() <= 4 * 2**-8


def test_tied_and_functional_weights() -> None:
    def twice(self: Function, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w), self.w, bias=self.b)

    watched, _ = watch(Function(twice, w=torch.randn(3, 3), b=torch.zeros(3)), torch.randn(B, 3))
    assert list(watched.uses) == ["w", "w:1"]
    assert [len(use.operation.weights) for use in watched.uses.values()] == [1, 2]


def test_frozen_weights_are_no_uses() -> None:
    net = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    assert list(watch(net, torch.randn(B, 3))[0].uses) == ["1.weight"]


def test_weights_may_be_computed_and_used_by_any_function() -> None:
    def odd(self: Function, x: Tensor) -> Tensor:
        first, second = self.w.exp().T.chunk(2, 1)
        return x @ first + F.linear(x, second.T) + torch.einsum("bi,oi->bo", x, self.v)

    net, x = Function(odd, w=torch.randn(4, 3), v=torch.randn(2, 3)), torch.randn(B, 3)
    watched, output = watch(net, x)
    assert not watched.opaque
    assert list(watched.uses) == ["w", "w:1", "v"]
    assert all(use.is_by_example(B) for use in watched.uses.values())
    # The two halves of w each have the gradient of their own matrix product.
    grads = [use.operation.weight_vjp(torch.ones(B, 2)) for use in watched.uses.values()]
    expected = torch.autograd.grad(net(x).sum(), [net.w, net.v])
    torch.testing.assert_close(grads[0][0] + grads[1][0], expected[0])
    torch.testing.assert_close(grads[2][0], expected[1])
    torch.testing.assert_close(output, net(x).detach())


def test_what_is_written_or_mixed_is_opaque() -> None:
    def odd(self: Function, x: Tensor) -> Tensor:
        rows = torch.zeros(len(x), 3)
        rows[:] = self.w
        return torch.broadcast_tensors(x, self.v)[1] + rows

    watched, _ = watch(Function(odd, w=torch.randn(3), v=torch.randn(3)), torch.randn(B, 3))
    assert watched.opaque == {
        "w": "__setitem__ writes it into a tensor",
        "v": "broadcast_tensors gives more than one tensor",
    }
    assert not watched.uses


@pytest.mark.parametrize("relu", [F.relu, torch.relu, Tensor.relu, Tensor.relu_, nn.ReLU(), nn.ReLU(inplace=True)])
def test_a_relu_hides_what_it_zeroes(relu: Callable[[Tensor], Tensor]) -> None:
    net = Function(lambda self, x: relu(F.linear(x, self.w)).sum(1), w=torch.randn(5, 3))
    x = torch.randn(B, 3)
    assert torch.equal(visible(net, x) > 0, F.linear(x, net.w) > 0)


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(2, stride=3), lambda z: F.max_pool2d(z, 2, ceil_mode=True)]
)
@pytest.mark.parametrize("order", ["relu first", "pool first", "no relu"])
def test_visible_is_where_the_gradient_can_be(pool: Callable[[Tensor], Tensor], order: str) -> None:
    steps = {"relu first": lambda z: pool(F.relu(z)), "pool first": lambda z: F.relu(pool(z)), "no relu": pool}
    net = Function(lambda self, x: steps[order](F.conv2d(x, self.w)).flatten(1), w=torch.randn(2, 1, 2, 2))
    x = torch.randn(B, 1, 6, 6)
    z = F.conv2d(x, net.w).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(steps[order](z).sum(), z)
    assert torch.equal(visible(net, x) > 0, gradient > 0)


def test_windows_that_overlap_hide_nothing() -> None:
    net = Function(lambda self, x: F.max_pool2d(F.conv2d(x, self.w), 3, 1).flatten(1), w=torch.randn(2, 1, 2, 2))
    assert bool((visible(net, torch.randn(B, 1, 6, 6)) == 1).all())


def test_an_output_that_is_read_twice_is_visible_everywhere() -> None:
    def residual(self: Function, x: Tensor) -> Tensor:
        z = F.linear(x, self.w)
        return z + z.relu()

    assert bool((visible(Function(residual, w=torch.randn(3, 3)), torch.randn(B, 3)) == 1).all())


def test_a_batch_normalization_that_alone_reads_an_output_is_known() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    watched, _ = watch(net, torch.randn(B, 3))
    linear, norm = watched.uses["0.weight"], watched.uses["1.weight"]
    assert linear.tracked is not None and norm.tracked is not None
    assert linear.tracked.only_reader is norm
    assert norm.tracked.gate() == (True, False)


def test_outputs_are_displaced_and_later_passes_keep_the_first_ones_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    x, statistics = torch.randn(B, 3, dtype=torch.float64), {}
    outputs = []
    for shift in (0.0, 1.0):

        def shifted(use: Use, shift: float = shift) -> Tensor:
            return torch.full_like(use.output, shift)

        watched = DisplacedOutputs(net, Weights.of(net), shifted, 1.0, statistics)
        with torch.no_grad(), watched:
            outputs.append(net(x))
    sigma = (statistics["1.weight"][1] + 1e-5).sqrt()
    assert torch.allclose(outputs[1] - outputs[0], (1 / sigma + 1).expand(B, 4))


def test_without_displacement_the_pass_is_the_nets_own() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(B, 5, 8)
    watched, output = watch(layer, x)
    assert torch.allclose(output, layer(x), atol=1e-6)
    assert not watched.opaque
    assert [key.removesuffix(".weight") for key in watched.uses] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj",
        "norm1",
        "linear1",
        "linear2",
        "norm2",
    ]
