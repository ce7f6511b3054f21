import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from zo_lightning import Backprop, ForwardGradient, GradientEstimator, PerExample, ScalableCNN, ZerothOrder
from zo_lightning.costs import FlopMeter, count_flops, uncounted

IMAGES = (8, 1, 28, 28)


class Pooled(nn.Module):
    """Something for sequences [B, T, C], the mean of whose output over T is the logits."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


def encoder(dropout: float = 0.1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
    return Pooled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 16)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (ScalableCNN, IMAGES),
    "dropout": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.Dropout(), nn.Linear(20, 10)), IMAGES),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(676, 10)),
        IMAGES,
    ),
    "attention": (encoder, (8, 5, 16)),
    "LSTM": (lambda: Pooled(nn.LSTM(8, 6, 2, dropout=0.2, bidirectional=True, batch_first=True), 12), (8, 5, 8)),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net, shape = NETS[name]
    return net(), torch.rand(shape), torch.arange(shape[0]) % 10


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "estimator", [Backprop(), ZerothOrder(seed=0, samples=2), PerExample(seed=0)], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("name", NETS)
def test_measuring_changes_no_bit(name: str, estimator: GradientEstimator, autocast: torch.dtype | None) -> None:
    start, x, y = made(name)
    if name == "LSTM" and autocast is not None:
        try:
            with torch.autocast("cpu", dtype=autocast):
                start(x)
        except RuntimeError as error:
            pytest.skip(f"PyTorch's recurrent layers have no {autocast} on this processor: {error}")

    def trained(meter: FlopMeter | None) -> list[Tensor]:
        net = copy.deepcopy(start)
        state = estimator.init(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        torch.manual_seed(1)

        def loss() -> Tensor:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                return F.cross_entropy(net(x).float(), y, reduction="none")

        for step in range(4):
            if meter is None:
                estimator.backward(loss, net, step, state)
            else:
                meter.run(lambda step=step: estimator.backward(loss, net, step, state), net, (x, y))
            optimizer.step()
            optimizer.zero_grad()
        return [*net.state_dict().values(), torch.rand(1)]

    assert all(map(torch.equal, trained(None), trained(FlopMeter())))


@pytest.mark.parametrize("name", [name for name in NETS if name != "LSTM"])
def test_forward_mode_differentiation_runs_under_it(name: str) -> None:
    net, x, y = made(name)
    meter, estimator = FlopMeter(), ForwardGradient(seed=0)
    for step in range(3):
        meter.run(lambda step=step: estimator.backward(lambda: F.cross_entropy(net(x), y), net, step), net, x)
    with torch.no_grad():
        # a product of values has two of tangents: x W + x' W + x W', of which the first layer has no x'
        assert 2 <= meter.total / 3 / flops(lambda: net(x)) <= 3


def test_where_forward_mode_differentiation_fails_under_it_the_step_goes_on() -> None:
    """PyTorch's formula for batch normalisation mixes dtypes under autocast while anything watches."""
    start, x, y = made("batch norm")

    def trained(meter: FlopMeter | None) -> list[Tensor]:
        net, estimator = copy.deepcopy(start), ForwardGradient(seed=0)

        def loss() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.cross_entropy(net(x).float(), y)

        torch.manual_seed(1)
        if meter is None:
            estimator.backward(loss, net, 0)
        else:
            meter.run(lambda: estimator.backward(loss, net, 0), net, x)
        return [*net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None)]

    meter = FlopMeter()
    assert all(map(torch.equal, trained(None), trained(meter)))
    assert isnan(meter.total)


def test_vmap_runs_under_it() -> None:
    a, b = torch.rand(5, 3, 4), torch.rand(4, 2)
    assert count_flops(lambda: torch.func.vmap(torch.mm, (0, None))(a, b)) == 5 * 2 * 3 * 4 * 2


def test_a_step_is_watched_until_two_in_a_row_agree() -> None:
    meter, net, x = FlopMeter(), nn.Linear(4, 3), torch.rand(2, 4)
    watched = []

    def step(times: int) -> None:
        watched.append(bool(_get_current_dispatch_mode_stack()))
        for _ in range(times):
            net(x)

    for times in (2, 1, 1, 1, 1):  # the first has an extra look
        meter.run(lambda times=times: step(times), net, x)
    assert watched == [True, True, True, False, False]
    assert meter.total == 6 * 2 * 2 * 4 * 3


