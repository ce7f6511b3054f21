"""Compiled nets in training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torchmetrics import MeanMetric

from zo_lightning import Backprop, Classifier, GradientEstimator, PerExample, SmallCNN, ZerothOrder
from zo_lightning.callbacks import CompileNets
from zo_lightning.data import Digits


def trained(folder: Path, estimator: GradientEstimator, *callbacks: CompileNets, whole: bool = False) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(SmallCNN(), estimator, lambda p: torch.optim.SGD(p, lr=0.05))
    quiet: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "model_summary", "progress_bar")}
    trainer = Trainer(
        accelerator="cpu", max_steps=5, logger=False, default_root_dir=folder, callbacks=list(callbacks), **quiet
    )
    fitted: Any = torch.compile(model, backend="eager") if whole else model
    trainer.fit(fitted, Digits(128, 0, 1))
    return model


@pytest.mark.parametrize(
    "estimator", [Backprop(), ZerothOrder(seed=0), PerExample(seed=0)], ids=lambda one: type(one).__name__
)
def test_a_compiled_net_is_trained_as_the_plain_one(estimator: GradientEstimator, tmp_path: Path) -> None:
    plain = trained(tmp_path, estimator)
    compiled = trained(tmp_path, estimator, CompileNets("eager"))
    assert compiled.net._compiled_call_impl is not None and plain.net._compiled_call_impl is None
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.net.state_dict().items():
        # Losses are rounded by 1e-7, which zeroth order divides by its mu of 1e-3, and SGD multiplies by 0.05.
        torch.testing.assert_close(compiled.net.state_dict()[name], value, rtol=0, atol=1e-4)
    assert compiled.flops == pytest.approx(plain.flops, rel=1e-6) and plain.flops > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("estimator", [ZerothOrder(seed=0), PerExample(seed=0)], ids=lambda one: type(one).__name__)
def test_a_module_may_be_compiled_as_a_whole(estimator: GradientEstimator, tmp_path: Path) -> None:
    """Lightning then compiles its training step, which is to leave the estimator out."""
    plain, compiled = (trained(tmp_path, estimator, whole=whole) for whole in (False, True))
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_compiled_stays_as_it_is() -> None:
    model, callback = LightningModule(), CompileNets("eager")
    scripted: Any = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    model.scripted = scripted
    model.metric, model.activation, model.net = MeanMetric(), torch.nn.ReLU(), torch.nn.Linear(2, 2)
    model.heads = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.ReLU()])
    for _ in range(2):
        callback.on_fit_start(Trainer(logger=False), model)
    assert [name for name, one in model.named_modules() if one._compiled_call_impl is not None] == ["net", "heads.0"]
