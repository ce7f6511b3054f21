"""Finding the step of finite differences and the learning rate, by measuring both."""

from zo_lightning.tuning.suggestion import Suggestion
from zo_lightning.tuning.tuner import tune

__all__ = ["Suggestion", "tune"]
