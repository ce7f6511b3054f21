from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zo_lightning.vectors import Vector

KEEPERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "the tensor": lambda t: t,
    "a view": lambda t: t[:1],
    "a detached one": lambda t: t.detach(),
    "an array": lambda t: t.numpy(),
    "what shares it by DLPack": torch.from_dlpack,
    "its storage": lambda t: t.untyped_storage(),
    "the gradient of a weight": lambda t: _with_grad(t),
}


def _with_grad(tensor: torch.Tensor) -> nn.Parameter:
    weight = nn.Parameter(torch.zeros_like(tensor))
    weight.grad = tensor
    return weight


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_memory_is_free_once_nobody_holds_what_was_lent(keep: Callable[[torch.Tensor], Any]) -> None:
    vector = Vector.like([torch.zeros(3), torch.zeros(2, 2)])
    assert vector.is_free
    for _ in range(2):
        lent = vector.lend()
        assert not vector.is_free
        kept = [keep(lent[0])]
        del lent
        assert not vector.is_free
        kept.clear()
        assert vector.is_free


def test_memory_of_other_processes_is_never_free() -> None:
    vector = Vector.like([torch.zeros(3)])
    vector.lend()[0].share_memory_()
    assert not vector.is_free


def test_memory_in_pieces_is_never_free_again() -> None:
    vector = Vector.like([torch.zeros(3), torch.zeros(2).double()])
    vector.lend()
    assert not vector.is_free


def test_lent_tensors_are_the_same_numbers() -> None:
    vector = Vector.like([torch.zeros(3), torch.zeros(())])
    for tensor, lent in zip(vector, vector.lend(), strict=True):
        tensor.fill_(2.0)
        assert lent is not tensor
        assert torch.equal(lent, tensor)


def test_what_held_the_memory_at_first_is_not_taken_for_its_owner() -> None:
    vector = Vector.like([torch.zeros(3)])
    view = vector[0][:1]
    kept = vector.lend()
    del view
    assert not vector.is_free
    del kept
    assert vector.is_free
