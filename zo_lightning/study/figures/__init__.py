"""The study's figures, one function each: tables in, a figure out."""

from zo_lightning.study.figures.budgets import reached_by_cost
from zo_lightning.study.figures.minima import minima_line, sharpness_by_size
from zo_lightning.study.figures.style import NothingToDraw
from zo_lightning.study.figures.training import (
    LABELS,
    epoch_time,
    final_accuracy,
    learning_curves,
    loss_ratios,
    slowdown,
    slowdown_exponent,
)
from zo_lightning.study.figures.weights import filter_trajectories, first_layer, matched_similarity, weight_similarity

__all__ = [
    "LABELS",
    "NothingToDraw",
    "epoch_time",
    "filter_trajectories",
    "final_accuracy",
    "first_layer",
    "learning_curves",
    "loss_ratios",
    "matched_similarity",
    "minima_line",
    "sharpness_by_size",
    "reached_by_cost",
    "slowdown",
    "slowdown_exponent",
    "weight_similarity",
]
