"""The example of a metric as the objective, its smoke form, on sentences that are made here."""

import random
from pathlib import Path

import pytest
import torch

from examples import metric_objective as example


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sentences of 8 words, of which those in good ones are more often of the first ten."""
    draw, words = random.Random(0), [f"word{k}" for k in range(40)]
    (folder := tmp_path / "rt_polarity").mkdir()
    for name, share in (("negative.txt", 0.25), ("positive.txt", 0.5)):
        weights = [share / 10] * 10 + [(1 - share) / 30] * 30
        lines = [" ".join(draw.choices(words, weights, k=8)) for _ in range(400)]
        (folder / name).write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("method", ["F1 itself", "class weights"])
def test_f1_gets_better(method: str, root: Path) -> None:
    (result,) = example.train(method, 42, root, smoke=True)
    assert result.after > result.before + 0.1


def test_the_threshold_is_the_best_of_the_training_data() -> None:
    x = torch.tensor([[-4.0], [-3.0], [-2.0], [-1.5], [-1.0]]).repeat_interleave(5, 0)
    y = (x > -1.8).long()
    net = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(net.weight)
    torch.nn.init.zeros_(net.bias)
    assert example.f1(net(x), y) == 0
    example.tune_threshold(net, x, y)
    assert example.f1(net(x), y) == 1
