"""Trainers and Fabric on several real processes."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import zo_lightning as zo
from tests import lightning_worker as worker
from tests.processes import together
from zo_lightning.modules.processes import check_processes, check_samplers


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def sends(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return together(tmp_path_factory.mktemp("sends"), 2, worker.sends)


D = sum(p.numel() for p in worker.net().parameters())
BUFFERS = sum(b.nbytes for b in worker.net().buffers())
SIGNAL = 8
"""Lightning tells all ranks at each batch whether one was asked to end."""


@pytest.mark.parametrize(("split", "probed"), [("data", 4), ("directions", 2), ("both", 2)])
def test_slopes_are_all_that_a_step_sends(sends: list[Any], split: str, probed: int) -> None:
    for sent in (result[split][0] for result in sends):
        assert sent == 4 * [{"broadcast_": SIGNAL + BUFFERS, "allgather_": 16 * probed + 16}]


def test_estimates_without_slopes_send_what_backpropagation_sends(sends: list[Any]) -> None:
    for result in sends:
        reduced = [step["allreduce_"] for step in result["Backprop"][0]]
        assert reduced == 4 * [4 * D]
        assert [step["allreduce_"] for step in result["PerExample"][0]] == 4 * [4 * D + 4]  # and the loss


@pytest.mark.parametrize("name", ["data", "directions", "both", "PerExample", "Backprop"])
def test_ranks_end_with_equal_weights(sends: list[Any], name: str) -> None:
    first, second = ({k: v for k, v in r[name][1].items() if "running" not in k} for r in sends)
    assert same(first, second)
    assert not torch.equal(first["net.2.weight"], worker.net()[2].weight)


def test_backpropagation_is_that_of_automatic_optimization_bit_for_bit(sends: list[Any]) -> None:
    for result in sends:
        assert same(result["Backprop"][1], result["automatic"][1])
