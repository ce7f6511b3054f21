"""A suggestion as a configuration that is laid over the one it was found for."""

from collections.abc import Mapping
from typing import Any

import yaml

from zo_lightning.tuning.suggestion import Suggestion

_OF_MU = (
    "model.estimator.init_args.stencil.init_args.mu",
    "model.init_args.estimator.init_args.stencil.init_args.mu",
    "estimator.init_args.stencil.init_args.mu",
)
_OF_RATE = (  # a OneCycleLR sets the optimizer's by its own
    "model.lr_scheduler.init_args.max_lr",
    "model.init_args.lr_scheduler.init_args.max_lr",
    "lr_scheduler.init_args.max_lr",
    "model.optimizer.init_args.lr",
    "model.init_args.optimizer.init_args.lr",
    "optimizer.init_args.lr",
    "model.init_args.lr",
    "model.init_args.learning_rate",
)
_DEFAULT = {
    "class_path": "ZerothOrder",
    "init_args": {"stencil": {"class_path": "CentralDifference", "init_args": {"mu": 1e-3}}},
}
"""What trains a module as it is where no estimator is named."""


def overlay(suggestion: Suggestion, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options to change, with the classes on the way to them; and what no option of the configuration holds.

    Args:
        suggestion: found with this configuration.
        config: all options of ``fit``, as plain containers.
    """
    changed: dict[str, Any] = {}
    by_hand: list[str] = []
    if suggestion.mu is not None:
        held = {"estimator": None, **config}
        has_none = held["estimator"] is None and "class_path" in config["model"]
        place = next((one for one in _OF_MU if _value(config, one) is not None), _OF_MU[2] if has_none else None)
        if place is None or (has_none and _of_callback(config)):
            by_hand.append(f"mu is {suggestion.mu:.2g}: set it where the estimator is made")
        else:
            known = {**config, "estimator": _DEFAULT} if has_none and place == _OF_MU[2] else config
            _put(changed, known, place, suggestion.mu)
    place = next((one for one in _OF_RATE if isinstance(_value(config, one), int | float)), None)
    if place is None:
        by_hand.append(
            f"the learning rate is {suggestion.lr:.2g}, {suggestion.factor:.3g} times what configure_optimizers gives: "
            "set it there, or by --optimizer"
        )
    else:
        _put(changed, config, place, _value(config, place) * suggestion.factor)
    return changed, by_hand


def as_yaml(changed: Mapping[str, Any], comment: str) -> str:
    """A file that ``fit -c`` takes."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.safe_dump(dict(changed), sort_keys=False)


def _of_callback(config: Mapping[str, Any]) -> bool:
    callbacks = config.get("trainer", {}).get("callbacks") or []
    return any("GradientFree" in str(one) for one in (callbacks if isinstance(callbacks, list) else [callbacks]))


def _value(config: Any, place: str) -> Any:
    for key in place.split("."):
        if not isinstance(config, Mapping) or key not in config:
            return None
        config = config[key]
    return config


def _put(changed: dict[str, Any], config: Any, place: str, value: float) -> None:
    """Set a number in nested dictionaries, which name the classes that the configuration has on the way."""
    *way, last = place.split(".")
    for key in way:
        config = config[key]
        changed = changed.setdefault(key, {})
        if "class_path" in config:
            changed.setdefault("class_path", config["class_path"])
    changed[last] = float(f"{value:.2g}")
