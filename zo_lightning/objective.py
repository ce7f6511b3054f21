"""The loss as a function that is safe to ask again: the same weights give the same value, and no trace is left."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


class NonFiniteLoss(ArithmeticError):
    """A loss came out NaN or infinite, so that no gradient can be estimated from it."""

    def __init__(self, value: float) -> None:
        super().__init__(f"the loss is {value}")
        self.value = value


class Objective:
    """A loss closure over a module's weights that can be asked many times in one training step.

    Each call (a *probe*) sees the same dropout masks, since the global random state is set from ``seed`` for its
    duration; it leaves that state and the module's buffers (BatchNorm's statistics) bit-identical to before. TF32 is
    off and autocast's cache of weight casts is empty, since either drowns a finite difference of small ``mu``.

    Args:
        loss: returns the loss at the module's present weights, or the loss of each example, [B], whose mean it is.
        module: owns the weights and buffers.
        seed: of the random numbers that ``loss`` itself draws, such as dropout masks.

    Attributes:
        forward_passes: what the calls so far cost, in forward passes of the batch.
        seen: the losses [B] that the passes of one estimate gave, where they were asked by ``losses``.
    """

    def __init__(self, loss: Callable[[], Tensor], module: nn.Module, seed: int = 0) -> None:
        self.loss = loss
        self.module = module
        self.seed = seed
        self.forward_passes = 0
        self.seen: list[Tensor] = []
        self._cost = 0
        self._buffers = _Buffers(module)
        self._after_first: _Buffers | None = None
        devices = {p.device for p in module.parameters()} | {torch.device("cpu")}
        self._generators = [_default_generator(device) for device in devices if device.type in ("cpu", "cuda")]

    @classmethod
    def of(cls, loss: "Callable[[], Tensor] | Objective", module: nn.Module, seed: int) -> "Objective":
        """Make an objective of a plain closure; one that is an objective already is kept, with its own guards."""
        if isinstance(loss, Objective):
            loss.seed, loss.seen = seed, []
            return loss
        return cls(loss, module, seed)

    def __call__(self) -> float:
        """Ask for the loss once.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        with self.probe():
            return check_loss(self.loss())

    def losses(self) -> Tensor:
        """Ask for the loss of each example, [B], within a ``probe``; their mean is the loss.

        Raises:
            NonFiniteLoss: one is NaN or infinite.
            ValueError: there is one loss for the whole batch.
        """
        losses = self.per_example()
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                "this estimator needs the loss of each example, a tensor [B], as from reduction='none' "
                f"(a LightningModule returns it as 'losses' beside 'loss'), got {got}"
            )
        losses = losses.detach()
        check_loss(losses)
        if self._cost:
            self.seen.append(losses)
        return losses

    def per_example(self) -> Tensor:
        """Run the closure for the losses of the examples."""
        return self.loss()

    @contextmanager
    def probe(self, cost: int = 1) -> Iterator[None]:
        """Guard one forward pass, for estimators that call ``loss`` themselves; it counts as ``cost``."""
        self._cost = cost
        try:
            with torch.no_grad(), _seeded(self._generators, self.seed), _full_float32():
                yield
        finally:
            self._after_probe()
            self.forward_passes += cost

    def differentiable(self) -> Tensor:
        """Ask for the loss as PyTorch would, with its graph and its side effects: for estimators that use autograd.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        loss = self.loss()
        check_loss(loss)
        return loss.mean() if loss.ndim == 1 else loss

    def backpropagate(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to ``.grad`` of the weights."""
        loss.backward()

    def commit(self) -> None:
        """Give the buffers the values that the first probe computed, as if it had been the step's only forward pass."""
        if self._after_first is not None:
            self._after_first.restore()

    def _after_probe(self) -> None:
        if self._buffers and self._after_first is None:
            self._after_first = _Buffers(self.module)
        self._buffers.restore()


def check_loss(loss: Tensor) -> float:
    """The value of a loss: a tensor with one element, or the mean of one with a loss per example.

    Raises:
        ValueError: it is neither.
        NonFiniteLoss: it is NaN or infinite.
    """
    if not isinstance(loss, Tensor) or (loss.numel() != 1 and loss.ndim != 1) or loss.numel() == 0:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a tensor with one element, or with one per example, got {shape}")
    value = float(loss.detach().mean())
    if not math.isfinite(value):
        raise NonFiniteLoss(value)
    return value


class _Buffers:
    """The values of a module's buffers, to be put back later: by name, so that a replaced buffer comes back too."""

    def __init__(self, module: nn.Module) -> None:
        self._saved = [
            (owner._buffers, name, buffer, buffer.detach().clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    def __bool__(self) -> bool:
        return bool(self._saved)

    def restore(self) -> None:
        with torch.no_grad():
            for owner, name, buffer, value in self._saved:
                owner[name] = buffer
                buffer.copy_(value)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]


@contextmanager
def _seeded(generators: list[torch.Generator], seed: int) -> Iterator[None]:
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def _full_float32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        torch.clear_autocast_cache()
