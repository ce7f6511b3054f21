"""Callbacks, one per file: each watches or steers a run with any module and any estimator, and can be left out."""

from zo_lightning.callbacks.budget import Budget
from zo_lightning.callbacks.compile_nets import CompileNets
from zo_lightning.callbacks.dashboard import Dashboard
from zo_lightning.callbacks.epoch_cost import EpochCost
from zo_lightning.callbacks.exact_resume import ExactResume
from zo_lightning.callbacks.filter_images import FilterImages
from zo_lightning.callbacks.filter_projection import FilterProjection
from zo_lightning.callbacks.gradient_alignment import GradientAlignment
from zo_lightning.callbacks.gradient_free import GradientFree
from zo_lightning.callbacks.last_checkpoint import LastCheckpoint
from zo_lightning.callbacks.pass_budget import PassBudget
from zo_lightning.callbacks.reporting import log_image
from zo_lightning.callbacks.trajectory_log import TrajectoryLog
from zo_lightning.callbacks.weight_similarity import WeightSimilarity
from zo_lightning.callbacks.weight_snapshots import WeightSnapshots

__all__ = [
    "Budget",
    "CompileNets",
    "Dashboard",
    "EpochCost",
    "ExactResume",
    "FilterImages",
    "FilterProjection",
    "GradientAlignment",
    "GradientFree",
    "LastCheckpoint",
    "PassBudget",
    "TrajectoryLog",
    "WeightSimilarity",
    "WeightSnapshots",
    "log_image",
]
