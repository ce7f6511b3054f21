"""Nearly all weights of well-known nets have noise for each example; ``benchmarks/layer_coverage.py`` has all nets."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

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
