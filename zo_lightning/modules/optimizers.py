"""How many optimizers a module may have where an estimator trains it."""

from functools import wraps
from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.exceptions import MisconfigurationException


def expect_one_optimizer(module: LightningModule) -> None:
    """Let the next call of ``configure_optimizers`` refuse none, or several: Lightning would not optimize by itself.

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
        optimizers = configured[0] if _is_pair_of_lists(configured) else configured
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


def _is_pair_of_lists(configured: Any) -> bool:
    return isinstance(configured, list | tuple) and len(configured) == 2 and isinstance(configured[0], list)
