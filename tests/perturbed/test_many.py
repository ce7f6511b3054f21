"""Many points in one pass: the losses of single passes, of nets with everything that vmap makes difficult."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import (
    Batched,
    CentralDifference,
    Classifier,
    ForwardDifference,
    Gaussian,
    LowRank,
    Rademacher,
    SmallCNN,
    Sphere,
    Stencil,
    ZerothOrder,
)
from zo_lightning.directions import Directions
from zo_lightning.evaluation import Evaluation, OneByOne

STENCILS = [CentralDifference(1e-3), ForwardDifference(1e-3)]
DIRECTIONS = [Rademacher(), Sphere(), LowRank(2)]


class Everything(nn.Module):
    """Convolution, BatchNorm in training mode, dropout, an embedding with padding, attention, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(5, 6, 3)
        self.batch_norm = nn.BatchNorm1d(6)
        self.inner = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.inner.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.last = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        h = F.dropout(self.batch_norm(self.conv(h)), 0.5, self.training)
        return self.last(self.frozen(self.tied(self.inner(h).tanh()).tanh()).flatten(1))


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[], Tensor]]:
    net = Everything().to(dtype)
    x, y = torch.randint(7, (4, 5)), torch.randint(3, (4,))
    return net, lambda: F.cross_entropy(net(x), y, reduction="none")


def slopes(evaluation: Evaluation, u: Directions, stencil: Stencil, q: int = 5) -> tuple[Tensor, Tensor]:
    net, loss = problem()
    estimator = ZerothOrder(u, stencil, evaluation, samples=q, seed=3)
    state = estimator.init(net)
    value = torch.stack([estimator.backward(loss, net, step, state) for step in range(2)])
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), value.sum()


@pytest.mark.parametrize("stencil", STENCILS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("u", DIRECTIONS, ids=lambda u: type(u).__name__)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_the_estimate_is_that_of_single_passes(chunk_size: int | None, u: Directions, stencil: Stencil) -> None:
    one, loss = slopes(OneByOne(), u, stencil)
    many, same_loss = slopes(Batched(chunk_size), u, stencil)
    # In float64 a loss is rounded by about 1e-15, a slope by 1e-12: with the same directions all agrees to 1e-9. Those
    # of LowRank are products in float32, which factors are not.
    tolerance = (1e-6 if isinstance(u, LowRank) else 1e-9) * float(one.abs().max())
    assert torch.allclose(one, many, rtol=0, atol=tolerance)
    assert float(loss) == pytest.approx(float(same_loss), rel=1e-12)


def test_buffers_are_those_of_single_passes_and_come_back() -> None:
    net, loss = problem()
    before = {name: b.clone() for name, b in net.named_buffers()}
    estimator = ZerothOrder(Gaussian(), evaluation=Batched(), samples=4, seed=0)
    estimator.backward(loss, net, 0, estimator.init(net))
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())


def test_in_training_batch_norm_keeps_what_single_passes_leave() -> None:
    from pytorch_lightning import Trainer

    from zo_lightning.data import Digits

    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))

    ends = []
    for evaluation in (OneByOne(), Batched()):
        torch.manual_seed(0)
        module = Classifier(Net(), ZerothOrder(Rademacher(), evaluation=evaluation, samples=3, seed=0), torch.optim.SGD)
        trainer = Trainer(
            max_steps=3,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, Digits(seed=0))
        ends.append({name: value.clone() for name, value in module.state_dict().items()})
    one, many = ends
    for name in one:
        # SGD moves weights by lr = 1e-3 times an estimate of order 1, whose slopes rounding disturbs by 1e-4.
        assert torch.allclose(one[name], many[name], atol=1e-5), name
    assert many["net.1.num_batches_tracked"] == 3


def test_the_embedded_nets_are_batched() -> None:
    net, x, y = SmallCNN(), torch.rand(4, 1, 28, 28), torch.randint(10, (4,))
    estimator = ZerothOrder(evaluation=Batched(), samples=2, seed=0)
    assert float(estimator.backward(lambda: F.cross_entropy(net(x), y), net, 0)) > 0


def test_low_rank_directions_of_linear_layers_are_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    from zo_lightning.perturbed import many

    formed: list[Tensor] = []
    monkeypatch.setattr(many, "_formed", lambda weight, factors, distance: formed.append(weight))
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
    x = torch.randn(3, 4)
    estimator = ZerothOrder(LowRank(), evaluation=Batched(), samples=3, seed=0)
    estimator.backward(lambda: net(x).square().sum(), net, 0)
    assert not formed