def test_without_agreement_the_mean_is_taken() -> None:
    meter, net, x = FlopMeter(), nn.Linear(4, 3), torch.rand(2, 4)
    for times in (1, 2, 3, 4, 5, 6, 7, 8, 100, 100):
        with meter.step(net, x):
            for _ in range(times if times < 100 else 0):
                net(x)
    assert meter.total == (36 + 2 * 4.5) * 2 * 2 * 4 * 3


@dataclass
class Pair:
    image: Tensor
    label: Tensor


@pytest.mark.parametrize(
    "other",
    [
        lambda net, x: (net, {"x": torch.rand(3, 4)}, ()),  # the last batch of an epoch is smaller
        lambda net, x: (net, {"x": x, "y": [torch.rand(1)]}, ()),
        lambda net, x: (net, Pair(x, x), ()),
        lambda net, x: (net.requires_grad_(False), {"x": x}, ()),
        lambda net, x: (net.eval(), {"x": x}, ()),
        lambda net, x: (net, {"x": x}, (8,)),
    ],
)
def test_another_kind_of_step_is_measured_anew(other: Any) -> None:
    meter, net, x = FlopMeter(), nn.Linear(4, 3), torch.rand(2, 4)

    def step(net: nn.Module, batch: Any, *context: Any) -> float:
        before = meter.total
        meter.run(lambda: torch.mm(*matrices), net, batch, *context)
        return meter.total - before

    matrices = torch.rand(1, 1), torch.rand(1, 1)
    assert [step(net, {"x": x}) for _ in range(3)] == [2, 2, 2]
    matrices = torch.rand(5, 5), torch.rand(5, 5)
    assert step(net, {"x": x}) == 2  # taken for the same
    net, batch, context = other(net, x)
    assert step(net, batch, *context) == 250


def test_a_continued_run_counts_as_an_uninterrupted_one(tmp_path: Any) -> None:
    estimator = PerExample(seed=0)

    def steps(meter: FlopMeter, state: Any, first: int, last: int) -> float:
        net, x, y = made("convolutions")

        def loss() -> Tensor:
            return F.cross_entropy(net(x), y, reduction="none")

        for step in range(first, last):
            phase = estimator.phase(state)
            meter.run(lambda step=step: estimator.backward(loss, net, step, state), net, (x, y), phase)
        return meter.total

    def state() -> Any:
        return estimator.init(made("convolutions")[0])

    whole, part, resumed, known, again = FlopMeter(), FlopMeter(), FlopMeter(), state(), state()
    steps(part, known, 0, 4)
    torch.save([part.state_dict(), known.state_dict()], tmp_path / "state.ckpt")
    of_meter, of_estimator = torch.load(tmp_path / "state.ckpt", weights_only=True)
    resumed.load_state_dict(of_meter)
    again.load_state_dict(of_estimator)
    assert steps(resumed, again, 4, 60) == steps(whole, state(), 0, 60)


def test_a_diagnostic_is_left_out() -> None:
    a = torch.rand(2, 2)

    def step() -> None:
        torch.mm(a, a)
        with uncounted():
            torch.mm(a, torch.mm(a, a))
        torch.mm(a, a)

    assert count_flops(step) == 32
    step()  # and where no one counts, nothing happens
    assert flops(step) == 64  # another's counter counts all


def test_a_step_that_cannot_be_watched_is_not_harmed(caplog: Any) -> None:
    meter, net, calls = FlopMeter(), nn.Identity(), []

    def step() -> int:
        calls.append(bool(_get_current_dispatch_mode_stack()))
        if calls[-1]:
            raise RuntimeError("no watchers")
        return 3

    assert [meter.run(step, net, None) for _ in range(3)] == [3, 3, 3]
    assert calls == [True, False, False, False]
    assert isnan(meter.total)
    assert [record.getMessage() for record in caplog.records] == [
        "floating-point operations stay unknown, as this step cannot be watched: no watchers"
    ]


def test_an_error_of_the_step_itself_comes_out_and_nothing_stays_open() -> None:
    def step(error: Exception | None) -> None:
        torch.mm(torch.rand(1, 1), torch.rand(1, 1))
        if error is not None:
            raise error

    meter = FlopMeter()
    for steps in (1, 2):  # watched, then replayed
        with pytest.raises(ArithmeticError, match="NaN"):  # such a step is skipped; it has cost what it has
            meter.run(lambda: step(ArithmeticError("NaN")), nn.Identity(), None)
        assert meter.total == 2 * (3 * steps - 2)
        for _ in range(2):
            meter.run(lambda: step(None), nn.Identity(), None)
    with pytest.raises(RuntimeError, match="my own"):
        FlopMeter().run(lambda: step(RuntimeError("my own")), nn.Identity(), None)
    assert not _get_current_dispatch_mode_stack()


