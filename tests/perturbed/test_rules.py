"""Every rule, and the generic one: ``weight_vjp`` is the gradient of the weights, ``weight_jvp`` its adjoint."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning.perturbed.affine import Affine, BatchNormalization
from zo_lightning.perturbed.rules import RULES, Operation, noise_sizes, operation, weigh

B = 3


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(tensor(*shape))


# The function, its arguments, and those that have a name.
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = {
    "linear": (F.linear, (tensor(B, 4), weight(2, 4), weight(2)), {}),
    "linear, tokens, no bias": (F.linear, (tensor(B, 5, 4), weight(2, 4)), {}),
    "linear, frozen weight": (F.linear, (tensor(B, 5, 4), tensor(2, 4), weight(2)), {}),
    "conv1d": (F.conv1d, (tensor(B, 2, 9), weight(4, 2, 3), weight(4), 2, 1), {}),
    "conv2d": (F.conv2d, (tensor(B, 2, 7, 6), weight(3, 2, 3, 2), weight(3)), {"stride": (2, 1), "dilation": 2}),
    "conv2d, groups": (F.conv2d, (tensor(B, 4, 5, 5), weight(6, 2, 3, 3), weight(6)), {"groups": 2, "padding": 1}),
    "conv2d, same": (F.conv2d, (tensor(B, 2, 5, 6), weight(3, 2, 4, 3)), {"padding": "same"}),
    "conv2d, valid, frozen weight": (F.conv2d, (tensor(B, 2, 5, 6), tensor(4, 2, 4, 3), weight(4), 1, "valid"), {}),
    "conv3d": (F.conv3d, (tensor(B, 1, 4, 4, 4), weight(2, 1, 3, 3, 3), weight(2)), {"padding": 1}),
    "embedding": (F.embedding, (torch.tensor([[0, 2, 1], [2, 2, 3], [0, 0, 0]]), weight(4, 2)), {}),
    "embedding, padding": (F.embedding, (torch.tensor([[0, 2], [2, 2], [1, 0]]), weight(4, 2), 0), {}),
    "layer_norm": (F.layer_norm, (tensor(B, 5, 4), [4], weight(4), weight(4)), {}),
    "layer_norm, two dimensions": (F.layer_norm, (tensor(B, 2, 5, 4), [5, 4], weight(5, 4), weight(5, 4)), {}),
    "rms_norm": (F.rms_norm, (tensor(B, 5, 4), [4], weight(4)), {}),
    "group_norm": (F.group_norm, (tensor(B, 4, 3, 2), 2, weight(4), weight(4)), {}),
    "batch_norm, evaluation": (F.batch_norm, (tensor(B, 4, 3), tensor(4), tensor(4).exp(), weight(4), weight(4)), {}),
    "batch_norm, training": (F.batch_norm, (tensor(B, 4), tensor(4), tensor(4), weight(4), weight(4), True), {}),
    "position embedding": (torch.add, (tensor(B, 5, 4), weight(1, 5, 4)), {}),
    "position embedding, first": (Tensor.add, (weight(5, 1), tensor(B, 5, 4)), {}),
    "embedding_bag": (F.embedding_bag, (torch.tensor([[0, 2], [2, 2], [1, 0]]), weight(4, 2)), {"mode": "sum"}),
    "gain": (torch.mul, (tensor(B, 5, 4), weight(4)), {}),
}
# Functions without a rule of their own.
GENERIC: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = {
    "matmul": (torch.matmul, (tensor(B, 5, 4), weight(4, 2)), {}),
    "addmm": (torch.addmm, (weight(2), tensor(B, 4), weight(4, 2)), {}),
    "einsum": (torch.einsum, ("bi,oi->bo", tensor(B, 4), weight(2, 4)), {}),
    "quadratic einsum": (torch.einsum, ("bi,oi,oi->bo", tensor(B, 4), shared := weight(2, 4), shared), {}),
    "conv_transpose2d": (F.conv_transpose2d, (tensor(B, 2, 4, 4), weight(2, 3, 3, 3), weight(3), 2), {}),
    "bilinear": (F.bilinear, (tensor(B, 4), tensor(B, 5), weight(2, 4, 5), weight(2)), {}),
    "prelu": (F.prelu, (tensor(B, 4, 3), weight(4)), {}),
}
ALL = {**CASES, **GENERIC}
ruled = pytest.mark.parametrize("name", CASES)
cases = pytest.mark.parametrize(
    "one",
    [pytest.param((name, True), id=name) for name in CASES]
    # Batch statistics are not by example: only the rule knows what to do.
    + [pytest.param((name, False), id=f"{name}, generic") for name in ALL if name != "batch_norm, training"],
)


def made(one: tuple[str, bool]) -> Operation:
    name, by_rule = one
    function, args, kwargs = ALL[name]
    made = operation(function, args, kwargs) if by_rule else Operation(function, args, kwargs)
    assert (type(made) is Operation) is not by_rule
    made.begin(None)
    return made


def output(name: str) -> Tensor:
    function, args, kwargs = ALL[name]
    return function(*args, **kwargs)


@cases
def test_weight_vjp_is_the_gradient_of_the_weights(one: tuple[str, bool]) -> None:
    use, z = made(one), output(one[0])
    delta = tensor(*z.shape)
    expected = torch.autograd.grad((z * delta).sum(), use.weights)
    for actual, gradient in zip(use.weight_vjp(delta), expected, strict=True):
        assert actual.shape == gradient.shape
        assert torch.allclose(actual, gradient)


@cases
@pytest.mark.parametrize("factored", [False, True])
def test_weight_jvp_is_the_adjoint_of_weight_vjp(one: tuple[str, bool], factored: bool) -> None:
    """``Σᵢ <jvp(U)ᵢ, δᵢ> = Σᵢ <Uᵢ, vjp(δᵢ)>``, with independent entries and with outer products."""
    if one == ("embedding, padding", False) or one[0] == "embedding_bag":
        pytest.skip("PyTorch has no forward derivative, or moves the padding that has no gradient")
    use, delta = made(one), tensor(*output(one[0]).shape)
    noise = []
    for w in use.weights:
        sizes = [len(w), w[0].numel()] if factored and w.ndim > 1 else [w.numel()]
        noise.append(tuple(tensor(B, size) + index for index, size in enumerate(sizes)))
    left = (use.weight_jvp(noise) * delta).sum()
    right = torch.zeros((), dtype=torch.float64)
    for only in torch.eye(B, dtype=torch.float64):
        grads = use.weight_vjp(delta * only.view(-1, *[1] * (delta.ndim - 1)))
        for w, parts, grad in zip(use.weights, noise, grads, strict=True):
            right += (weigh(parts, only, w) * grad).sum()
    assert torch.allclose(left, right)


@ruled
def test_the_output_is_that_of_the_function(name: str) -> None:
    assert torch.equal(made((name, True)).output(lambda: output(name)), output(name))


@cases
def test_examples_are_found_apart(one: tuple[str, bool]) -> None:
    if not one[1]:
        assert made(one).is_by_example(output(one[0]).detach(), B)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (torch.matmul, (weight(B, B), tensor(B, 4))),  # mixes the examples
        (torch.addcmul, (tensor(B, 4), weight(B, 4), tensor(B, 4))),  # a weight for each example
        (F.batch_norm, (tensor(B, 4), None, None, weight(4), None, True)),
    ],
)
def test_examples_that_act_on_each_other_are_found(function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    assert not Operation(function, args, {}).is_by_example(function(*args).detach(), B)


def test_the_rule_from_the_documentation() -> None:
    """It is what a user writes, outside of the package and in 15 lines at most."""
    text = (Path(__file__).parents[2] / "docs" / "estimators.md").read_text(encoding="utf-8")
    (rule,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "@register_rule" in code]
    assert len(rule.split("import Operation, register_rule\n\n")[1].splitlines()) <= 15
    function, args, kwargs = GENERIC["conv_transpose2d"]
    delta = tensor(*output("conv_transpose2d").shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, function, Operation)  # so that leaving puts the registry back
        names: dict[str, Any] = {"torch": torch, "F": F}
        exec(rule, names)
        found = operation(function, args, kwargs)
        assert type(found) is names["ConvTranspose2d"]
        assert type(operation(function, args, {"output_padding": 1})) is Operation, "which the rule does not cover"
        expected = Operation(function, args, kwargs)
        for one, another in zip(found.weight_vjp(delta), expected.weight_vjp(delta), strict=True):
            assert torch.allclose(one, another)
        noise = [(tensor(B, w.numel()),) for w in found.weights]
        assert torch.allclose(found.weight_jvp(noise), expected.weight_jvp(noise)), "which the rule leaves generic"
    assert function not in RULES


def test_small_weights_have_independent_noise_and_large_ones_outer_products() -> None:
    assert noise_sizes(torch.zeros(3, 4), 12) == [12]
    assert noise_sizes(torch.zeros(3, 4), 3) == [3, 4]
    assert noise_sizes(torch.zeros(7), 3) == [7]


def test_what_no_rule_covers_is_generic() -> None:
    x, w = tensor(B, 4), weight(4)
    for function, args, kwargs in (
        (torch.add, (x, w), {"alpha": 2}),
        (torch.mul, (w, weight(4)), {}),
        (torch.mul, (tensor(B, 1), weight(B, 1)), {}),  # a weight for each example
        (torch.mul, (tensor(B, 1), w), {}),  # the result is larger than the input
        (F.embedding, (torch.tensor([[0]]), weight(2, 2)), {"max_norm": 1.0}),
    ):
        assert type(operation(function, args, kwargs)) is Operation


def test_batch_normalization_with_the_statistics_of_another_pass() -> None:
    x, gamma, beta = tensor(5, 2, 3), weight(2), weight(2)
    first, later = (BatchNormalization(F.batch_norm, (x, None, None, gamma, beta, True), {}) for _ in range(2))
    later.begin(first.begin(None))
    expected = F.batch_norm(x, None, None, gamma, beta, training=True)
    assert torch.allclose(later.output(lambda: torch.zeros(())), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_both_passes_of_a_batch_normalization_are_the_nets_own(dtype: torch.dtype) -> None:
    x = tensor(16, 3, 5).to(dtype)
    x[:, 1], x[:, 2] = 0.5, x[:, 2] * 1e-4  # a channel that is constant, and one whose variance is far below ε
    first, later = (BatchNormalization(F.batch_norm, (x, None, None, None, None, True), {}) for _ in range(2))
    later.begin(first.begin(None))
    expected = F.batch_norm(x, None, None, training=True)
    for found in (first.x, later.x):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_batch_normalization_of_no_examples() -> None:
    first, later = (BatchNormalization(F.batch_norm, (tensor(0, 4), None, None, None, None, True), {}) for _ in "ab")
    later.begin(first.begin(None))
    assert first.x.shape == later.x.shape == (0, 4)


def test_project_turns_the_gradient_at_fixed_statistics_into_the_gradient() -> None:
    x = tensor(5, 2, 3).requires_grad_()
    gamma, delta = weight(2), tensor(5, 2, 3)
    (expected,) = torch.autograd.grad((F.batch_norm(x, None, None, gamma, training=True) * delta).sum(), x)
    norm = BatchNormalization(F.batch_norm, (x.detach(), None, None, gamma), {"training": True})
    _, var = norm.begin(None)
    at_fixed = delta * (gamma / (var + 1e-5).sqrt()).view(1, -1, 1)
    assert torch.allclose(norm.project(at_fixed), expected)


def test_affine_weights_may_lack_dimensions() -> None:
    found = operation(torch.mul, (tensor(B, 2, 3, 4), weight(3, 1)), {})
    assert isinstance(found, Affine)
    assert found.shape == (1, 3, 1)
