"""Checkpoints that a user names: whether they can be read, and whether they are of this model and optimizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from zo_lightning.checkpoint_io import DamagedCheckpoint, load_checked
from zo_lightning.measures import mismatch
from zo_lightning.user_errors import UserError


def read_checkpoint(option: str, path: Any) -> dict[str, Any] | None:
    """The checkpoint in a file, or None where none is named, or a word stands for it (``last``, ``best``, ``hpc``).

    Raises:
        UserError: the file does not exist, is damaged, or is no checkpoint.
    """
    if path is None or (option == "ckpt_path" and str(path) in ("best", "last", "hpc")):
        return None
    if not Path(path).exists():
        raise UserError(f"{option} '{path}' does not exist")
    try:
        return load_checked(Path(path))
    except DamagedCheckpoint as error:
        raise UserError(f"{option} '{path}' {error}") from error
    except OSError as error:
        raise UserError(f"{option} '{path}' cannot be read: {error.strerror}") from error


def check_weights(option: str, path: Any, checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Raise UserError naming the first weight in which a checkpoint and a model differ."""
    for name, weight in checkpoint["state_dict"].items():
        if not isinstance(name, str) or (name in model.state_dict() and not isinstance(weight, Tensor)):
            raise UserError(f"{option} '{path}' is malformed: {name!r} in its state_dict is no tensor")
    if difference := mismatch(model.state_dict(), checkpoint["state_dict"], ("the model", "the checkpoint")):
        raise UserError(f"{option} '{path}' is of another architecture: {difference}")


def check_complete(path: Any, checkpoint: dict[str, Any]) -> None:
    """Raise UserError unless a checkpoint holds what it takes to go on."""
    if not checkpoint.get("optimizer_states"):
        raise UserError(f"ckpt_path '{path}' holds weights alone: begin with them with --init_from")
    kinds: dict[str, Any] = {"loops": dict, "optimizer_states": list, "lr_schedulers": list, "callbacks": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    if not wrong:
        wrong = [
            n for n in ("optimizer_states", "lr_schedulers") if not all(isinstance(s, dict) for s in checkpoint[n])
        ]
    if not wrong and not all(_has_groups(state) for state in checkpoint["optimizer_states"]):
        wrong = ["optimizer_states"]
    if wrong:
        raise UserError(f"ckpt_path '{path}' is malformed: {wrong[0]} is not what Lightning writes")


def check_optimizer(path: Any, checkpoint: dict[str, Any], configured: Any) -> None:
    """Raise UserError where a checkpoint's optimizer or schedule is not the one that was configured.

    A state does not say whose it is: it is told by its settings, which no two kinds share.
    """
    optimizer: Optimizer = configured["optimizer"] if isinstance(configured, Mapping) else configured
    scheduler = configured["lr_scheduler"]["scheduler"] if isinstance(configured, Mapping) else None
    saved, schedules = checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", [])
    advice = "continue with the settings of that run, or take its weights alone with --init_from"
    if _settings(saved[0]["param_groups"][0]) != _settings(optimizer.state_dict()["param_groups"][0]):
        raise UserError(f"ckpt_path '{path}' has the state of another optimizer than {_name(optimizer)}: {advice}")
    states = [] if scheduler is None else [scheduler.state_dict()]
    if [set(state) for state in schedules] != [set(state) for state in states]:
        name = "no schedule" if scheduler is None else _name(scheduler)
        raise UserError(f"ckpt_path '{path}' has the state of another schedule than {name}: {advice}")


def _has_groups(state: dict[str, Any]) -> bool:
    groups = state.get("param_groups")
    return isinstance(groups, list) and len(groups) > 0 and all(isinstance(group, dict) for group in groups)


def _settings(group: dict[str, Any]) -> set[str]:
    return set(group) - {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}  # which schedulers add


def _name(thing: Any) -> str:
    return type(thing).__name__
