"""Ranges of hyper-parameters that several update rules share."""

import math


def check_lr(lr: float) -> None:
    """Raise ValueError unless the learning rate is finite and at least 0."""
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be a finite number of at least 0, got {lr}")


def check_unit_interval(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_at_least_0(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is at least 0."""
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
