"""Laws of every update rule: one row a rule."""

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from zo_lightning.optim import AdaMM, NormalizedSGD, SignSGD, UpdateRule

RULES: dict[str, Callable[..., UpdateRule]] = {
    "AdaMM": AdaMM,
    "AdaMM-foreach": partial(AdaMM, foreach=True),
    "NormalizedSGD": NormalizedSGD,
    "SignSGD": SignSGD,
    "SignSGD-momentum": partial(SignSGD, momentum=0.999),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "with gaps": lambda t: torch.full((*t.shape, 2), 7.0).select(-1, 0).copy_(t),
}
SHAPE = (4, 4, 4, 4)  # 256 numbers: full vectors in every layout, so that no number meets a kernel's scalar remainder


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Callable[..., UpdateRule]:
    return RULES[request.param]


def gradients(count: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Small whole numbers: a sum of their squares has no rounding, hence no order."""
    stream = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randint(-3, 4, shape, generator=stream).to(dtype)


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=dtype)


def trained(rule: Callable[..., UpdateRule], weight: Tensor, place: Callable[[Tensor], Tensor]) -> UpdateRule:
    p = weight.requires_grad_()
    optimizer = rule([p], lr=0.1)
    for g in gradients(5):
        p.grad = place(g)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
def test_the_layout_in_memory_does_not_matter(
    rule: Callable[..., UpdateRule], of_weight: str, of_gradient: str
) -> None:
    expected, p = start(), LAYOUTS[of_weight](start())
    trained(rule, expected, LAYOUTS["contiguous"])
    trained(rule, p, LAYOUTS[of_gradient])
    assert torch.equal(p, expected)


@pytest.mark.parametrize("step", [0, 1])
def test_what_lies_in_the_gaps_of_a_weight_stays(rule: Callable[..., UpdateRule], step: int) -> None:
    memory = torch.full((*SHAPE, 2), 7.0)
    trained(rule, memory.select(-1, step), LAYOUTS["contiguous"])
    assert (memory.select(-1, 1 - step) == 7).all() and (memory.select(-1, step) != 7).any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_moments_have_the_weights_layout(rule: Callable[..., UpdateRule], layout: str) -> None:
    p = LAYOUTS[layout](start())
    optimizer = trained(rule, p, LAYOUTS["contiguous"])
    moments = [value for value in optimizer.state[p].values() if value.dim()]
    assert all(moment.stride() == p.stride() for moment in moments)


def test_a_layout_may_change_between_steps(rule: Callable[..., UpdateRule]) -> None:
    expected, p = start().requires_grad_(), start().requires_grad_()
    optimizers = [rule([weight], lr=0.1) for weight in (expected, p)]
    for t, g in enumerate(gradients(6)):
        if t == 3:
            p.data = p.data.to(memory_format=torch.channels_last)
        expected.grad, p.grad = g.clone(), g.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert p.is_contiguous(memory_format=torch.channels_last) and torch.equal(p, expected)


def test_numbers_that_share_a_place_are_refused(rule: Callable[..., UpdateRule]) -> None:
    p = torch.zeros(4, 1).expand(4, 3).requires_grad_()
    p.grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="single memory location"):
        rule([p]).step()


def test_a_sparse_gradient_is_its_dense_one(rule: Callable[..., UpdateRule]) -> None:
    expected, p = start(), start()
    trained(rule, expected, LAYOUTS["contiguous"])
    trained(rule, p, lambda g: g.to_sparse())
    assert torch.equal(p, expected)


@pytest.mark.parametrize("scale", [1.0, 2.0**-9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_double(rule: Callable[..., UpdateRule], dtype: torch.dtype, scale: float) -> None:
    """Running means do not stick, overflow or vanish: a step after 1,300 others has its size."""

    def step(dtype: torch.dtype) -> Tensor:
        p = torch.zeros(3, dtype=dtype, requires_grad=True)
        optimizer = rule([p], lr=0.0)
        for t in range(1300):
            p.grad = torch.full((3,), scale if t < 1000 else -scale, dtype=dtype)
            optimizer.param_groups[0]["lr"] = float(t == 1299)
            optimizer.step()
        return p.detach().double()

    # The weight is rounded once, by eps / 2 at most; what single precision adds in 1,300 steps is far smaller.
    assert torch.allclose(step(dtype), step(torch.float64), rtol=torch.finfo(dtype).eps, atol=0)


def test_a_gradient_of_zero_in_half_precision_moves_nothing(rule: Callable[..., UpdateRule]) -> None:
    p = torch.ones(3, dtype=torch.float16, requires_grad=True)
    p.grad = torch.zeros(3, dtype=torch.float16)
    rule([p]).step()
    assert p.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_training_resumes_bit_for_bit(rule: Callable[..., UpdateRule], dtype: torch.dtype) -> None:
    def run(swap: bool) -> tuple[Tensor, dict[str, Any]]:
        p = start(dtype).requires_grad_()
        optimizer = rule([p], lr=0.1)
        for t, g in enumerate(gradients(8, dtype=dtype)):
            if swap and t == 4:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = rule([p], lr=0.1)
                optimizer.load_state_dict(torch.load(file))
            p.grad = g / 7
            optimizer.step()
        return p.detach(), dict(optimizer.state[p])

    (weight, state), (expected, expected_state) = run(swap=True), run(swap=False)
    assert torch.equal(weight, expected) and state.keys() == expected_state.keys()
    for name, value in state.items():
        assert value.dtype == expected_state[name].dtype and torch.equal(value, expected_state[name])


def test_state_is_of_single_precision_at_least(rule: Callable[..., UpdateRule]) -> None:
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        p = start(dtype).requires_grad_()
        p.grad = torch.ones_like(p)
        optimizer = rule([p])
        optimizer.step()
        assert {value.dtype for name, value in optimizer.state[p].items() if name != "step"} <= {wanted}


def test_loaded_state_is_a_copy(rule: Callable[..., UpdateRule]) -> None:
    p = start()
    optimizer = trained(rule, p, LAYOUTS["contiguous"])
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    other = rule([p], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    for name, value in optimizer.state[p].items():
        assert torch.equal(value, kept[0][name]), name


def test_loaded_state_may_come_from_a_hook() -> None:
    p = start().bfloat16()
    optimizer = trained(AdaMM, p, torch.Tensor.bfloat16)

    def doubled(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["m"] *= 2
        return state_dict

    other = AdaMM([p], lr=0.1)
    other.register_load_state_dict_pre_hook(doubled)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[p]["m"], 2 * optimizer.state[p]["m"])


def test_a_complex_weight_is_its_two_parts(rule: Callable[..., UpdateRule]) -> None:
    parts = start().requires_grad_()
    p = torch.view_as_complex(start().view(-1, 2)).requires_grad_()
    for_parts, for_p = rule([parts], lr=0.1), rule([p], lr=0.1)
    for g in gradients(5):
        parts.grad = g.clone()
        # Lazily conjugated: in memory lie the conjugates.
        p.grad = torch.view_as_complex(g.view(-1, 2)).conj().resolve_conj().conj()
        assert p.grad.is_conj()
        for_parts.step()
        for_p.step()
    assert torch.equal(torch.view_as_real(p), parts.view(-1, 2))


def test_a_lazily_negated_gradient_is_read_as_it_is(rule: Callable[..., UpdateRule]) -> None:
    expected, p = start(), start()
    trained(rule, expected, LAYOUTS["contiguous"])
    trained(rule, p, lambda g: torch._neg_view(-g))
    assert torch.equal(p, expected)


def test_separable_rules_may_step_one_weight_after_the_other(rule: Callable[..., UpdateRule]) -> None:
    shapes = [(4, 4, 3, 3), (5,), (3, 2), ()]

    def weights() -> list[Tensor]:
        stream = torch.Generator().manual_seed(1)
        x = [torch.randn(shape, generator=stream) for shape in shapes]
        x[0] = x[0].to(memory_format=torch.channels_last)
        x[2] = x[2].bfloat16()
        return [p.requires_grad_() for p in x]

    together, apart = weights(), weights()
    at_once, one_by_one = rule(together, lr=0.1), rule(apart, lr=0.1)
    for step in range(4):
        stream = torch.Generator().manual_seed(2 + step)
        g = [torch.randn(shape, generator=stream) for shape in shapes]
        for p, gradient in zip(together, g, strict=True):
            p.grad = gradient.to(p.dtype)
        at_once.step()
        for p, gradient in zip(apart, g, strict=True):
            p.grad = gradient.to(p.dtype)
            one_by_one.step()
            p.grad = None
    same = all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert same == at_once.separable


def test_a_closure_fills_the_gradient_and_its_loss_is_returned(rule: Callable[..., UpdateRule]) -> None:
    p = torch.ones(2, requires_grad=True)
    optimizer = rule([p], lr=0.1)

    def closure() -> float:
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2 and (p < 1).all()
