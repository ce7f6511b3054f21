"""The example of two lines in an existing project, its smoke form."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import zo_lightning as zo
from examples import two_lines as example


def test_backpropagation_is_theirs_and_it_learns() -> None:
    (theirs,), (ours,) = (
        example.train(way, 42, Path(), smoke=True) for way in ("Lightning without us", "callback, Backprop")
    )
    assert ours.after == theirs.after > ours.before + 0.15


def weights(train: Callable[[DataLoader], tuple[torch.nn.Module, float]]) -> list[torch.Tensor]:
    training, _ = example.digits(smoke=True)
    pl.seed_everything(0)
    net, _ = train(DataLoader(training, 40))
    return list(net.state_dict().values())


def callback(batches: DataLoader) -> tuple[torch.nn.Module, float]:
    return example.lightning(example.LitResNet(), batches, 1, zo.GradientFree(zo.PerExample()))


def mixin(batches: DataLoader) -> tuple[torch.nn.Module, float]:
    return example.lightning(example.MixedIn(), batches, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [(callback, mixin), (partial(example.fabric, epochs=1), partial(example.plain, epochs=1))],
    ids=["callback and mixin", "Fabric and PyTorch"],
)
def test_two_ways_give_the_same_weights(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    for a, b in zip(weights(one), weights(other), strict=True):
        assert torch.equal(a, b)
