"""Gradient estimators: ways to fill ``.grad``, by backpropagation or from loss values alone."""

from zo_lightning.centred import Centred  # noqa: F401  # what is imported with estimators, configurations can name
from zo_lightning.estimators.backprop import Backprop
from zo_lightning.estimators.base import GradientEstimator
from zo_lightning.estimators.direct_feedback_alignment import DirectFeedbackAlignment
from zo_lightning.estimators.forward_gradient import ForwardGradient
from zo_lightning.estimators.per_example import PerExample
from zo_lightning.estimators.zeroth_order import ZerothOrder

__all__ = [
    "Backprop",
    "DirectFeedbackAlignment",
    "ForwardGradient",
    "GradientEstimator",
    "PerExample",
    "ZerothOrder",
]
