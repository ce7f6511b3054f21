"""Modules that an estimator cannot train in automatic optimization: what to change is said before training begins."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning.estimators import GradientEstimator

_SETTINGS = {"estimator": GradientEstimator, "memory": str, "mu_follows_lr": bool, "max_skipped_in_a_row": int}


def check_settings(owner: Any) -> None:
    """Raise MisconfigurationException where the name of a setting has come to stand for something else.

    Args:
        owner: of the settings: a module with the mixin, whose other bases may use the name too, or a callback.
    """
    for name, kind in _SETTINGS.items():
        value = vars(owner).get("_modules", {}).get(name, getattr(owner, name))
        if not isinstance(value, kind):
            raise MisconfigurationException(
                f"{type(owner).__name__}.{name} must be of type {kind.__name__}, got {type(value).__name__}: a module "
                "that has another use for this name is trained by the callback GradientFree"
            )


def check_module(module: LightningModule, training_step: Callable[..., Any]) -> None:
    """Raise MisconfigurationException where a module has no one loss of a batch for an estimator to ask again.

    Args:
        module: about to be trained.
        training_step: its own.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} steps its optimizers itself, and an estimator takes its place in automatic optimization: call "
            "estimator.backward(loss, module, step) in place of manual_backward, without mixin or callback"
        )
    if "dataloader_iter" in inspect.signature(training_step).parameters:
        raise MisconfigurationException(
            f"{name}.training_step takes a dataloader_iter, which cannot be asked twice for one batch: take a batch"
        )


def expect_one_optimizer(module: LightningModule) -> None:
    """Let the next call of ``configure_optimizers`` refuse none, and several, which Lightning leaves to the module.

    Raises:
        MisconfigurationException: in that call.
    """
    own, in_place = module.configure_optimizers, vars(module).get("configure_optimizers")

    @wraps(own)
    def configure_optimizers() -> Any:
        del vars(module)["configure_optimizers"]
        if in_place is not None:  # the object has one beside its class's
            vars(module)["configure_optimizers"] = in_place
        configured: Any = own()
        optimizers = configured[0] if is_pair_of_lists(configured) else configured
        if optimizers is None or optimizers == []:
            raise MisconfigurationException(
                f"{type(module).__name__}.configure_optimizers gave no optimizer: nothing would be trained"
            )
        if isinstance(optimizers, list | tuple) and len(optimizers) > 1 and module.automatic_optimization:
            raise MisconfigurationException(
                f"an estimator trains by one optimizer, {type(module).__name__}.configure_optimizers gave "
                f"{len(optimizers)}: make one with several parameter groups, or step them in manual optimization "
                "and call estimator.backward(loss, module, step) in place of manual_backward, without mixin or "
                "callback"
            )
        return configured

    vars(module)["configure_optimizers"] = configure_optimizers


def is_pair_of_lists(configured: Any) -> bool:
    """Whether ``configure_optimizers`` returned a list of optimizers and one of schedulers."""
    return isinstance(configured, list | tuple) and len(configured) == 2 and isinstance(configured[0], list)
