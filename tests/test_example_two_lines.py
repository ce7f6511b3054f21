"""The example of two lines in an existing project, its smoke form."""

from pathlib import Path

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


def test_callback_and_mixin_give_the_same_weights() -> None:
    training, _ = example.digits(smoke=True)
    weights = []
    for model, callbacks in ((example.LitResNet, [zo.GradientFree(zo.PerExample())]), (example.MixedIn, [])):
        pl.seed_everything(0)
        batches = DataLoader(training, 40)
        weights.append(example.lightning(model(), batches, 1, *callbacks)[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
