import math

import pytest
import torch

from zo_lightning import CentralDifference, Rademacher, ZerothOrder
from zo_lightning.optim import NormalizedSGD


def reference(
    x: list[float],
    gradients: list[list[float]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> list[float]:
    """The update rule of the docstring, one number at a time."""
    m, v = [0.0] * len(x), 0.0
    for t, g in enumerate(gradients, 1):
        v = betas[1] * v + (1 - betas[1]) * sum(value**2 for value in g) / len(g)
        for j in range(len(x)):
            m[j] = betas[0] * m[j] + (1 - betas[0]) * g[j]
            step = lr * m[j] / (1 - betas[0] ** t) / (math.sqrt(v / (1 - betas[1] ** t)) + eps)
            x[j] = (1 - lr * weight_decay) * x[j] - step
    return x


def test_equals_its_reference() -> None:
    torch.manual_seed(0)
    x = [
        torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    ]
    optimizer = NormalizedSGD(x, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)
    start = torch.cat([p.detach().flatten() for p in x]).tolist()
    gradients = [torch.randn(10, dtype=torch.float64) * (1 + t) for t in range(20)]
    for g in gradients:
        x[0].grad, x[1].grad = g[:6].view(3, 2).clone(), g[6:].clone()
        optimizer.step()
    expected = reference(start, [g.tolist() for g in gradients], 0.1, (0.8, 0.95), 1e-3, 0.3)
    assert torch.cat([p.detach().flatten() for p in x]).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_size_of_the_gradient_does_not_matter() -> None:
    def run(scale: float) -> torch.Tensor:
        p = torch.zeros(5, requires_grad=True)
        optimizer = NormalizedSGD([p], lr=0.1)
        stream = torch.Generator().manual_seed(0)
        for _ in range(10):
            p.grad = scale * torch.randn(5, generator=stream)
            optimizer.step()
        return p.detach()

    assert torch.allclose(run(1e-3), run(1e3), rtol=1e-4)


def test_one_step_along_a_sign_direction_is_lr_in_every_weight() -> None:
    net = torch.nn.Linear(4, 3)
    before = [p.detach().clone() for p in net.parameters()]
    ZerothOrder(Rademacher(), CentralDifference(1e-2), seed=0).backward(
        lambda: net(torch.ones(1, 4)).square().sum(), net, 0
    )
    NormalizedSGD(net.parameters(), lr=0.01).step()
    for p, start in zip(net.parameters(), before, strict=True):
        assert torch.allclose((p - start).abs(), torch.tensor(0.01), rtol=1e-4)


def test_groups_have_a_size_each() -> None:
    small, large = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    small.grad, large.grad = torch.full((2,), 1e-3), torch.full((2,), 1e3)
    NormalizedSGD([{"params": [small]}, {"params": [large], "lr": 0.2}], lr=0.1).step()
    assert small.tolist() == pytest.approx([-0.1, -0.1]) and large.tolist() == pytest.approx([-0.2, -0.2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_size_of_many_gradients_fits_in_half_precision(dtype: torch.dtype) -> None:
    p = torch.zeros(70_000, dtype=dtype, requires_grad=True)  # ‖g‖² = 70,000 is infinite in float16
    optimizer = NormalizedSGD([p], lr=2.0**-3)
    for _ in range(4):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # Four steps of lr; float32 rounds their size to a few 1e-7, and the weight is rounded at each of them.
    assert p.tolist() == pytest.approx([-0.5] * 70_000, rel=4 * torch.finfo(dtype).eps)


def test_weights_without_gradient_stay() -> None:
    moving, still = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    moving.grad = torch.ones(1)
    NormalizedSGD([moving, still], lr=0.1, weight_decay=0.1).step()
    assert still.item() == 1 != moving.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_survives_a_round_trip(dtype: torch.dtype) -> None:
    def run(swap: bool) -> float:
        p = torch.ones(1, dtype=dtype, requires_grad=True)
        optimizer = NormalizedSGD([p], lr=0.1)
        for t in range(6):
            if swap and t == 3:
                saved = optimizer.state_dict()
                optimizer = NormalizedSGD([p], lr=0.1)
                optimizer.load_state_dict(saved)
            p.grad = torch.full((1,), float(t - 2), dtype=dtype)
            optimizer.step()
        return p.item()

    assert run(swap=True) == run(swap=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), got -0.1"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormalizedSGD([torch.ones(1, requires_grad=True)], **arguments)
