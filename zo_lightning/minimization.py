"""The minimum of a function, by whatever estimator and optimizer: for functions that are no network."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from zo_lightning.black_box import BlackBox, BlackBoxLoss
from zo_lightning.estimators import GradientEstimator, ZerothOrder
from zo_lightning.objective import NonFiniteLoss, Objective, check_loss
from zo_lightning.parameters import as_module, kept, mapped

IN_A_ROW = 20
"""Steps without a finite loss after which there is nothing to be hoped for."""


@dataclass(frozen=True)
class Result:
    """What ``minimize`` has found, as SciPy's ``OptimizeResult`` says it.

    Attributes:
        x: the best point, in the form of ``x0``.
        fun: the function there.
        history: the loss of each step, NaN where it was skipped.
        evaluations: of the function.
        steps: taken, with those skipped.
        skipped: steps whose losses were not all finite.
        message: why it ended.
    """

    x: Any
    fun: float
    history: tuple[float, ...]
    evaluations: int
    steps: int
    skipped: int
    message: str


def minimize(
    function: Callable[[Any], Any] | BlackBox,
    x0: Any,
    estimator: GradientEstimator | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    *,
    steps: int = 1000,
    callback: Callable[[Result], Any] | None = None,
    progress: bool | None = None,
) -> Result:
    """Minimise a function of arrays or tensors that nobody can differentiate.

    >>> import numpy as np
    >>> import zo_lightning as zo
    >>> result = zo.minimize(lambda x: np.abs(x - [1, 2]).sum(), [0, 0], zo.ZerothOrder(samples=2, seed=0), steps=200)
    >>> result.x.round(1), result.evaluations
    (array([1., 2.]), 802)

    Args:
        function: takes what ``x0`` is, arrays for arrays and tensors for tensors, in memory of its own, and returns a
            number. A ``BlackBox`` of such a function is asked again where it fails, evaluates several points at a time,
            or takes the list of all points of a step (``batched``).
        x0: where to begin: a number, a list of numbers, an array, a tensor, or arrays and tensors in lists and
            dictionaries. It is not changed.
        estimator: of the gradient; None takes ``ZerothOrder(samples=4)``. Its ``mu`` should be a distance over which
            the function changes by more than its noise. Those that need a graph have one, if ``x0`` is of tensors.
        optimizer: makes the optimizer, such as ``partial(torch.optim.SGD, lr=1e-3)``; None takes Adam, with a learning
            rate that falls from 0.1 to 0 as a cosine.
        steps: of the optimizer.
        callback: called after each step with the present point, its loss and the history; StopIteration ends.
        progress: whether to show a bar; None: on a terminal, from the second second on.

    Raises:
        TypeError: ``x0`` holds something else.
        ValueError: ``steps`` < 1; the function returns no number.
        EvaluationFailed: a ``BlackBox`` gave no loss.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    problem = _Problem(function, x0)
    module = as_module(problem.x)
    estimator = ZerothOrder(samples=4) if estimator is None else estimator
    objective, state = Objective(problem.loss, module), estimator.init(module)
    weights = list(module.parameters())
    rule = torch.optim.Adam(weights, lr=0.1) if optimizer is None else optimizer(weights)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(rule, steps) if optimizer is None else None
    best, lowest, history = problem.point(), math.inf, list[float]()
    message = f"all {steps} steps taken"

    def result(x: Any, fun: float) -> Result:
        skipped = sum(map(math.isnan, history))
        return Result(x, fun, tuple(history), problem.evaluations, len(history), skipped, message)

    for step in tqdm(
        range(steps), "minimize", delay=0 if progress else 2, disable=None if progress is None else not progress
    ):
        here = problem.point()
        try:
            history.append(float(estimator.backward(objective, module, step, state)))
            rule.step()
            if schedule is not None:
                schedule.step()
        except NonFiniteLoss:
            history.append(math.nan)
        rule.zero_grad()
        if history[-1] < lowest:
            best, lowest = here, history[-1]
        if callback is not None:
            try:
                callback(result(here, history[-1]))
            except StopIteration:
                message = "ended by the callback"
                break
        if len(history) >= IN_A_ROW and all(map(math.isnan, history[-IN_A_ROW:])):
            message = f"no finite loss in {IN_A_ROW} steps in a row"
            break
    ends = [(x, problem.value(x)) for x in (problem.point(), best)]
    return result(*min(ends, key=lambda end: (math.isnan(end[1]), end[1])))


class _Problem:
    """A function of arrays or tensors as a loss of tensors that require a gradient.

    Attributes:
        x: the tensors, in the form of ``x0``.
        loss: the function of them.
        evaluations: so far.
    """

    def __init__(self, function: Callable[[Any], Any] | BlackBox, x0: Any) -> None:
        self.evaluations = 0
        self._arrays: set[str] = set()
        self.x = mapped(self._variable, kept(np.asarray(x0, float) if _is_numeric(x0) else x0))
        if isinstance(function, BlackBox):
            self._function: Callable[[Any], Any] = lambda x: function.evaluate([x])[0]
            self.loss: Callable[[], Any] = BlackBoxLoss(function, self._candidate)
        else:
            self._function = function
            self.loss = lambda: function(self._candidate())

    def _variable(self, name: str, value: Any) -> Tensor:
        """A tensor of its own to be trained; integers become float64."""
        if not isinstance(value, Tensor):
            self._arrays.add(name)
            array = np.asarray(value)
            value = torch.from_numpy(np.array(array, array.dtype if array.dtype.kind in "fc" else float))
        return value.detach().clone().requires_grad_()

    def _candidate(self) -> Any:
        """What the function takes: where a pass sees it, and with its graph if there is one."""
        self.evaluations += 1
        return mapped(lambda name, t: self._own(name, t) if name in self._arrays else t.clone(), self.x)

    def _own(self, name: str, tensor: Tensor) -> Any:
        copy = tensor.detach().clone()
        return copy.numpy() if name in self._arrays else copy

    def point(self) -> Any:
        """Where ``x`` is, in the form of ``x0``."""
        return mapped(self._own, self.x)

    @torch.no_grad()
    def value(self, x: Any) -> float:
        """The function at a point, whatever it is."""
        self.evaluations += 1
        try:
            return check_loss(self._function(deepcopy(x)))  # which it may write into
        except NonFiniteLoss as error:
            return error.value


def _is_numeric(x0: Any) -> bool:
    return isinstance(x0, Real) or (isinstance(x0, Sequence) and len(x0) > 0 and all(isinstance(v, Real) for v in x0))
