import copy
import pickle

import pytest
import torch
from torch import nn

from zo_lightning.directions import Gaussian
from zo_lightning.evaluation import InPlace
from zo_lightning.stencils import CentralDifference, ForwardDifference, Stencil


@pytest.mark.parametrize("restore", ["exact", "replay"])
@pytest.mark.parametrize("stencil", [ForwardDifference(0.5), CentralDifference(0.5)])
def test_losses_are_those_at_the_stencils_points(restore: str, stencil: Stencil) -> None:
    net = nn.Linear(3, 1, dtype=torch.float64)
    params = list(net.parameters())
    origin = [p.detach().clone() for p in params]
    weights = [torch.arange(p.numel(), dtype=p.dtype).view(p.shape) + 1 for p in params]

    def objective() -> float:
        return sum(float((w * p.detach()).sum()) for w, p in zip(weights, params, strict=True))

    evaluation = InPlace(restore)  # type: ignore[arg-type]
    for losses, u in evaluation.slopes(objective, params, Gaussian(), stencil, 3, seed=1, step=2):
        direction = list(u)
        for loss, offset in zip(losses, stencil.offsets, strict=True):
            expected = sum(
                float((w * (o + 0.5 * offset * t)).sum()) for w, o, t in zip(weights, origin, direction, strict=True)
            )
            assert loss == pytest.approx(expected)
        assert all(torch.allclose(p, o, rtol=0, atol=1e-14) for p, o in zip(params, origin, strict=True))


def test_the_forward_difference_shares_its_centre() -> None:
    calls = 0

    def objective() -> float:
        nonlocal calls
        calls += 1
        return 0.0

    list(InPlace().slopes(objective, list(nn.Linear(1, 1).parameters()), Gaussian(), ForwardDifference(), 4, 0, 0))
    assert calls == 5


def test_the_first_direction_takes_the_memory_of_the_gradient() -> None:
    params = list(nn.Linear(3, 1).parameters())
    for p in params:
        p.grad = torch.zeros_like(p)
    (first, second) = (u for _, u in InPlace().slopes(lambda: 0.0, params, Gaussian(), CentralDifference(), 2, 0, 0))
    for p, a, b in zip(params, first, second, strict=True):
        assert p.grad is not None
        assert a.data_ptr() == p.grad.data_ptr() != b.data_ptr()


def test_kept_memory_follows_a_change_of_dtype() -> None:
    net, evaluation = nn.Linear(3, 1), InPlace()
    for dtype in (torch.float32, torch.float64):
        net.to(dtype)
        params = list(net.parameters())
        origin = [p.detach().clone() for p in params]
        list(evaluation.slopes(lambda: 0.0, params, Gaussian(), CentralDifference(), 1, 0, 0))
        assert all(torch.equal(p, o) for p, o in zip(params, origin, strict=True))


def test_kept_memory_is_neither_copied_nor_compared() -> None:
    evaluation = InPlace()
    list(evaluation.slopes(lambda: 0.0, list(nn.Linear(3, 1).parameters()), Gaussian(), CentralDifference(), 1, 0, 0))
    for twin in (copy.deepcopy(evaluation), pickle.loads(pickle.dumps(evaluation))):
        assert twin == evaluation == InPlace()
        assert twin._copies is not evaluation._copies
    assert repr(evaluation) == "InPlace(restore='exact')"


def test_bad_restore() -> None:
    with pytest.raises(ValueError, match="restore must be 'exact' or 'replay', got 'none'"):
        InPlace("none")  # type: ignore[arg-type]
