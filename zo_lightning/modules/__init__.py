"""LightningModules that are trained by a gradient estimator."""

from zo_lightning.modules.classifier import AutomaticClassifier, Classifier
from zo_lightning.modules.mixin import EstimatedGradient, TrainingDiverged

__all__ = ["AutomaticClassifier", "Classifier", "EstimatedGradient", "TrainingDiverged"]
