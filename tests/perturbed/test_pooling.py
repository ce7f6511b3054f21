"""Max-pooling without autograd: PyTorch's results, faster."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from zo_lightning import Batched, GradientEstimator, PerExample, ZerothOrder
from zo_lightning.perturbed import pooling
from zo_lightning.perturbed.pooling import FastPooling, maxima
from zo_lightning.perturbed.state import State

POOL = {2: F.max_pool2d, 3: F.max_pool3d}


def pooled(func: Any, x: Tensor, options: dict[str, Any]) -> Tensor | None:
    with torch.no_grad(), patch.object(pooling, "_FEW", 0):
        return maxima(func, (x,), options)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_it_is_what_pytorch_gives(data: st.DataObject) -> None:
    dimensions = data.draw(st.sampled_from([2, 3]))

    def each(sizes: st.SearchStrategy[int]) -> Any:
        return data.draw(st.one_of(sizes, st.tuples(*[sizes] * dimensions)))

    options: dict[str, Any] = {"kernel_size": each(st.integers(1, 4))}
    for name, low, high in (("stride", 0, 4), ("padding", 0, 2), ("dilation", 1, 2)):
        if data.draw(st.booleans()):
            options[name] = each(st.integers(low, high))
    options |= {name: True for name in ("ceil_mode", "return_indices") if data.draw(st.integers(0, 5)) == 0}
    batch = data.draw(st.lists(st.integers(2, 3), min_size=1, max_size=2))
    shape = batch + [data.draw(st.integers(3, 12)) for _ in range(dimensions)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    x = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(0)).to(dtype)  # with ties
    x.flatten()[:: data.draw(st.integers(5, 50))] = data.draw(st.sampled_from([0.0, -torch.inf, torch.inf, torch.nan]))
    found = pooled(POOL[dimensions], x, options)
    try:
        right = POOL[dimensions](x, **options)
    except (RuntimeError, ValueError):
        assert found is None
        return
    if found is not None:
        torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)
        assert found.stride() == right.stride()
        assert found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("dimensions", "options"),
    [
        (2, {"kernel_size": 2}),
        (2, {"kernel_size": (3, 2), "stride": [2, 1], "padding": 1, "dilation": 2}),
        (3, {"kernel_size": 2, "stride": 1}),
    ],
)
def test_poolings_of_nets_are_taken(dimensions: int, options: dict[str, Any]) -> None:
    x = torch.randn(4, 8, *(9,) * dimensions)
    found = pooled(POOL[dimensions], x, options)
    assert found is not None and torch.equal(found, POOL[dimensions](x, **options))


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.ones(4, 8, 12, 12), {"kernel_size": (1, 2)}),  # would be a view of the input
        (torch.ones(4, 8, 12, 12), {"kernel_size": 12}),  # one window: PyTorch is fast
        (torch.ones(4, 8, 12, 12), {"kernel_size": 2, "stride": 0}),
        (torch.ones(4, 8, 12, 12), {"kernel_size": True}),
        (torch.ones(4, 8, 12, 12), {"kernel_size": 2.0}),
        (torch.ones(4, 8, 12, 12), {"kernel_size": 2, "unknown": 1}),
        (torch.ones(4, 8, 12, 12), {}),
        (torch.ones(4, 8, 12, 12).to(memory_format=torch.channels_last), {"kernel_size": 2}),
        (torch.ones(4, 8, 12, 12, dtype=torch.int64), {"kernel_size": 2}),
        (torch.ones(4, 8, 12, 12, device="meta"), {"kernel_size": 2}),
        (torch.ones(4, 8, 12, 12).to_mkldnn(), {"kernel_size": 2}),
        ([1.0, 2.0], {"kernel_size": 2}),
    ],
)
def test_what_is_not_for_it_is_left_to_pytorch(x: Any, options: dict[str, Any]) -> None:
    assert pooled(F.max_pool2d, x, options) is None


def test_derivatives_are_pytorchs() -> None:
    """Of equal numbers in a window the first has all of the gradient, the mean of maxima's would be another one."""
    x, u = torch.zeros(16, 8, 12, 12), torch.randn(16, 8, 12, 12)

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)

    with torch.no_grad(), FastPooling():
        tangent = torch.func.jvp(pool, (x,), (u,))[1]
        gradient = torch.func.grad(lambda x: pool(x).sum())(x)
        with forward_ad.dual_level():
            tangents = forward_ad.unpack_dual(pool(forward_ad.make_dual(x, u))).tangent
    with FastPooling():
        x.requires_grad_()
        pool(x).sum().backward()
    assert torch.equal(tangent, u[..., ::2, ::2]) and tangents is not None and torch.equal(tangents, tangent)
    assert x.grad is not None and x.grad[0, 0, :2, :2].tolist() == [[1, 0], [0, 0]]
    assert torch.equal(gradient, x.grad)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Linear(4 * 7 * 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv(x).relu()).flatten(1))


@pytest.mark.parametrize("estimator", [ZerothOrder(seed=0), ZerothOrder(evaluation=Batched(), samples=3, seed=0),
                                       PerExample(seed=0)])  # fmt: skip
def test_steps_take_it_and_change_by_nothing(estimator: GradientEstimator) -> None:
    reduction = "none" if isinstance(estimator, PerExample) else "mean"
    x, y = torch.randn(32, 1, 16, 16), torch.arange(32) % 3

    def gradients(few: float) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        net = Pooled()
        state, found = estimator.init(net), []
        with patch.object(pooling, "_FEW", few), patch.object(pooling, "reduce", wraps=pooling.reduce) as taken:
            for step in range(3):
                estimator.backward(lambda: F.cross_entropy(net(x), y, reduction=reduction), net, step, state)
                found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
                net.zero_grad()
        return found, taken.call_count

    fast, often = gradients(0)
    slow, never = gradients(float("inf"))
    assert often >= 6 and never == 0  # twice a pass, from the first step to the last
    assert len(fast) == len(slow) == 12
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


def test_a_state_knows_that_the_net_pools() -> None:
    """The passes of later steps are watched for poolings alone, after a checkpoint too."""
    net, estimator, state, again = Pooled(), ZerothOrder(seed=0), State(), State()

    def loss() -> Tensor:
        return net(torch.ones(16, 1, 16, 16)).mean()

    estimator.backward(loss, net, 0, state)
    again.load_state_dict(state.state_dict())
    with patch.object(pooling, "reduce", wraps=pooling.reduce) as taken:
        estimator.backward(loss, net, 1, again)
    assert taken.call_count == 4


def test_a_net_that_is_compiled_pools_by_itself() -> None:
    """Its graph would have to be compiled once more for passes that are watched."""
    net, state = Pooled(), State()
    net.compile(backend="eager")
    ZerothOrder(seed=0).backward(lambda: net(torch.ones(16, 1, 16, 16)).mean(), net, 0, state)
    assert not state.state_dict()["pools"]
