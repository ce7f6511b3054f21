"""What every gradient estimator is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import Self

from zo_lightning.compiled import untraced
from zo_lightning.objective import Objective
from zo_lightning.parameters import Parameters, as_module
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights

Loss = Callable[[], Any]
"""Computes a loss: a tensor, a number of Python or NumPy, or an array."""


class Estimate(NamedTuple):
    """An estimate of a gradient.

    Attributes:
        loss: at the present weights (central differences: the mean of the probes), detached, a scalar.
        gradients: each trained weight with its estimate, like it in shape, strides, dtype and device. Lean ones are
            computed as they are asked for, one at a time, from the weights' shapes alone: a weight may be changed as
            soon as its estimate is there.
        slopes: along the directions of the step, where ``replay`` rebuilds the estimate from them.
    """

    loss: Tensor
    gradients: Iterable[tuple[nn.Parameter, Tensor]]
    slopes: tuple[float, ...] = ()


class GradientEstimator(ABC):
    """Fills ``.grad`` of a module's weights, so that any ``torch.optim`` update rule can follow.

    ``loss.backward()`` is one way of doing so, and the others replace it and nothing else. An estimator is a
    configuration, and never changes; what it learns about a module is in a ``State`` that ``init`` makes.

    Attributes:
        needs_example_losses: whether the loss must be that of each example, [B].
        is_exact: whether the estimate is the gradient.
        can_be_lean: whether it can compute one tensor of the estimate at a time, in the memory of one.
        learns: whether a step depends on the state that earlier ones left: it must then be passed on.
        replays: whether ``replay`` rebuilds an estimate from its slopes.
    """

    needs_example_losses: ClassVar[bool] = False
    is_exact: ClassVar[bool] = False
    can_be_lean: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    replays: ClassVar[bool] = False

    @property
    def mu(self) -> float | None:
        """The finite-difference step, or None where there is no finite difference."""
        return None

    def with_mu(self, mu: float) -> Self:
        """The same estimator with another finite-difference step; where there is none, the same one."""
        return self

    def expected_cosine(self, d: float, share: float = 1.0, examples: int = 1, spread: float = 1.0) -> float:
        """The cosine between an estimate and the gradient that theory predicts, ``‖g‖ / √E‖ĝ‖²``, as ``E ĝ = g``.

        Args:
            d: dimensions that are perturbed.
            share: of ``‖g‖²``, that of the weights in question, in [0, 1].
            examples: in the batch.
            spread: how much larger the mean of ``‖gᵢ‖²`` is than ``‖g‖²``, ≥ 1.
        """
        return 1.0

    def init(self, module: Parameters) -> State:
        """A state for a module about which nothing is known yet."""
        return State()

    def phase(self, state: State) -> Hashable:
        """What tells steps apart that do more from those that do less: steps of one phase cost the same."""
        return None

    @abstractmethod
    def estimate(
        self, objective: Objective, module: nn.Module, step: int, state: State, lean: bool = False
    ) -> Estimate:
        """Estimate the gradient of an objective at a module's present weights, and leave ``.grad`` alone.

        Args:
            objective: the loss of the present batch; it may be asked several times.
            module: owns the weights; weights, and without autograd buffers too, are bit-identical afterwards.
            step: the number of this training step. Equal seeds and steps give equal directions, so that a resumed run
                repeats the uninterrupted one.
            state: of this module, from ``init``.
            lean: keep no tensor for each weight: draw directions again where they are needed.

        Raises:
            NonFiniteLoss: a loss came out NaN or infinite.
            ValueError: the module has no weight that requires a gradient, or the loss has a shape that does not suit.
        """

    def replay(
        self, weights: Weights, step: int, loss: float, slopes: Sequence[float], state: State, lean: bool = False
    ) -> Estimate:
        """The estimate of an earlier step, from its slopes: no loss is asked, and it is the same bit for bit.

        Args:
            weights: like those of that step in shape, strides, dtype and device; values are not read.
            step: its number.
            loss: the loss that it came to.
            slopes: of its directions, as ``Estimate.slopes`` gave them.
            state: of the module.
            lean: as for ``estimate``.

        Raises:
            NotImplementedError: slopes do not make an estimate (``replays`` is false).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be replayed from slopes: its estimate takes more")

    @untraced
    def backward(self, loss: Loss | Objective, module: Parameters, step: int, state: State | None = None) -> Tensor:
        """Add an estimate of the gradient of ``loss`` to ``.grad`` of the trained weights, as ``loss.backward()`` does.

        Args:
            loss: computes the scalar loss of the present batch at the module's present weights, or the loss of each
                example, [B]: a tensor, or without autograd also a number or array of NumPy. It may be called several
                times. An ``Objective`` is used as it is.
            module: owns the weights, and is as before when this returns or raises; so is ``.grad`` when it raises.
                Or tensors that require a gradient, alone, in a list or in a dictionary.
            step: the number of this training step: each draws directions of its own.
            state: of this module, from ``init``; None makes one for this step alone.

        Returns:
            The loss at the present weights (central differences: the mean of the probes), detached.

        Raises:
            NonFiniteLoss: a loss came out NaN or infinite.
            ValueError: the module has no weight that requires a gradient, the loss has a shape that does not suit, or
                the estimator learns and ``state`` is None.
        """
        estimate = self._estimate(loss, module, step, state, lean=False)
        with torch.no_grad():
            for p, gradient in estimate.gradients:
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        return estimate.loss

    @untraced
    def update(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Loss | Objective,
        module: Parameters,
        step: int,
        state: State | None = None,
    ) -> Tensor:
        """Estimate and step in one, a tensor at a time: training in the memory of inference.

        Beside the weights and the optimizer's state there are one forward pass, and the noise of the largest tensor.
        The weights are those of ``backward`` and ``optimizer.step()``, bit for bit. The optimizer is stepped once for
        each weight, while the others have no ``.grad``: its update of a weight may depend on that weight alone, as with
        SGD, Adam and most others, but not where it uses a norm of all gradients.

        Args:
            optimizer: of the module's weights.
            loss: as for ``backward``, like ``module``, ``step``, ``state``, what is returned and what is raised.
            module: owns the weights.
            step: the number of this training step.
            state: of this module.

        Raises:
            ValueError: also where a weight has a ``.grad`` already: there is nothing to add it to.
        """
        module = as_module(module)
        if held := [name for name, p in module.named_parameters() if p.grad is not None]:
            raise ValueError(f"update needs weights without .grad, and {held[0]} has one: call optimizer.zero_grad()")
        estimate = self._estimate(loss, module, step, state, lean=True)
        step_by_tensor(optimizer, estimate)
        return estimate.loss

    def _estimate(
        self, loss: Loss | Objective, module: Parameters, step: int, state: State | None, lean: bool
    ) -> Estimate:
        if state is None and self.learns:
            raise ValueError(
                f"{type(self).__name__} learns from step to step: make state = estimator.init(module) once, and pass it"
            )
        module = as_module(module)
        objective = Objective.of(loss, module)
        return self.estimate(objective, module, step, self.init(module) if state is None else state, lean)


def step_by_tensor(optimizer: torch.optim.Optimizer, estimate: Estimate) -> None:
    """Let an optimizer update one weight after the other, each as soon as its estimate is there."""
    with torch.no_grad():
        for p, gradient in estimate.gradients:
            p.grad = gradient
            del gradient  # or it would still be there while the next one is drawn
            try:
                optimizer.step()
            finally:
                p.grad = None


def trained(objective: Objective, module: nn.Module) -> Weights:
    """The trainable weights of a module; where their shapes come with the first pass, that is run.

    Raises:
        ValueError: there is none.
    """
    weights = Weights.of(module)
    if not any(map(is_lazy, weights)):
        return weights
    objective.initialize()
    return Weights.of(module)


def like_weight(p: nn.Parameter, gradient: Tensor | None) -> Tensor:
    """A gradient with the strides of its weight; None, where the loss does not depend on it, is 0."""
    if gradient is None:
        return torch.zeros_like(p)
    return gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)


def resolve_seed(seed: int | None) -> int:
    """The given seed, or else the one given to ``torch.manual_seed`` or ``seed_everything``."""
    return torch.initial_seed() if seed is None else seed


def check_samples(samples: int) -> None:
    """Raise ValueError unless there is at least one direction per step."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
