import doctest
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from zo_lightning import Backprop, BlackBox, ForwardGradient, Rademacher, ZerothOrder, minimization, minimize

QUICK = {"estimator": ZerothOrder(samples=2, seed=0), "steps": 200}


def squares(x: Any) -> Any:
    """The sum of squares of all numbers, less 1."""
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else [x]
    return sum(((part - 1) ** 2).sum() for part in parts)


@pytest.mark.parametrize(
    "x0",
    [
        0,
        0.5,
        [0, 0.5],
        np.zeros((2, 2)),
        np.zeros(2, dtype=np.float32),
        np.array([3, 4]),
        torch.zeros(2, dtype=torch.float64),
        [np.zeros(1), torch.zeros(2)],
        {"a": torch.zeros(()), "b": np.zeros(2)},
    ],
    ids=str,
)
def test_the_function_takes_and_the_result_is_what_the_start_is(x0: Any) -> None:
    forms = set()

    def function(x: Any) -> Any:
        forms.add(str([(type(part), part.dtype, tuple(part.shape)) for part in parts(x)]))
        return squares(x)

    result = minimize(function, x0, **QUICK)
    forms.add(str([(type(part), part.dtype, tuple(part.shape)) for part in parts(result.x)]))
    assert len(forms) == 1
    assert all(float(abs(part - 1).max()) < 0.1 for part in parts(result.x))
    assert result.fun == pytest.approx(float(squares(result.x)))
    if not isinstance(x0, int | float):
        given = parts([np.asarray(x0)] if isinstance(x0, list) and not hasattr(x0[0], "shape") else x0)
        assert all(float(abs(part).max()) in (0.0, 0.5, 4.0) for part in given), "the start is not changed"


def parts(x: Any) -> list[Any]:
    return list(x.values()) if isinstance(x, dict) else x if isinstance(x, list) else [x]


def test_result_counts() -> None:
    result = minimize(lambda x: float(x @ x), np.ones(2), ZerothOrder(samples=3, seed=0), steps=10)
    assert (result.steps, result.skipped, len(result.history)) == (10, 0, 10)
    assert result.evaluations == 10 * 3 * 2 + 2
    assert result.message == "all 10 steps taken"


def test_the_best_point_is_returned() -> None:
    result = minimize(lambda x: float(x @ x), np.full(2, 0.1), **QUICK, optimizer=partial(torch.optim.SGD, lr=1.5))
    assert result.fun == pytest.approx(0.02) and result.x.tolist() == [0.1, 0.1]
    assert result.history[-1] > 1, "such a step overshoots"


def test_the_function_may_write_into_what_it_gets() -> None:
    def function(x: np.ndarray) -> float:
        value = float(x @ x)
        x[:] = math.nan
        return value

    expected = minimize(lambda x: float(x @ x), np.ones(2), **QUICK)
    result = minimize(function, np.ones(2), **QUICK)
    assert np.array_equal(result.x, expected.x)


@pytest.mark.parametrize("many", [{"workers": 3}, {"batched": True}, {}], ids=str)
def test_a_black_box_gives_the_same(many: dict[str, Any]) -> None:
    def outside(given: Any) -> Any:
        return [squares(x) for x in given] if isinstance(given, list) else squares(given)

    expected = minimize(squares, np.zeros(3), **QUICK)
    result = minimize(BlackBox(outside, **many), np.zeros(3), **QUICK)
    assert np.array_equal(result.x, expected.x)
    assert (result.evaluations, result.history) == (expected.evaluations, expected.history)


def test_losses_that_are_not_finite_are_skipped_and_counted() -> None:
    calls = 0

    def function(x: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        return math.nan if calls in (3, 10) else float(squares(x))

    result = minimize(function, np.zeros(2), **QUICK)
    assert result.skipped == 2 and np.isnan(result.history).sum() == 2 and result.steps == 200
    assert result.fun < 0.01


def test_a_function_that_is_never_finite_ends_the_search() -> None:
    result = minimize(lambda x: math.inf, [1.0], **QUICK)
    assert result.steps == result.skipped == 20
    assert result.message == "no finite loss in 20 steps in a row"
    assert result.fun == math.inf and result.x.tolist() == [1.0]


def test_callback_sees_every_step_and_may_end_it() -> None:
    seen = []

    def callback(result: Any) -> None:
        seen.append((result.steps, result.fun, result.x.copy()))
        if result.steps == 5:
            raise StopIteration

    result = minimize(squares, np.zeros(2), **QUICK, callback=callback)
    assert [steps for steps, _, _ in seen] == [1, 2, 3, 4, 5] and result.steps == 5
    assert result.message == "ended by the callback"
    assert tuple(fun for _, fun, _ in seen) == result.history
    assert seen[0][2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient(Rademacher(), samples=2, seed=0)])
def test_functions_of_tensors_may_have_their_derivatives_taken(estimator: Any) -> None:
    assert minimize(squares, torch.zeros(2), estimator, steps=200).fun < 1e-3
    with pytest.raises(ValueError, match="ZerothOrder needs values alone"):
        minimize(squares, np.zeros(2), estimator, steps=200)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        minimize(squares, np.zeros(2), steps=0)
    with pytest.raises(TypeError, match="parameter a must be"):
        minimize(squares, {"a": "b"})
    with pytest.raises(ValueError, match="the loss must be a number"):
        minimize(lambda x: None, np.zeros(2))


def test_progress_is_shown_on_demand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    minimize(squares, np.zeros(2), steps=2)
    assert capsys.readouterr().err == ""
    minimize(squares, np.zeros(2), steps=2, progress=True)
    assert "minimize" in capsys.readouterr().err


def test_example_of_the_docstring() -> None:
    result = doctest.testmod(minimization)
    assert result.attempted > 0 and result.failed == 0
