"""Learning rates of functions whose best one is known."""

import math

import pytest

from zo_lightning.tuning import rates


def descended(curvature: float):
    """The loss ½ h x² after gradient steps from 1 whose rate falls to 0: the first one alone reaches 0 at 1 / h."""

    def train(lr: float, steps: int) -> float:
        x = 1.0
        for step in range(steps):
            x -= lr * (1 - step / steps) * curvature * x
        return 0.5 * curvature * x**2 if abs(x) < 1e100 else math.inf

    return train


@pytest.mark.parametrize("curvature", [2.0, 30.0, 4e3])
def test_rate_of_a_quadratic(curvature: float) -> None:
    """Within the first step that reaches the minimum and twice that, beyond which the first steps diverge."""
    trials = rates.sweep(descended(curvature), 40)
    lr = rates.best_of(trials)
    assert lr is not None and 1 <= lr * curvature <= 2


@pytest.mark.parametrize("best", [3e-5, 1.7e-3, 0.2])
def test_parabola_gives_the_rate_between_the_tried_ones(best: float) -> None:
    trials = rates.sweep(lambda lr, steps: 1 + math.log(lr / best) ** 2, 100)
    assert rates.best_of(trials) == pytest.approx(best, rel=1e-6)


def test_trials_are_ever_fewer_and_longer() -> None:
    trials = rates.sweep(lambda lr, steps: abs(math.log(lr / 1e-2)), 80)
    lengths = [trial.steps for trial in trials]
    assert lengths == [20] * len(rates.GRID) + [40] * 5 + [80] * 3
    assert sum(lengths) == rates.cost(80) and len(trials) == rates.TRIALS


def test_diverged_trials_are_no_answer() -> None:
    trials = rates.sweep(lambda lr, steps: math.inf if lr > 1.1e-3 else -lr, 40)
    assert rates.best_of(trials) == pytest.approx(1e-3, rel=0.01)
    assert rates.best_of(rates.sweep(lambda lr, steps: math.inf, 40)) is None


def test_longer_runs_get_smaller_rates() -> None:
    assert rates.for_run(0.01, 300, None) == 0.01
    assert rates.for_run(0.01, 300, 100) == 0.01
    assert rates.for_run(0.01, 300, 30_000) == pytest.approx(0.01 * 100**-0.28)


def test_an_edge_is_gone_beyond() -> None:
    """Where longer trainings want a smaller rate than the shorter ones before."""
    trials = rates.sweep(lambda lr, steps: math.log(lr / (1e-1 / steps**0.8)) ** 2, 200)
    assert rates.best_of(trials) == pytest.approx(1e-1 / 200**0.8, rel=1e-6)
