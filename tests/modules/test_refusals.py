"""Settings whose names a foreign module uses for something else."""

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from tests.modules.test_mixin import trainer
from zo_lightning import EstimatedGradient, GradientFree, ZerothOrder


@pytest.mark.parametrize(
    ("name", "value", "got"), [("memory", [], "str, got list"), ("estimator", nn.Linear(2, 2), "got Linear")]
)
def test_a_name_that_the_module_uses_itself_is_told(name: str, value: Any, got: str, tmp_path: Path) -> None:
    class Foreign(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, value)

    class Both(EstimatedGradient, Foreign):
        pass

    options: dict[str, Any] = {"max_steps": 1, "max_epochs": None, "limit_val_batches": 0}
    with pytest.raises(MisconfigurationException, match=rf"Both\.{name} must be of type .*{got}: .*GradientFree"):
        trainer(tmp_path, **options).fit(Both())
    trained = trainer(tmp_path, callbacks=[driver := GradientFree(ZerothOrder())], **options)
    trained.fit(Foreign())
    assert driver.forward_passes > 0
