"""Max-pooling without autograd: PyTorch's results, faster."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import Batched, GradientEstimator, PerExample, ZerothOrder
from zo_lightning.perturbed import pooling
from zo_lightning.perturbed.pooling import FastPooling, max_pool
from zo_lightning.perturbed.state import State

SIZES = st.integers(1, 4)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_is_what_pytorch_gives(data: st.DataObject) -> None:
    dimensions = data.draw(st.sampled_from([2, 3]))
    func = {2: F.max_pool2d, 3: F.max_pool3d}[dimensions]

    def each(sizes: st.SearchStrategy[int]) -> Any:
        return data.draw(st.one_of(sizes, st.tuples(*[sizes] * dimensions)))

    options: dict[str, Any] = {"kernel_size": each(SIZES)}
    for name, sizes in (("stride", SIZES), ("padding", st.integers(0, 2)), ("dilation", st.integers(1, 2))):
        if data.draw(st.booleans()):
            options[name] = each(sizes)
    options |= {name: True for name in ("ceil_mode", "return_indices") if data.draw(st.integers(0, 5)) == 0}
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)) + [
        data.draw(st.integers(3, 9)) for _ in range(dimensions)
    ]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    x = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(0)).to(dtype)  # with ties
    x.flatten()[:: data.draw(st.integers(5, 50))] = data.draw(st.sampled_from([0.0, -torch.inf, torch.inf, torch.nan]))
    with torch.no_grad(), patch.object(pooling, "_FEW", 0):
        try:
            right = func(x, **options)
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)) as raised:
                max_pool(func, (x,), options)
            assert str(raised.value) == str(error)
            return
        pooled = max_pool(func, (x,), options)
    torch.testing.assert_close(pooled, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("axes", [torch.contiguous_format, torch.channels_last])
def test_the_layout_stays(axes: torch.memory_format) -> None:
    x = torch.randn(16, 8, 12, 12).to(memory_format=axes)
    with torch.no_grad():
        assert max_pool(F.max_pool2d, (x, 2), {}).stride() == F.max_pool2d(x, 2).stride()


def test_autograd_has_its_own() -> None:
    """Of equal numbers in a window the first has the whole gradient, as in PyTorch."""
    x = torch.zeros(16, 8, 12, 12, requires_grad=True)
    with FastPooling():
        F.max_pool2d(x, 2).sum().backward()
    assert x.grad is not None and x.grad[0, 0, :2, :2].tolist() == [[1, 0], [0, 0]]


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
