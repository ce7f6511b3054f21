"""A loss, or its end, outside PyTorch: NumPy, a metric, another runtime, a simulator, a service."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_lightning.objective import as_tensor


class EvaluationFailed(RuntimeError):
    """A black box gave no loss, however often it was asked; its last exception is the ``__cause__``."""


@dataclass(frozen=True)
class BlackBox:
    """A function outside PyTorch that computes losses, asked again where it fails.

    ``box(output)`` is for any loss closure: tensors of ``output`` go in as NumPy arrays, detached, and the loss comes
    back as a tensor. ``box.after(front)`` is the closure ``lambda: box(front())`` that lets ``ZerothOrder`` do better:
    the part in PyTorch, ``front``, is run at all points of a step first, one after the other; then the box gets all of
    its outputs at once, for ``workers`` to work on side by side, or in one call if it is ``batched``.

    Threads are enough where the work is done elsewhere: in a service, a subprocess, a runtime that releases the
    interpreter's lock. Random numbers that the function draws from NumPy's or Python's global generator are the same at
    all points of a step with one worker; with more, or elsewhere, seed them in the function.

    Args:
        function: takes one candidate, what ``front`` returns with arrays in place of tensors, and returns its loss, or
            the loss of each example, [B]; if ``batched``, takes a list of candidates and returns the loss of each.
        batched: whether one call takes many candidates.
        retries: how often it is asked again after an exception, ≥ 0.
        timeout: seconds after which a call counts as failed; it is left behind in a thread of its own. None: it is
            waited for.
        workers: threads, ≥ 1.

    Raises:
        ValueError: an argument is out of its range, or one that is ``batched`` has workers.
        EvaluationFailed: in a call, where the function raised an exception or took too long, each time.
    """

    function: Callable[..., Any]
    batched: bool = False
    retries: int = 2
    timeout: float | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, got {self.retries}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.timeout is not None and self.timeout <= 0:
            raise ValueError(f"timeout must be more than 0 seconds, or None, got {self.timeout}")
        if self.batched and self.workers > 1:
            raise ValueError(f"batched=True calls the function once for all candidates: workers={self.workers} idle")

    def __call__(self, output: Any) -> Any:
        """The loss of one candidate."""
        return self.evaluate([to_numpy(output)])[0]

    def after(self, front: Callable[[], Any]) -> "BlackBoxLoss":
        """The loss closure ``box(front())``, which can be asked for many points at once.

        Args:
            front: all that the loss does with the weights: the function must not use them by itself.
        """
        return BlackBoxLoss(self, lambda: to_numpy(front()))

    def evaluate(self, candidates: Sequence[Any]) -> list[Any]:
        """The losses of some candidates, each a tensor, in their order.

        Raises:
            EvaluationFailed: the function gave none.
            ValueError: a batched one gave another number of losses.
        """
        n = len(candidates)
        if self.batched:
            losses = self._ask(candidates, f"all {n} candidates")
            if not isinstance(losses, Sequence | np.ndarray | Tensor) or len(losses) != n:
                got = f"{len(losses)}" if hasattr(losses, "__len__") else f"a {type(losses).__name__}"
                raise ValueError(f"a batched black box must return one loss for each of {n} candidates, got {got}")
            return [as_tensor(loss) for loss in losses]
        named = [f"candidate {k + 1} of {n}" for k in range(n)]
        if min(self.workers, n) == 1:
            return [as_tensor(self._ask(one, name)) for one, name in zip(candidates, named, strict=True)]
        with ThreadPoolExecutor(min(self.workers, n)) as pool:
            asked = [pool.submit(self._ask, one, name) for one, name in zip(candidates, named, strict=True)]
            try:
                return [as_tensor(one.result()) for one in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, candidate: Any, name: str) -> Any:
        call = partial(self.function, candidate)
        for attempt in range(self.retries + 1):
            try:
                return call() if self.timeout is None else _within(self.timeout, call)
            except Exception as error:
                if attempt < self.retries:
                    continue
                function = getattr(self.function, "__name__", type(self.function).__name__)
                raise EvaluationFailed(
                    f"{function} gave no loss for {name} in {attempt + 1} attempts, the last one: "
                    f"{type(error).__name__}: {error}"
                ) from error
        raise AssertionError


@dataclass(frozen=True)
class BlackBoxLoss:
    """A loss in two parts: one in PyTorch, whose passes see displaced weights, and a black box that takes its output.

    Args:
        box: computes the losses.
        front: runs the part in PyTorch, and returns what the box takes, in memory of its own.
    """

    box: BlackBox
    front: Callable[[], Any]

    def __call__(self) -> Any:
        """The loss at the present weights."""
        return self.box.evaluate([self.front()])[0]

    @property
    def takes_many(self) -> bool:
        """Whether the box gains from many candidates at once."""
        return self.box.batched or self.box.workers > 1


def to_numpy(value: Any) -> Any:
    """Copies of tensors as NumPy arrays, in lists and dictionaries too; bfloat16, which NumPy lacks, as float32."""
    if isinstance(value, Tensor):
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy().copy()
    if isinstance(value, Mapping):
        return {key: to_numpy(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_numpy(one) for one in value]
    return value


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns, or raises, in the given time.

    Raises:
        TimeoutError: it takes longer. It is left behind: a thread cannot be ended, but keeps no process alive.
    """
    answers: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    def answer() -> None:
        try:
            answers.put((True, call()))
        except BaseException as error:
            answers.put((False, error))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds} s")
    returned, value = answers.get()
    if returned:
        return value
    raise value