def branches(out: Tensor) -> Tensor:
    return out if out > 0 else -out


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda net: torch.tensor(net(torch.ones(1, 2)).sum().item()), "item"),
        (lambda net: branches(net(torch.ones(1, 2)).sum()), "data-dependent control flow"),
        (lambda net: float(net(torch.ones(1, 2)).detach().numpy().sum()), "data pointer"),
    ],
)
def test_what_cannot_be_batched_is_refused_and_leaves_no_trace(loss: Callable[[nn.Module], Tensor], why: str) -> None:
    net = nn.Linear(2, 2)
    before, random = [p.detach().clone() for p in net.parameters()], torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"Batched cannot evaluate.*{why}.*Take OneByOne\(\)"):
        ZerothOrder(evaluation=Batched(), samples=2, seed=0).backward(lambda: loss(net), net, 0)
    assert all(map(torch.equal, before, net.parameters()))
    assert torch.equal(torch.get_rng_state(), random)


def test_a_weight_whose_use_does_not_show_is_refused() -> None:
    net = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1, bias=False)})
    with pytest.raises(ValueError, match=r"none of unused.weight shows: .* take OneByOne\(\)"):
        ZerothOrder(evaluation=Batched(), seed=0).backward(lambda: net["used"](torch.ones(1, 2)).sum(), net, 0)


def test_chunk_size_is_checked() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, or None for what fits, got 0"):
        Batched(0)


@pytest.mark.parametrize("u", [Rademacher(), LowRank()], ids=lambda u: type(u).__name__)
@pytest.mark.parametrize("order", [(torch.float32, torch.float64), (torch.float64, torch.complex128)])
def test_weights_of_several_dtypes(u: Directions, order: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(0)
    first, second = (torch.nn.Parameter(torch.randn(3, 3, dtype=dtype)) for dtype in order)
    net, x = nn.ParameterList([first, second]), torch.randn(2, 3, dtype=order[0])

    def loss() -> Tensor:
        return (F.linear(x, net[0]).to(order[1]) @ net[1]).abs().tanh().sum()

    found = []
    for evaluation in (OneByOne(), Batched()):
        estimator = ZerothOrder(u, evaluation=evaluation, samples=3, seed=0)
        estimator.backward(loss, net, 0, estimator.init(net))
        found.append([p.grad for p in net])
        net.zero_grad()
    for one, many in zip(*found, strict=True):
        # The first weight's product may be in float32, which rounds slopes by 1e-7 / 2e-3.
        assert torch.allclose(one, many, rtol=0, atol=5e-4 * float(one.abs().max()))


@pytest.mark.parametrize("stencil", STENCILS)
def test_factors_in_double_precision_are_what_single_passes_see(stencil: Stencil) -> None:
    net = nn.Linear(4, 3).double()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for evaluation in (OneByOne(), Batched(2)):
        estimator = ZerothOrder(LowRank(2), stencil, evaluation, samples=3, seed=0)
        net.zero_grad()
        estimator.backward(lambda: net(x).square().mean(), net, 0, estimator.init(net))
        found.append([p.grad for p in net.parameters()])
    for one, many in zip(*found, strict=True):
        # Losses of about 1 round by 1e-16, slopes by 1e-13 at a distance of 1e-3.
        assert torch.allclose(one, many, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("moves", "largest", "expected"), [(2, 0, 2796), (1, 1 << 20, 10), (2, 1 << 30, 1)])
def test_as_many_directions_as_fit(moves: int, largest: int, expected: int) -> None:
    from zo_lightning.evaluation import _fitting
    from zo_lightning.perturbed.weights import Weights

    # 1,000 float32 weights take 4 kB, and 32 MB hold so many times 4 kB + moves (4 kB + 3 largest).
    assert _fitting(Weights.of(nn.Linear(1000, 1, bias=False)), moves, largest) == expected


def test_passes_are_counted_one_by_one() -> None:
    from zo_lightning import Objective

    net, loss = problem()
    for stencil, expected in zip(STENCILS, (10, 6), strict=True):
        objective = Objective(loss, net)
        estimator = ZerothOrder(Rademacher(), stencil, Batched(2), samples=5, seed=0)
        estimator.backward(objective, net, 0, estimator.init(net))
        assert objective.forward_passes == expected
