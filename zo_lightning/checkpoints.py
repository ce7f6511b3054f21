"""Checkpoints that a user names: whether they can be read, and whether they are of this model and optimizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from zo_lightning.cli_errors import UserError
from zo_lightning.measures import mismatch


def read_checkpoint(option: str, path: Any) -> dict[str, Any] | None:
    """The checkpoint in a file, or None where none is named or Lightning finds it by itself (``last``, ``best``).

    Raises:
        UserError: the file does not exist or is no checkpoint.
    """
    if path is None or (option == "ckpt_path" and str(path) in ("best", "last", "hpc")):
        return None
    if not Path(path).is_file():
        raise UserError(f"{option} '{path}' does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for what is no checkpoint
        raise UserError(f"{option} '{path}' is damaged or not a checkpoint") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{option} '{path}' holds no Lightning checkpoint: it has no state_dict")
    return checkpoint


def check_weights(option: str, path: Any, checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Raise UserError naming the first weight in which a checkpoint and a model differ."""
    if difference := mismatch(model.state_dict(), checkpoint["state_dict"], ("the model", "the checkpoint")):
        raise UserError(f"{option} '{path}' is of another architecture: {difference}")


def check_optimizer(path: Any, checkpoint: dict[str, Any], configured: Any) -> None:
    """Raise UserError where a checkpoint's optimizer or schedule is not the one that was configured.

    A state does not say whose it is: it is told by its settings, which no two kinds share.
    """
    optimizer: Optimizer = configured["optimizer"] if isinstance(configured, Mapping) else configured
    scheduler = configured["lr_scheduler"]["scheduler"] if isinstance(configured, Mapping) else None
    saved, schedules = checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", [])
    advice = "continue with the settings of that run, or take its weights alone with --init_from"
    if not saved:
        raise UserError(f"ckpt_path '{path}' holds weights alone: begin with them with --init_from")
    if _settings(saved[0]["param_groups"][0]) != _settings(optimizer.state_dict()["param_groups"][0]):
        raise UserError(f"ckpt_path '{path}' has the state of another optimizer than {_name(optimizer)}: {advice}")
    states = [] if scheduler is None else [scheduler.state_dict()]
    if [set(state) for state in schedules] != [set(state) for state in states]:
        name = "no schedule" if scheduler is None else _name(scheduler)
        raise UserError(f"ckpt_path '{path}' has the state of another schedule than {name}: {advice}")


def _settings(group: dict[str, Any]) -> set[str]:
    return set(group) - {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}  # which schedulers add


def _name(thing: Any) -> str:
    return type(thing).__name__
