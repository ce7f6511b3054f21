"""What every gradient estimator is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.objective import Objective


class GradientEstimator(ABC):
    """Fills ``.grad`` of a module's weights, so that any ``torch.optim`` update rule can follow.

    ``loss.backward()`` is one way of doing so, and the others replace it and nothing else.
    """

    @abstractmethod
    def backward(self, loss: Callable[[], Tensor] | Objective, module: nn.Module, step: int) -> Tensor:
        """Overwrite ``.grad`` of every weight that requires one with an estimate of the gradient of ``loss``.

        Args:
            loss: computes the scalar loss of the present batch at the module's present weights; it may be called
                several times. An ``Objective`` is used as it is.
            module: owns the weights; afterwards they are bit-identical to before, and without autograd its buffers too.
            step: the number of this training step. Equal seeds and steps give equal directions, so that a resumed run
                repeats the uninterrupted one.

        Returns:
            The loss at the present weights (central differences: the mean of the probes), detached.

        Raises:
            NonFiniteLoss: a loss came out NaN or infinite; ``.grad`` is then cleared.
            ValueError: the module has no weight that requires a gradient, or the loss is not a scalar.
        """

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """What the estimator has learned about a module, if it learns: saved with checkpoints, as plain containers."""
        return {}

    def load_state_dict(self, module: nn.Module, state: dict[str, Any]) -> None:  # noqa: B027 (most learn nothing)
        """Take up what ``state_dict`` gave, to continue a run exactly."""


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The weights that require a gradient, each once: a tied weight is one weight.

    Raises:
        ValueError: there is none.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad=True: there is nothing to train")
    return params


def resolve_seed(seed: int | None) -> int:
    """The given seed, or else the one given to ``torch.manual_seed`` or ``seed_everything``."""
    return torch.initial_seed() if seed is None else seed


def check_samples(samples: int) -> None:
    """Raise ValueError unless there is at least one direction per step."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")


def estimate(
    params: Sequence[nn.Parameter], probes: Iterable[tuple[float, float, Iterable[Tensor]]], samples: int
) -> Tensor:
    """Set ``.grad`` to ``(1/q) Σᵢ cᵢ uᵢ`` and return the mean loss, from ``q`` triples (loss, slope ``cᵢ``, ``uᵢ``).

    The tensors of a direction are used up. When a probe raises, ``.grad`` is cleared.
    """
    total = 0.0
    try:
        for index, (loss, slope, direction) in enumerate(probes):
            for p, u in zip(params, direction, strict=True):
                if index == 0:
                    p.grad = u.mul_(slope / samples)
                elif p.grad is not None:
                    p.grad.add_(u, alpha=slope / samples)
            total += loss
    except BaseException:
        for p in params:
            p.grad = None
        raise
    return torch.tensor(total / samples, device=params[0].device)
