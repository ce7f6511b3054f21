"""What methods reach for what it costs: a figure for each task."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullFormatter

from zo_lightning.study.devices import unlike_devices
from zo_lightning.study.figures.style import label_panels, panel_legend, rows_of, style_at
from zo_lightning.study.runs_table import Runs
from zo_lightning.study.statistics import Interval, mean_interval

COSTS = {
    "passes": "forward passes of 128 examples",
    "flops": "floating-point operations of training",
    "seconds": "seconds of training",
}
MEASURES = {"accuracy": "test accuracy", "loss": "test loss"}


def measure_of(table: pd.DataFrame) -> str:
    """By what the runs of a task are compared: ``"accuracy"``, or ``"loss"`` where they have none."""
    return "accuracy" if table["accuracy"].notna().any() else "loss"


def costs_of(table: pd.DataFrame) -> list[str]:
    """What the costs of the runs of a task are compared by."""
    return [cost for cost in COSTS if cost != "seconds" or not unlike_devices(table)]


def middle_of(table: pd.DataFrame, measure: str) -> Interval:
    """The mean over seeds, with its 95 % interval."""
    return mean_interval(table[measure], bounds=(0, 1) if measure == "accuracy" else (0, np.inf))


def reached_by_cost(runs: Runs, task: str) -> Figure:
    """What each method reaches at a task: against passes, operations and seconds; of one budget alone, by method.

    Seconds are left out where the task's runs are of several devices.
    """
    table = rows_of(runs.table, task=task)
    figure = _by_method(runs, table) if table["budget"].nunique() == 1 else _by_cost(runs, table)
    for axes in figure.axes:  # each may be looked at alone
        axes.set_title(task, fontsize=9)
    return figure


def _by_cost(runs: Runs, table: pd.DataFrame) -> Figure:
    figure, costs = Figure(figsize=(12.6, 4.4), layout="constrained"), costs_of(table)
    panels: list[Axes] = list(figure.subplots(1, len(costs), sharey=True))
    measure, methods = measure_of(table), _present(runs, table)
    for axes, cost in zip(panels, costs, strict=True):
        for method in methods:
            by_budget = [at for _, at in rows_of(table, method=method).groupby("budget")]
            means = [middle_of(at, measure) for at in by_budget]
            spent = np.array([at[cost].mean() for at in by_budget])
            if np.isnan(spent).any():
                continue
            # Bars at the same place would hide each other.
            beside = 1.025 ** (methods.index(method) - (len(methods) - 1) / 2) if cost == "passes" else 1.0
            _points(axes, spent * beside, means, label=method, **style_at(runs.methods.index(method)))
        axes.set_xscale("log")
        _log_ticks(axes, sorted(set(table["budget"])) if cost == "passes" else None)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8, labelleft=True)
        label_panels([axes], COSTS[cost], MEASURES[measure])
    if measure == "loss":
        panels[0].set_yscale("log")
    panel_legend(figure, panels[:1], columns=5)
    return figure


def _by_method(runs: Runs, table: pd.DataFrame) -> Figure:
    """One budget is no axis: a row for each method, the best at the top, and what it has cost beside it."""
    measure = measure_of(table)
    means = {method: middle_of(rows_of(table, method=method), measure) for method in _present(runs, table)}
    ranked = sorted(means, key=lambda method: means[method].value, reverse=measure == "loss")
    figure = Figure(figsize=(12.6, 0.32 * len(ranked) + 1.2), layout="constrained")
    costs = costs_of(table)[1:]
    panels: list[Axes] = list(figure.subplots(1, 1 + len(costs)))
    places = np.arange(len(ranked))
    for place, method in enumerate(ranked):
        style = style_at(runs.methods.index(method))
        one = means[method]
        bars = None if np.isnan(one.low) else [[one.value - one.low], [one.high - one.value]]
        panels[0].errorbar([one.value], [place], xerr=bars, capsize=3, **{**style, "ls": "none"})
        for axes, cost in zip(panels[1:], costs, strict=True):
            spent = rows_of(table, method=method)[cost].mean()
            if np.isfinite(spent):
                axes.barh([place], [spent], height=0.6, color=style["color"])
    for axes, label in zip(panels, (MEASURES[measure], *(COSTS[cost] for cost in costs)), strict=True):
        axes.set_yticks(places, ranked, fontsize=8)
        axes.set_ylim(-0.6, len(ranked) - 0.4)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, axis="x")
    for axes in panels[1:]:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    return figure


def _points(axes: Axes, x: np.ndarray, means: list[Interval], **style: Any) -> None:
    value = np.array([one.value for one in means])
    bounds = np.array([[one.value - one.low, one.high - one.value] for one in means]).T
    bars = None if np.isnan(bounds).all() else np.nan_to_num(bounds)
    axes.errorbar(x, value, bars, capsize=2.5, elinewidth=1, lw=1.3, ms=5, **style)


def _log_ticks(axes: Axes, at: list[int] | None) -> None:
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high < 30 * low else (1, 3) if high < 3000 * low else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps) if at is None else FixedLocator(at))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _present(runs: Runs, table: pd.DataFrame) -> list[str]:
    return [method for method in runs.methods if method in set(table["method"])]
