"""LightningModules that are trained by a gradient estimator."""

from zo_lightning.modules.classifier import AutomaticClassifier, Classifier
from zo_lightning.modules.driver import TrainingDiverged
from zo_lightning.modules.mixin import EstimatedGradient
from zo_lightning.modules.regressor import AutomaticRegressor, Regressor

__all__ = [
    "AutomaticClassifier",
    "AutomaticRegressor",
    "Classifier",
    "EstimatedGradient",
    "Regressor",
    "TrainingDiverged",
]
