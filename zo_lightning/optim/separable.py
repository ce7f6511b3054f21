"""Which update rules look at each weight by itself."""

import torch

from zo_lightning.optim.base import UpdateRule

_SEPARABLE = (*("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),)


def is_separable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is known to update each weight by that weight's own gradient and state alone.

    Weights may then be stepped one after the other. Ours say so by ``separable``; of ``torch.optim`` it is known of
    the class itself, not of those derived from it; hooks around ``step`` may look at all of ``.grad``.
    """
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    if isinstance(optimizer, UpdateRule):
        return optimizer.separable
    return type(optimizer).__module__.startswith("torch.optim.") and type(optimizer).__name__ in _SEPARABLE
