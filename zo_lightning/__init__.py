"""Train any PyTorch Lightning model by forward passes only, or by backpropagation.

``import zo_lightning as zo`` imports nothing heavy: every public name is loaded when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo_lightning.ask_tell import AskTell
    from zo_lightning.black_box import BlackBox, BlackBoxLoss, EvaluationFailed
    from zo_lightning.callbacks.gradient_free import GradientFree
    from zo_lightning.centred import Centred
    from zo_lightning.directions import Coordinate, Directions, Gaussian, Rademacher, Sphere
    from zo_lightning.distributed import Distributed, ProcessLost, WeightsDiverged
    from zo_lightning.estimators import (
        Backprop,
        DirectFeedbackAlignment,
        ForwardGradient,
        GradientEstimator,
        PerExample,
        ZerothOrder,
    )
    from zo_lightning.evaluation import Batched, Evaluation, OneByOne
    from zo_lightning.low_rank import LowRank
    from zo_lightning.minimization import Result, minimize
    from zo_lightning.modules import (
        AutomaticClassifier,
        AutomaticRegressor,
        Classifier,
        EstimatedGradient,
        Regressor,
        TrainingDiverged,
    )
    from zo_lightning.nets import MLP, ResNet20, ScalableCNN, SmallCNN, SmallVGG
    from zo_lightning.objective import NonFiniteLoss, Objective
    from zo_lightning.optim import AdaMM, NormalizedSGD, SignSGD
    from zo_lightning.shaping import CentredRanks, Shaping, Standardised
    from zo_lightning.stencils import CentralDifference, ForwardDifference, Stencil
    from zo_lightning.tuning import Suggestion, tune

    __version__: str

_HOMES = {
    "ask_tell": ("AskTell",),
    "black_box": ("BlackBox", "BlackBoxLoss", "EvaluationFailed"),
    "callbacks.gradient_free": ("GradientFree",),
    "centred": ("Centred",),
    "directions": ("Coordinate", "Directions", "Gaussian", "Rademacher", "Sphere"),
    "low_rank": ("LowRank",),
    "distributed": ("Distributed", "ProcessLost", "WeightsDiverged"),
    "estimators": (
        "Backprop",
        "DirectFeedbackAlignment",
        "ForwardGradient",
        "GradientEstimator",
        "PerExample",
        "ZerothOrder",
    ),
    "evaluation": ("Batched", "Evaluation", "OneByOne"),
    "minimization": ("Result", "minimize"),
    "modules": (
        "AutomaticClassifier",
        "AutomaticRegressor",
        "Classifier",
        "EstimatedGradient",
        "Regressor",
        "TrainingDiverged",
    ),
    "nets": ("MLP", "ResNet20", "ScalableCNN", "SmallCNN", "SmallVGG"),
    "objective": ("NonFiniteLoss", "Objective"),
    "optim": ("AdaMM", "NormalizedSGD", "SignSGD"),
    "shaping": ("CentredRanks", "Shaping", "Standardised"),
    "stencils": ("CentralDifference", "ForwardDifference", "Stencil"),
    "tuning": ("Suggestion", "tune"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdaMM",
    "AskTell",
    "AutomaticClassifier",
    "AutomaticRegressor",
    "Backprop",
    "Batched",
    "BlackBox",
    "BlackBoxLoss",
    "CentralDifference",
    "Centred",
    "CentredRanks",
    "Classifier",
    "Coordinate",
    "DirectFeedbackAlignment",
    "Directions",
    "Distributed",
    "EstimatedGradient",
    "Evaluation",
    "EvaluationFailed",
    "ForwardDifference",
    "ForwardGradient",
    "Gaussian",
    "GradientEstimator",
    "GradientFree",
    "LowRank",
    "MLP",
    "NonFiniteLoss",
    "NormalizedSGD",
    "Objective",
    "OneByOne",
    "PerExample",
    "ProcessLost",
    "Rademacher",
    "Regressor",
    "ResNet20",
    "Result",
    "ScalableCNN",
    "Shaping",
    "SignSGD",
    "SmallCNN",
    "SmallVGG",
    "Sphere",
    "Standardised",
    "Stencil",
    "Suggestion",
    "TrainingDiverged",
    "WeightsDiverged",
    "ZerothOrder",
    "minimize",
    "tune",
]


if not TYPE_CHECKING:  # to a type checker a module with __getattr__ has every name, misspelt ones too

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("zo_lightning.__main__").version()
        if name not in _HOME:
            raise AttributeError(f"module 'zo_lightning' has no attribute {name!r}")
        return getattr(import_module(f"zo_lightning.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
