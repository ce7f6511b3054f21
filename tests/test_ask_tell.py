import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from zo_lightning import AskTell, Backprop, CentralDifference, ForwardDifference, NonFiniteLoss, PerExample, ZerothOrder

ESTIMATORS = {
    "central": ZerothOrder(stencil=CentralDifference(1e-2), samples=3, seed=1),
    "forward": ZerothOrder(stencil=ForwardDifference(1e-2), samples=3, seed=1),
}
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((2, 3), (2,))]


def loss_of(weight: Tensor, bias: Tensor) -> Tensor:
    return (X @ weight.T + bias).tanh().square().mean()


FORMS: dict[str, Callable[[list[Tensor]], Any]] = {
    "list": list,
    "generator": iter,
    "dict": lambda given: {"weight": given[0], "bias": given[1]},
}


def loss_at(candidate: Any) -> float:
    return loss_of(**candidate).item() if isinstance(candidate, dict) else loss_of(*candidate).item()


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam])
def test_weights_are_those_of_backward_and_step(estimator: ZerothOrder, form: Any, rule: Any) -> None:
    ours, theirs = tensors(), tensors()
    search = AskTell(form(ours), estimator, rule(ours, lr=1e-2))
    optimizer, before = rule(theirs, lr=1e-2), ours
    for step in range(4):
        before = [p.detach().clone() for p in ours]
        candidates = search.ask()
        assert len(candidates) == len(search) == (6 if isinstance(estimator.stencil, CentralDifference) else 4)
        assert all(map(torch.equal, ours, before)), "asking writes to no weight"
        told = search.tell([loss_at(candidate) for candidate in candidates])
        loss = estimator.backward(lambda: loss_of(*theirs), theirs, step)
        optimizer.step()
        optimizer.zero_grad()
        assert told == loss.item()
    assert search.step == 4
    assert all(map(torch.equal, ours, theirs)) and not torch.equal(ours[0], before[0])


def test_candidates_of_a_module_are_for_functional_call() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    search = AskTell(net, ESTIMATORS["central"], torch.optim.SGD(net.parameters(), 0.1))
    candidates = search.ask()
    assert list(candidates[0]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    losses = [functional_call(net, candidate, (X,)).square().mean().item() for candidate in candidates]
    search.tell(losses)
    assert len(set(losses)) == 6
    assert all(p.grad is None for p in net.parameters())


def test_asked_again_the_candidates_are_the_same_and_belong_to_the_caller() -> None:
    params = tensors()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    search = AskTell([*params, frozen], ESTIMATORS["forward"], torch.optim.SGD(params, 0.1))
    first = search.ask()
    assert torch.equal(first[0][0], params[0]), "a forward difference asks at the weights themselves"
    assert all(torch.equal(candidate[2], frozen) for candidate in first)
    kept = [[t.clone() for t in candidate] for candidate in first]
    for candidate in first:
        for tensor in candidate:
            tensor.zero_()
    again = search.ask()
    assert all(
        torch.equal(a, b) for one, other in zip(kept, again, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert bool((frozen == 1).all())


@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), ZerothOrder()], ids=[*ESTIMATORS, "no seed"])
def test_another_process_goes_on_between_ask_and_tell(estimator: ZerothOrder) -> None:
    def begin() -> tuple[list[Tensor], AskTell]:
        params = tensors()
        return params, AskTell(params, estimator, torch.optim.Adam(params, lr=1e-2))

    torch.manual_seed(7)
    params, search = begin()
    for _ in range(2):
        search.tell([loss_at(candidate) for candidate in search.ask()])
    losses = [loss_at(candidate) for candidate in search.ask()]
    saved = search.state_dict()
    torch.manual_seed(8)
    others, resumed = begin()
    resumed.load_state_dict(saved)
    for one in (search, resumed):
        one.tell(losses)
        one.tell([loss_at(candidate) for candidate in one.ask()])
    assert all(map(torch.equal, params, others))


def test_a_loss_that_is_not_finite_moves_nothing_but_the_step() -> None:
    params = tensors()
    before = [p.detach().clone() for p in params]
    search = AskTell(params, ESTIMATORS["central"], torch.optim.SGD(params, 0.1))
    first = search.ask()
    with pytest.raises(NonFiniteLoss):
        search.tell([1.0, math.nan, 1.0, 1.0, 1.0, 1.0])
    assert all(map(torch.equal, params, before)) and search.step == 1
    assert not torch.equal(search.ask()[0][0], first[0][0])


def test_what_is_told_is_checked() -> None:
    params = tensors()
    search = AskTell(params, ESTIMATORS["central"], torch.optim.SGD(params, 0.1))
    with pytest.raises(ValueError, match="tell needs 6 losses, one for each candidate of ask, got 5"):
        search.tell([1.0] * 5)
    with pytest.raises(ValueError, match="the loss must be a number"):
        search.tell([None] * 6)
    assert search.step == 0
    search.tell(np.linspace(0, 1, 6))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the state is that of the weights"):
        AskTell(params[0], search.estimator, search.optimizer).load_state_dict(search.state_dict())


@pytest.mark.parametrize("estimator", [Backprop(), PerExample()])
def test_others_than_zeroth_order_are_refused(estimator: Any) -> None:
    with pytest.raises(TypeError, match=f"which asks for losses alone, got {type(estimator).__name__}"):
        AskTell(tensors(), estimator, torch.optim.SGD(tensors(), 0.1))
