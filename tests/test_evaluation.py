from collections.abc import Iterator

import pytest
import torch
from torch import nn

from zo_lightning.directions import Direction, Gaussian
from zo_lightning.evaluation import OneByOne
from zo_lightning.objective import Objective
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights
from zo_lightning.stencils import CentralDifference, ForwardDifference, Stencil


def drawn(weights: Weights, n: int, lean: bool) -> Iterator[Direction]:
    for index in range(n):
        direction = Gaussian().draw(weights, 1, 2, index)
        yield direction if lean else direction.hold()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("stencil", [ForwardDifference(0.5), CentralDifference(0.5)])
def test_losses_are_those_at_the_stencils_points(lean: bool, stencil: Stencil) -> None:
    net = nn.Linear(3, 1, dtype=torch.float64)
    weights = Weights.of(net)
    origin = [p.detach().clone() for p in weights]
    factors = [torch.arange(p.numel(), dtype=p.dtype).view(p.shape) + 1 for p in weights]
    objective = Objective(lambda: sum((f * p).sum() for f, p in zip(factors, weights, strict=True)), net)  # type: ignore[arg-type,return-value]
    for direction, losses in OneByOne().probes(objective, weights, drawn(weights, 3, lean), stencil, State()):
        u = [direction[k] for k in range(2)]
        for offset, loss in zip(stencil.offsets, losses, strict=True):
            expected = sum(
                float((f * (p + offset * 0.5 * t)).sum()) for f, p, t in zip(factors, origin, u, strict=True)
            )
            assert loss == pytest.approx(expected, rel=1e-12)


def test_the_loss_at_the_weights_themselves_is_asked_once() -> None:
    net = nn.Linear(1, 1)
    objective = Objective(lambda: net(torch.ones(1, 1)).sum(), net)
    weights = Weights.of(net)
    assert len(list(OneByOne().probes(objective, weights, drawn(weights, 4, False), ForwardDifference(), State()))) == 4
    assert objective.forward_passes == 5
