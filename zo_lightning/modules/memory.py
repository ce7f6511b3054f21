"""Whether the optimizer steps one weight after the other, each as soon as its estimate is there."""

from typing import Any, Literal

from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.parameter import is_lazy

from zo_lightning.estimators import GradientEstimator
from zo_lightning.optim import is_separable

Memory = Literal["auto", "lean", "full"]

LARGE = 2**24
"""Weights from which on memory counts for more than the time to draw directions again."""

_BEFORE_THE_STEP = "on_after_backward", "on_before_optimizer_step"
_OF_A_MODULE = *_BEFORE_THE_STEP, "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad"
_DEFAULTS = (
    "pytorch_lightning.core.",
    "pytorch_lightning.callbacks.callback",
    "lightning.pytorch.core.",
    "lightning.pytorch.callbacks.callback",
    "zo_lightning.modules.mixin",
)


def chooses_lean(memory: Memory, trainer: Any, module: Any, estimator: GradientEstimator) -> bool:
    """Whether training takes the memory of inference: it does where that was asked for, or is worth it and possible.

    Args:
        memory: ``"lean"``, ``"full"``, or ``"auto"``: lean from 2²⁴ trainable weights on, where nothing is against it.
        trainer: about to fit, with its optimizer.
        module: whose weights are trained.
        estimator: of their gradient.

    Raises:
        MisconfigurationException: ``memory`` is none of the three, or lean and something needs ``.grad`` as a whole.
    """
    if memory not in ("auto", "lean", "full"):
        raise MisconfigurationException(f"memory must be 'auto', 'lean' or 'full', got {memory!r}")
    if not may_be_lean(memory, module):
        return False
    against = _against(trainer, module, estimator)
    if against and memory == "lean":
        raise MisconfigurationException(f"memory='lean': {'; '.join(against)}. Take memory='full'")
    return not against


def may_be_lean(memory: Memory, module: Any) -> bool:
    """Whether training may take the memory of inference: by what is asked and by size, whatever is against it."""
    if memory == "auto":
        return sum(p.numel() for p in module.parameters() if p.requires_grad and not is_lazy(p)) >= LARGE
    return memory == "lean"


def _against(trainer: Any, module: Any, estimator: GradientEstimator) -> list[str]:
    """What stands against the lean form."""
    optimizer = trainer.optimizers[0]
    accumulates = trainer.accumulate_grad_batches != 1 or any(
        isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks
    )
    reasons = [
        (not estimator.can_be_lean, f"{type(estimator).__name__} has no lean form"),
        (trainer.gradient_clip_val is not None, "gradient_clip_val needs the norm of the whole gradient"),
        (accumulates, "accumulate_grad_batches adds up whole gradients"),
        (
            getattr(trainer.precision_plugin, "scaler", None) is not None,
            f"the GradScaler of precision {trainer.precision} looks at the whole gradient",
        ),
        (
            not is_separable(optimizer),
            f"{type(optimizer).__name__} is not known to update each weight by its own gradient alone",
        ),
    ]
    for owner, hooks in [*((callback, _BEFORE_THE_STEP) for callback in trainer.callbacks), (module, _OF_A_MODULE)]:
        reasons += [
            (True, f"{hook} of {type(owner).__name__} may ask for the whole gradient")
            for hook in hooks
            if overrides(owner, hook)
        ]
    return [reason for stands, reason in reasons if stands]


def overrides(owner: Any, hook: str) -> bool:
    """Whether a module or callback has a hook other than Lightning's own, which does nothing or the usual."""
    own = vars(owner).get(hook)
    found = [vars(c)[hook] for c in type(owner).__mro__ if hook in vars(c)] if own is None else [own]
    return any(not (getattr(one, "__module__", None) or "").startswith(_DEFAULTS) for one in found)
