"""Figures of the minima: the line between two, and the rise of the loss around each."""

import pandas as pd
from matplotlib.figure import Figure

from zo_lightning.study.figures.style import (
    SIZE,
    NothingToDraw,
    aside,
    band,
    finish,
    label_panels,
    panel_grid,
    panel_legend,
    plain_log_ticks,
    rows_of,
    size_title,
    style_of,
)
from zo_lightning.study.results import Results
from zo_lightning.study.statistics import over_seeds


def minima_line(results: Results, line: pd.DataFrame, quantity: str) -> Figure:
    """Loss or accuracy on the straight line from the reference's minimum (0) to a method's (1); a panel per size."""
    if line.empty:
        raise NothingToDraw("no two runs of the same task and seed have their last weights")
    figure, panels = panel_grid(results)
    for axes, (task, d) in zip(panels, results.tasks.items(), strict=True):
        for method in results.others:
            own = rows_of(line, method=method, task=task)
            if not own.empty:
                curve = over_seeds(own, quantity, by="position")
                band(
                    axes,
                    curve["position"].to_numpy(float),
                    curve,
                    label=method,
                    **style_of(results, method),
                    markevery=5,
                )
        for end in (0, 1):
            axes.axvline(end, color="grey", lw=0.8, ls=":")
        axes.set_title(size_title(task, d), fontsize=9)
    if quantity == "loss":
        panels[0].set_yscale("log")  # of all panels: they share the axis
        plain_log_ticks(panels[0].yaxis)
    label = "training loss [nats]" if quantity == "loss" else "training accuracy"
    label_panels(panels, f"position on the line (0: {results.study.reference}, 1: the other method)", label)
    panel_legend(figure, panels)
    return figure


def sharpness_by_size(results: Results, around: pd.DataFrame) -> Figure:
    """By how much noise on the weights raises the training loss, where each method has ended, against d."""
    if around.empty:
        raise NothingToDraw("no run has its last weights")
    figure = Figure(figsize=(5.4, 4), layout="constrained")
    axes = figure.subplots()
    for method in results.methods:
        beside = aside(results, method)
        curve = over_seeds(rows_of(around, method=method), "increase", by="d")
        if not curve.empty:
            error = None if curve["std"].isna().all() else curve["std"].fillna(0)
            axes.errorbar(
                curve["d"] * beside, curve["mean"], error, label=method, capsize=3, ms=5, **style_of(results, method)
            )
    axes.set(xscale="log", xlabel=SIZE, ylabel="rise of the training loss [nats]")
    finish(axes, outside=figure)
    return figure