def test_script_modules_and_compiled_ones_are_not_harmed() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.rand(5, 4)
    expected = net(x)
    odd: Any
    for odd in (torch.jit.trace(net, x), torch.compile(copy.deepcopy(net), backend="eager")):
        meter = FlopMeter()
        for _ in range(4):
            assert torch.equal(meter.run(lambda odd=odd: odd(x), odd, x), expected)
        assert meter.total == 4 * 2 * 5 * (4 * 3 + 3 * 2)


def test_kernels_that_the_counter_does_not_know() -> None:
    """Each beside the same work in another form, which it does know."""
    x = torch.rand(3, 5, 16)
    for layer in (
        nn.LSTM(16, 6, 2, bidirectional=True, batch_first=True),  # in float64 it is made of linear layers
        nn.GRU(16, 6, batch_first=True),
    ):
        slow = copy.deepcopy(layer).double()
        assert count_flops(lambda layer=layer: layer(x)) == count_flops(lambda slow=slow: slow(x.double())) > 0
        both = count_flops(lambda layer=layer: layer(x)[0].sum().backward())
        # backward twice, but neither the input nor the state before the first step needs a gradient
        assert both <= 3 * count_flops(lambda layer=layer: layer(x)) <= 1.5 * both
    q, k, v = (torch.rand(2, 4, length, 8, requires_grad=True) for length in (5, 7, 7))

    def attention(backend: Any) -> Tensor:
        with torch.nn.attention.sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    flash, plain = torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH
    assert count_flops(lambda: attention(flash)) == count_flops(lambda: attention(plain)) == 2 * 2 * 2 * 4 * 5 * 7 * 8
    # flash attention computes the scores again
    assert count_flops(lambda: attention(flash).sum().backward()) == 3.5 * count_flops(lambda: attention(flash))
    net = encoder(0.0).eval()
    with torch.no_grad():
        fast = count_flops(lambda: net(x))
    assert fast == count_flops(lambda: net(x)) > 0
    heads = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    with torch.no_grad():
        fast = count_flops(lambda: heads(x, x, x, need_weights=False))
    assert fast == count_flops(lambda: heads(x, x, x, need_weights=False)) > 0
    a, b, v = torch.rand(2, 3), torch.rand(3, 4), torch.rand(3)
    for work in (lambda: torch.zeros(2, 4).addmm_(a, b), lambda: torch.mm(a, b)):
        assert count_flops(work) == 48
    for work in (lambda: a @ v, lambda: torch.zeros(2).addmv_(a, v), lambda: torch.addmv(torch.zeros(2), a, v)):
        assert count_flops(work) == 12
    assert count_flops(lambda: v @ v) == 6
    batched = a.expand(5, 2, 3), b.expand(5, 3, 4)
    for work in (lambda: torch.zeros(5, 2, 4).baddbmm_(*batched), lambda: torch.zeros(2, 4).addbmm_(*batched)):
        assert count_flops(work) == 5 * 48
    spd, b = torch.eye(6), torch.ones(6, 3)
    assert count_flops(lambda: torch.linalg.cholesky(spd)) == 6**3 / 3
    assert count_flops(lambda: torch.linalg.qr(spd)) == 8 / 3 * 6**3  # of a square matrix, R and Q alike 4/3 n³
    for work in (lambda: torch.cholesky_solve(b, spd), lambda: torch.linalg.solve(spd, b)):
        assert count_flops(work) >= 2 * 6 * 6 * 3  # two triangular systems, each half a product
    assert count_flops(lambda: torch.linalg.solve_triangular(spd, b, upper=True)) == 6 * 6 * 3


def test_replaying_costs_little() -> None:
    net, x, y = made("convolutions")
    meter = FlopMeter()

    def step() -> None:
        pass

    for _ in range(3):
        meter.run(step, net, (x, y))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(50):
            meter.run(step, net, (x, y))
        times.append((time.perf_counter() - began) / 50)
    assert min(times) < 20e-6  # the fastest of many: a busy machine only adds
