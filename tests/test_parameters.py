import re

import numpy as np
import pytest
import torch
from torch import nn

from zo_lightning.objective import Objective
from zo_lightning.parameters import as_module, mapped

LEAF = torch.zeros(2, requires_grad=True)


def test_a_module_stays_itself() -> None:
    net = nn.Linear(1, 1)
    assert as_module(net) is net


def test_tensors_keep_their_identity_and_are_named_by_their_places() -> None:
    a, b, c = (torch.zeros(k, requires_grad=True) for k in (1, 2, 3))
    held = dict(as_module({"x": a, "y": [b, {"z": c}]}).named_parameters())
    assert list(held) == ["x", "y.0", "y.1.z"]
    assert held["x"] is a and held["y.0"] is b and held["y.1.z"] is c
    assert dict(as_module(a).named_parameters()) == {"0": a}


def test_a_frozen_parameter_is_left_alone_and_a_plain_tensor_named() -> None:
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    assert [p.requires_grad for p in as_module([LEAF, frozen]).parameters()] == [True, False]
    with pytest.raises(ValueError, match=r"parameter b\.1 requires no gradient: call requires_grad_"):
        as_module({"a": LEAF, "b": [LEAF, torch.zeros(1)]})


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        ([LEAF * 2], ValueError, "parameter 0 is computed from other tensors"),
        ([], ValueError, "there is nothing to train"),
        ({}, ValueError, "there is nothing to train"),
        (None, TypeError, "the parameters must be an nn.Module, a tensor, or tensors in lists"),
        ("weights", TypeError, "got str"),
        ([LEAF, np.zeros(2)], TypeError, "parameter 1 must be a tensor, got ndarray: torch.as_tensor makes one"),
        ([LEAF, 1.0], TypeError, "parameter 1 must be a tensor, or tensors in lists and dictionaries, got float"),
        ([nn.Linear(1, 1)], TypeError, "got Linear; several modules go into an nn.ModuleList"),
    ],
)
def test_what_cannot_be_trained_is_named(parameters: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        as_module(parameters)  # type: ignore[arg-type]


def test_mapped_keeps_lists_and_dictionaries() -> None:
    def name_of(name: str, tensor: torch.Tensor) -> str:
        return name

    assert mapped(name_of, LEAF) == "0"
    assert mapped(name_of, (LEAF, {"a": [LEAF]})) == ("0", {"a": ["1.a.0"]})
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, bias=False).requires_grad_(False))
    assert mapped(name_of, net) == {"0.weight": "0.weight", "0.bias": "0.bias"}
    assert mapped(name_of, net.named_parameters()) == {n: n for n, _ in net.named_parameters()}


def test_an_objective_takes_plain_tensors() -> None:
    x = torch.ones(2, requires_grad=True)
    assert Objective(lambda: x.sum(), [x])() == 2.0
