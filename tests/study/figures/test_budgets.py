"""Figures of what methods reach for what it costs."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from zo_lightning.study.figures.budgets import COSTS, reached_by_cost
from zo_lightning.study.runs_table import COLUMNS, Runs

METHODS = [f"method {index}" for index in range(10)]


def runs(*budgets: int, accuracy: float = 0.5) -> Runs:
    rows = [
        ("task", method, budget, seed, 10, accuracy + place / 100, 1.0 - place / 100, 1e9 * budget, budget, 1, 2.0, 0.1)
        for place, method in enumerate(METHODS)
        for budget in budgets
        for seed in (1, 2)
    ]
    return Runs("made", METHODS[0], pd.DataFrame([(*row, "cpu") for row in rows], columns=list(COLUMNS)))


def test_several_budgets_are_an_axis_in_each_cost() -> None:
    panels = reached_by_cost(runs(10, 100), "task").axes
    assert [axes.get_xlabel() for axes in panels] == list(COSTS.values())
    assert {axes.get_xscale() for axes in panels} == {"log"}
    assert {axes.get_title() for axes in panels} == {"task"}
    assert list(panels[0].get_xticks()) == [10, 100]
    assert all(len(axes.containers) == len(METHODS) for axes in panels)


def test_one_budget_has_no_axis_but_a_row_for_each_method() -> None:
    reached, operations, seconds = reached_by_cost(runs(10), "task").axes
    assert {axes.get_xscale() for axes in (reached, operations, seconds)} == {"linear"}
    assert [text.get_text() for text in reached.get_yticklabels()] == METHODS  # the best at the top
    assert len(operations.patches) == len(seconds.patches) == len(METHODS)


@pytest.mark.parametrize("budgets", [(10, 100), (10,)])
def test_seconds_of_several_devices_are_not_compared(budgets: tuple[int, ...]) -> None:
    one = runs(*budgets)
    mixed = replace(one, table=one.table.assign(device=np.where(one.table["seed"] == 1, "a processor", "a GPU")))
    shown = {axes.get_xlabel() for axes in reached_by_cost(mixed, "task").axes}
    assert {axes.get_xlabel() for axes in reached_by_cost(one, "task").axes} - shown == {COSTS["seconds"]}


def test_a_regression_is_compared_by_its_loss() -> None:
    several, one = (reached_by_cost(runs(*budgets, accuracy=np.nan), "task").axes[0] for budgets in ((10, 100), (10,)))
    assert several.get_ylabel() == one.get_xlabel() == "test loss"
    assert [text.get_text() for text in one.get_yticklabels()] == METHODS  # the lowest loss at the top


@pytest.mark.parametrize("budgets", [(10, 100), (10,)])
def test_methods_differ_in_colour_or_marker(budgets: tuple[int, ...]) -> None:
    panel = reached_by_cost(runs(*budgets), "task").axes[0]
    lines = [container.lines[0] for container in panel.containers]  # type: ignore[attr-defined]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(METHODS)
