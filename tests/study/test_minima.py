"""The loss along the line between two minima, and around each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zo_lightning.study.minima import _without_code, line_between, sharpness
from zo_lightning.user_errors import UserError


def quadratic(weights: dict[str, Tensor]) -> tuple[float, float]:
    return float(0.5 * weights["w"].square().sum()), float(weights["w"].sum())


def test_line_passes_through_both_ends() -> None:
    a, b = {"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)}
    points = line_between(a, b, quadratic, np.array([-0.5, 0.0, 0.5, 1.0]))
    assert points == [(-0.5, 0.5, -2.0), (0.0, 0.0, 0.0), (0.5, 0.5, 2.0), (1.0, 2.0, 4.0)]


def test_sharpness_of_a_quadratic() -> None:
    """½‖w + σ‖w_f‖ ξ‖² rises by ½ σ² Σ‖w_f‖² and a term of mean zero, σ Σ ‖w_f‖ <w_f, ξ_f>."""
    weights = {"w": torch.randn(8, 100, generator=torch.Generator().manual_seed(0)), "bias": torch.ones(8)}
    at, rise = sharpness(weights, quadratic, noise=0.1, samples=200)
    squares = weights["w"].square().sum(1)
    assert at == pytest.approx(float(squares.sum()) / 2)
    # <w_f, ξ_f> = ‖w_f‖ cos with E cos² = 1/100: the standard error of the mean over 200 samples
    error = 0.1 * float(squares.square().sum().sqrt()) / 10 / np.sqrt(200)
    assert rise == pytest.approx(0.005 * float(squares.sum()), abs=4 * error)
    assert sharpness(weights, quadratic) == sharpness(weights, quadratic)


NET, DATA = {"class_path": "zo_lightning.SmallCNN"}, {"class_path": "zo_lightning.data.Digits"}


def test_nets_and_data_are_all_that_is_built() -> None:
    config = {
        "seed_everything": 1,
        "model": {"net": NET, "optimizer": "their.Optimizer"},
        "trainer": {"callbacks": "a.B"},
    }
    kept = _without_code({**config, "data": DATA}, DATA, Path("run"))
    model = {"net": NET, "estimator": "zo_lightning.Backprop"}
    assert kept == {"seed_everything": 1, "model": model, "data": DATA}


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"net": {"class_path": "their.Net"}}, DATA),
        ({"net": "their.Net"}, DATA),
        ({"net": {"class_path": "torch.nn.Sequential", "init_args": {"args": [{"class_path": "their.Net"}]}}}, DATA),
        ({"net": {"class_path": "torch.hub.load"}}, DATA),
        ({"class_path": "their.Model", "init_args": {}}, DATA),
        ("their.Model", DATA),
        ({"net": NET}, {"class_path": "their.Data"}),
    ],
)
def test_code_of_others_is_refused(model: Any, data: Any) -> None:
    with pytest.raises(UserError, match=r"'run/config.yaml' names .*(their\.|torch\.hub).*--trust"):
        _without_code({"model": model, "data": data}, data, Path("run"))
