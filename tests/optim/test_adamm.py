import math

import pytest
import torch

from zo_lightning.optim import AdaMM


def reference(
    x: list[float], gradients: list[list[float]], lr: float, betas: tuple[float, float], eps: float
) -> list[float]:
    """AMSGrad without bias correction, as Reddi et al. 2018 and Chen et al. 2019 write it, one number at a time."""
    m, v, v_hat = ([0.0] * len(x) for _ in range(3))
    for g in gradients:
        for j in range(len(x)):
            m[j] = betas[0] * m[j] + (1 - betas[0]) * g[j]
            v[j] = betas[1] * v[j] + (1 - betas[1]) * g[j] ** 2
            v_hat[j] = max(v_hat[j], v[j])
            x[j] -= lr * m[j] / (math.sqrt(v_hat[j]) + eps)
    return x


@pytest.mark.parametrize("foreach", [True, False, None])
def test_equals_its_reference(foreach: bool | None) -> None:
    torch.manual_seed(0)
    x = [
        torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    ]
    optimizer = AdaMM(x, lr=0.1, betas=(0.8, 0.95), eps=1e-3, foreach=foreach)
    start = torch.cat([p.detach().flatten() for p in x]).tolist()
    # Growing and then shrinking gradients: the running maximum matters in the second half.
    gradients = [torch.randn(10, dtype=torch.float64) * (1 + min(t, 20 - t)) for t in range(20)]
    for g in gradients:
        x[0].grad, x[1].grad = g[:6].view(3, 2).clone(), g[6:].clone()
        optimizer.step()
    expected = reference(start, [g.tolist() for g in gradients], 0.1, (0.8, 0.95), 1e-3)
    assert torch.cat([p.detach().flatten() for p in x]).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("foreach", [True, False])
def test_weight_decay_is_decoupled(foreach: bool) -> None:
    p = torch.ones(1, requires_grad=True)
    p.grad = torch.zeros(1)
    AdaMM([p], lr=0.1, weight_decay=0.5, foreach=foreach).step()
    assert p.item() == pytest.approx(0.95)


def test_weights_without_gradient_stay() -> None:
    moving, still = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    moving.grad = torch.ones(1)
    AdaMM([moving, still], lr=0.1).step()
    assert still.item() == 1 != moving.item()


def test_state_survives_a_round_trip() -> None:
    def run(swap: bool) -> float:
        p = torch.ones(1, requires_grad=True)
        optimizer = AdaMM([p], lr=0.1)
        for t in range(6):
            if swap and t == 3:
                saved = optimizer.state_dict()
                optimizer = AdaMM([p], lr=0.1)
                optimizer.load_state_dict(saved)
            p.grad = torch.full((1,), float(t - 2))
            optimizer.step()
        return p.item()

    assert run(swap=True) == run(swap=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be a finite number of at least 0, got nan"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), got -0.1"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaMM([torch.ones(1, requires_grad=True)], **arguments)
