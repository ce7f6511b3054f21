"""Which learning rate: short trainings from one start, ever fewer and ever longer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Train = Callable[[float, int], float]
"""Trains with a learning rate, over so many batches; the loss on batches held out, infinite where it diverged."""

GRID = tuple(float(f"{10 ** (k / 2):.2g}") for k in range(-10, 1))
"""The first learning rates, from 1e-5 to 1."""
_FINER = 10 ** (1 / 4)
_SHARES = (4, 2, 1)
_COUNTS = (len(GRID), 5, 3)
TRIALS = sum(_COUNTS)
"""In a sweep, at least."""
_FURTHER = 4
_EXPONENT = 0.28


@dataclass(frozen=True)
class Trial:
    """A short training: its learning rate, its batches, and the loss that it came to on those held out."""

    lr: float
    steps: int
    loss: float


def cost(steps: int) -> int:
    """The batches that a sweep trains on, at least."""
    return sum(rates * max(1, steps // share) for rates, share in zip(_COUNTS, _SHARES, strict=True))


def sweep(train: Train, steps: int) -> list[Trial]:
    """Successive halving (Jamieson & Talwalkar 2016) on a grid of learning rates that gets finer.

    First 1e-5 to 1 in half decades, each on a quarter of the steps; then five a quarter of a decade apart around the
    best, on half; then the best of these and its neighbours, on all, and up to four more where the best is at the edge.
    Every training begins anew, and its learning rate falls as that of a whole run does.
    """
    trials: list[Trial] = []

    def best_of(rates: Sequence[float], share: int) -> float:
        length = max(1, steps // share)
        found = [Trial(lr, length, train(lr, length)) for lr in rates]
        trials.extend(found)
        return min(found, key=lambda trial: trial.loss).lr

    best = best_of(GRID, _SHARES[0])
    best = best_of([best * _FINER**k for k in range(-2, 3)], _SHARES[1])
    tried = [best * _FINER**k for k in (-1, 0, 1)]
    best = best_of(tried, _SHARES[2])
    for _ in range(_FURTHER):
        longest = [trial for trial in trials if trial.steps == steps]
        if best == min(tried) or not any(math.isfinite(trial.loss) for trial in longest):
            further = min(tried) / _FINER
        elif best == max(tried):
            further = max(tried) * _FINER
        else:
            break
        tried.append(further)
        trials.append(Trial(further, steps, train(further, steps)))
        best = min([*longest, trials[-1]], key=lambda trial: trial.loss).lr
    return trials


def best_of(trials: Sequence[Trial]) -> float | None:
    """The learning rate with the lowest loss among the longest trainings, by a parabola over the logarithm.

    None where all of these diverged.
    """
    steps = max(trial.steps for trial in trials)
    last = sorted((t for t in trials if t.steps == steps and math.isfinite(t.loss)), key=lambda trial: trial.lr)
    if not last:
        return None
    best = min(last, key=lambda trial: trial.loss)
    if best in (last[0], last[-1]):
        return best.lr
    place = last.index(best)
    around = last[place - 1 : place + 2]
    a, b, _ = np.polyfit([math.log(trial.lr) for trial in around], [trial.loss for trial in around], 2)
    return math.exp(-b / (2 * a))


def for_run(lr: float, steps: int, batches_in_run: int | None) -> float:
    """The learning rate for a run that is longer than the trainings it was found by.

    The best one gets smaller the longer a run has to average its noise: by the length to the power of -0.28, as
    measured on three of the study's methods (docs/tuning.md).
    """
    return lr if batches_in_run is None else lr * min(1.0, steps / max(1, batches_in_run)) ** _EXPONENT
