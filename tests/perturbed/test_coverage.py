"""Nearly all weights of well-known nets have noise for each example; ``benchmarks/layer_coverage.py`` has all nets."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from benchmarks.layer_coverage import coverage, first_tensor, timm_nets, torchvision_nets, transformers_nets
from tests.perturbed.exact import assert_exact

MOST = 0.02
"""Of the weights, the share that may be on one direction for the whole batch."""

VISION = (
    "fcn_resnet50",
    "googlenet",
    "maxvit_t",
    "mobilenet_v3_small",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
)
VISION += ("swin_t", "swin_v2_t", "vit_b_32")


def nets(find: Callable[[], Any], package: str, only: tuple[str, ...] = ()) -> list[Any]:
    try:
        found = dict(find())
    except ImportError:
        return [pytest.param(None, marks=pytest.mark.skip(f"{package} is not installed"), id=package)]
    return [pytest.param(build, id=name) for name, build in found.items() if not only or name in only]


ALL = [
    *nets(torchvision_nets, "torchvision", VISION),
    *nets(timm_nets, "timm"),
    *nets(transformers_nets, "transformers"),
]
# Windows, relative positions, learned queries, parametrized convolutions.
TIMM = ("test_maxvit", "test_nfnet", "test_vit3", "test_vit_relpos")
SOME = [*nets(timm_nets, "timm", TIMM), *nets(transformers_nets, "transformers")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", ALL)
def test_coverage(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    net, output = build()
    share, shared = coverage(net.train(), output)
    assert share <= MOST, shared


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", SOME)
def test_gradients_of_each_example(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        net, output = build()
        assert_exact(net.eval(), lambda: first_tensor(output()).flatten(1).tanh().square().sum(1))
    finally:
        torch.set_default_dtype(before)


class Normalized(nn.Module):
    """Cosines between inputs and weights, with gains and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.gain = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.ones(5))
        self.temperature = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(x, dim=1), F.normalize(self.w, dim=1))
        return self.temperature.exp() * cosines * self.gain


class Tokens(nn.Module):
    """Class and register tokens, position embeddings, a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"token": (1, 1, 6), "registers": (2, 6), "places": (1, 4, 6), "scale": (6,)}
        self.own = nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = x.unflatten(1, (1, 6))
        z = torch.cat([self.own["token"].expand(len(x), -1, -1), z], 1)
        z = torch.cat([self.own["registers"].unsqueeze(0).repeat(len(x), 1, 1), z], 1) + self.own["places"]
        return z + self.own["scale"] * self.inner(z)


class Projections(nn.Module):
    """Products of all kinds with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.addmm(self.b, x, self.w).tanh().unsqueeze(1)
        z = torch.bmm(z, self.w.expand(len(x), -1, -1)).tanh()
        z = torch.baddbmm(z, z, self.w.expand(len(x), -1, -1)).tanh()
        z = torch.einsum("bti,oi->bto", z, self.w).tanh() @ self.w
        return torch.matmul(self.w, z.transpose(1, 2))


def channels(net: nn.Module) -> Callable[[Tensor], Any]:
    return lambda x: net(x.unflatten(1, (2, 3, 1)).expand(-1, -1, -1, 4))


PRUNED = nn.Linear(6, 5)
prune.l1_unstructured(PRUNED, "weight", 0.5)
LAYERS: dict[str, tuple[nn.Module, Callable[[Tensor], Any] | None]] = {
    "weight norm": (parametrizations.weight_norm(nn.Linear(6, 5)), None),
    "spectral norm": (parametrizations.spectral_norm(nn.Linear(6, 5)), None),
    "orthogonal": (parametrizations.orthogonal(nn.Linear(6, 6)), None),
    "pruned": (PRUNED, None),
    "normalized": (Normalized(), None),
    "tokens": (Tokens(), None),
    "products": (Projections(), None),
    "spectral norm of a convolution": (conv := parametrizations.spectral_norm(nn.Conv2d(2, 4, 2)), channels(conv)),
    "transposed convolution": (up := nn.ConvTranspose2d(2, 3, 2, 2), channels(up)),
    "group normalization": (groups := nn.GroupNorm(2, 2), channels(groups)),
    "instance normalization": (instance := nn.InstanceNorm2d(2, affine=True), channels(instance)),
    "batch normalization": (batch := nn.BatchNorm2d(2).eval(), channels(batch)),
    "circular padding": (circular := nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), channels(circular)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("space", ["auto", "activations", "weights"])
def test_gradients_of_each_example_in_one_layer(name: str, space: str) -> None:
    net, call = LAYERS[name]
    net.double()
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_exact(net, lambda: (call or net)(x).tanh().flatten(1).sum(1), space)
