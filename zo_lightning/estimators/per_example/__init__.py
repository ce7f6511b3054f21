"""Zeroth order with a direction for every example."""

from zo_lightning.estimators.per_example.estimator import PerExample

__all__ = ["PerExample"]
