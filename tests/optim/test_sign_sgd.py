import pytest
import torch

from zo_lightning.optim import SignSGD


def test_steps_have_one_size() -> None:
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.tensor([5.0, -0.1, 0.0])
    SignSGD([p], lr=0.5).step()
    assert p.tolist() == [-0.5, 0.5, 0.0]


def test_momentum_remembers() -> None:
    p = torch.zeros(1, requires_grad=True)
    optimizer = SignSGD([p], lr=1.0, momentum=0.9)
    for g in (10.0, -1.0):
        p.grad = torch.full((1,), g)
        optimizer.step()
    assert p.item() == -2.0  # m = 1.0, then 0.9 - 0.1 > 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="lr must be"):
        SignSGD([torch.zeros(1)], lr=-1.0)
    with pytest.raises(ValueError, match="momentum must be in"):
        SignSGD([torch.zeros(1)], momentum=1.0)
