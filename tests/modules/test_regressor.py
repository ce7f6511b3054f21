from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zo_lightning import AutomaticRegressor, Backprop, Classifier, PerExample, Regressor, ZerothOrder


def loader(column: bool = True) -> DataLoader:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -1.0, 0.5, 2.0])
    return DataLoader(TensorDataset(x, y[:, None] if column else y), batch_size=16)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def trainer(path: Path, epochs: int = 30) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=path, max_epochs=epochs, logger=False, **quiet)  # type: ignore[arg-type]


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 5e-2)


@pytest.mark.parametrize(
    "estimator",
    [Backprop(), ZerothOrder(samples=4, seed=0), PerExample(seed=0)],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("column", [True, False])
def test_learns_and_predicts(estimator: Any, column: bool, tmp_path: Path) -> None:
    """The targets' variance is 6.25; the shapes of targets, [B, 1] or [B], make no difference."""
    fit, module = trainer(tmp_path), Regressor(net(), estimator, adam)
    fit.fit(module, loader(column))
    [metrics] = fit.validate(module, loader(column), verbose=False)
    assert metrics["val/loss"] < 0.1 and metrics["val/mae"] ** 2 <= metrics["val/loss"]
    assert torch.cat(fit.predict(module, loader())).shape == (64, 1)  # type: ignore[arg-type]


def test_backprop_equals_the_automatic_twin(tmp_path: Path) -> None:
    twins = AutomaticRegressor(net(), adam), Regressor(net(), Backprop(), adam)
    for module in twins:
        trainer(tmp_path, 2).fit(module, loader())
    assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))


def test_targets_of_another_shape_are_refused(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.ones(4, 4), torch.ones(4, 2)), 4)
    with pytest.raises(ValueError, match=r"the shape of the targets, \(4, 2\), got \(4, 1\)"):
        trainer(tmp_path, 1).fit(Regressor(net(), Backprop()), data)


@pytest.mark.parametrize(
    ("targets", "outputs", "message"),
    [
        (torch.ones(4, 1), 1, r"class indices \[B\], whole numbers, got torch.float32 of shape \(4, 1\): .* Regressor"),
        (torch.ones(4), 3, r"class indices \[B\], whole numbers, got torch.float32 of shape \(4,\)"),
        (
            torch.ones(4, 1, dtype=torch.long),
            3,
            r"class indices \[B\], whole numbers, got torch.int64 of shape \(4, 1\)",
        ),
        (torch.zeros(4, dtype=torch.long), 1, r"must give \[B, C\] with C >= 2 classes, got shape \(4, 1\)"),
    ],
)
def test_a_classifier_refuses_what_is_no_classification(
    targets: Tensor, outputs: int, message: str, tmp_path: Path
) -> None:
    data = DataLoader(TensorDataset(torch.ones(4, 4), targets), 4)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 1).fit(Classifier(nn.Linear(4, outputs), ZerothOrder()), data)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="lr_interval must be 'epoch' or 'step', got 'batch'"):
        Regressor(net(), Backprop(), lr_interval="batch")  # type: ignore[arg-type]
