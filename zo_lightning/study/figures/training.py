"""Figures of training: curves of losses, accuracies and ratios, the slowdown, and what an epoch takes."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from zo_lightning.study.devices import unlike_devices
from zo_lightning.study.figures.style import (
    SIZE,
    NothingToDraw,
    aside,
    band,
    finish,
    label_panels,
    method_legend,
    panel_grid,
    panel_legend,
    plain_log_ticks,
    rows_of,
    size_colours,
    size_title,
    style_of,
    whole_epochs,
)
from zo_lightning.study.results import Results, published_at
from zo_lightning.study.statistics import common_epoch, exponent, exponents, final, mean_interval, over_seeds, ratios

LABELS = {
    "train_loss": "training loss [nats]",
    "val_loss": "validation loss [nats]",
    "val_accuracy": "validation accuracy",
    "epoch": "epoch",
    "forward_passes": "forward passes of a batch (backward = 2)",
    "flops": "floating-point operations of training steps",
    "seconds": "seconds of training steps",
}


_DOTTED = {"published (mean of 10)": {"color": "dimgrey", "lw": 0.9, "ls": ":"}}
"""What legends say of the published curves."""


def learning_curves(results: Results, quantity: str, against: str = "epoch") -> Figure:
    """A quantity over training, one panel per size: mean ± standard deviation over seeds, published means dotted."""
    if against == "seconds":
        _check_seconds(results)
    figure, panels = panel_grid(results)
    published_drawn = False
    for axes, (task, d) in zip(panels, results.tasks.items(), strict=True):
        for method in results.methods:
            runs = rows_of(results.table, method=method, task=task)
            if runs.empty:
                continue
            style = style_of(results, method)
            if against == "epoch":
                curve = over_seeds(runs, quantity)
                x = curve["epoch"].to_numpy(float)
            else:  # runs differ in their seconds: the mean of both, epoch by epoch
                curve = over_seeds(runs, quantity)
                x = over_seeds(runs, against)["mean"].to_numpy(float)
            band(axes, x, curve, label=method, **style)
            theirs = published_at(results, method, d)
            if against == "epoch" and not theirs.empty:
                axes.plot(theirs["epoch"], theirs[f"{quantity}_mean"], color=style["color"], lw=0.9, ls=":", zorder=1)
                published_drawn = True
        axes.set_title(size_title(task, d), fontsize=9)
        if against == "epoch":
            whole_epochs(axes)
        else:
            axes.set_xscale("log")
            plain_log_ticks(axes.xaxis, (1, 2, 5))
    if "loss" in quantity:
        panels[0].set_yscale("log")  # of all panels: they share the axis
        plain_log_ticks(panels[0].yaxis)
    label_panels(panels, LABELS[against], LABELS[quantity])
    method_legend(figure, results, _DOTTED if published_drawn else {})
    return figure


def loss_ratios(results: Results) -> Figure:
    """Loss / Loss of the reference, and the inverse for accuracy, per epoch: one curve per size."""
    ref = results.study.reference
    titles = {
        "train_loss": f"training loss: {{method}} / {ref}",
        "val_loss": f"validation loss: {{method}} / {ref}",
        "val_accuracy": f"accuracy: {ref} / {{method}}",
    }
    return _by_size(results, titles, "ratio (1: as good)")


def slowdown(results: Results) -> Figure:
    """K = Loss / (Loss of the reference · √d) per epoch: the curves of all sizes meet if the slowdown is O(√d)."""
    ref = results.study.reference
    titles = {
        "k_train": f"training loss: {{method}} / ({ref} · √d)",
        "k_val": f"validation loss: {{method}} / ({ref} · √d)",
    }
    return _by_size(results, titles, "k")


def slowdown_exponent(results: Results) -> Figure:
    """The exponent α of Loss ratio ~ d^α: the fit at the last common epoch, and α over training."""
    compared = _compared(results)
    if compared["d"].nunique() < 2:
        raise NothingToDraw("an exponent needs two sizes at least")
    figure = Figure(figsize=(9.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    start, last = np.nan, 0
    for method in results.others:
        own = rows_of(compared, method=method)
        if own["d"].nunique() < 2:
            continue
        style = style_of(results, method)
        epoch = common_epoch(own)
        at = own[own["epoch"] == epoch]
        alpha = exponent(at["d"].to_numpy(), at["val_loss"].to_numpy())
        if np.isnan(alpha.value):  # a run has diverged
            continue
        left.plot(at["d"], at["val_loss"], ls="none", marker=style["marker"], color=style["color"], ms=4, alpha=0.7)
        d = np.array(sorted(at["d"].unique()), dtype=float)
        middle = np.exp(
            np.log(at["val_loss"]).groupby(at["d"]).mean().mean() + alpha.value * (np.log(d) - np.log(d).mean())
        )
        left.plot(d, middle, color=style["color"], label=f"{method}, epoch {epoch}: α = {alpha:.2f}")
        start, last = (middle[0], epoch) if np.isnan(start) else (start, max(last, epoch))
        trend = exponents(own, "val_loss")
        right.plot(trend["epoch"], trend["value"], color=style["color"], label=method)
        right.fill_between(trend["epoch"], trend["low"], trend["high"], color=style["color"], alpha=0.2, lw=0)
    if np.isnan(start):
        raise NothingToDraw("no method has finite losses at two sizes")
    d = np.array(sorted(compared["d"].unique()), dtype=float)
    left.plot(d, start * np.sqrt(d / d[0]), color="black", ls="--", lw=1, label="α = 1/2 (theory's bound)")
    theirs = _published_ratio(results, "val_loss")
    if not theirs.empty:
        then = theirs[theirs["epoch"] == min(last, int(theirs["epoch"].max()))]
        found = exponent(then["d"].to_numpy(), then["ratio"].to_numpy())
        label = f"ZO-AdaMM, published, epoch {then['epoch'].iloc[0]}: α = {found.value:.2f}"
        left.plot(then["d"], then["ratio"], color="dimgrey", lw=0.9, ls=":", marker=".", label=label, zorder=1)
    left.set(xscale="log", yscale="log", xlabel=SIZE, ylabel=f"validation loss: method / {results.study.reference}")
    low, high = left.get_ylim()
    left.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend above the marks
    plain_log_ticks(left.yaxis)
    right.axhline(0.5, color="black", ls="--", lw=1)
    right.axhline(0, color="grey", lw=0.8)
    right.set(xlabel="epoch", ylabel="exponent α")
    whole_epochs(right)
    finish(left)
    finish(right)
    return figure


def final_accuracy(results: Results) -> Figure:
    """Validation accuracy after the last epoch against d: every seed, and the 95 % interval of the mean."""
    figure = Figure(figsize=(5.4, 4), layout="constrained")
    axes = figure.subplots()
    last = final(results.table)
    for method in results.methods:
        own, style = rows_of(last, method=method), style_of(results, method)
        beside = aside(results, method)
        means = [(d, mean_interval(at["val_accuracy"], bounds=(0, 1))) for d, at in own.groupby("d")]
        d = np.array([d for d, _ in means], dtype=float) * beside
        value = np.array([m.value for _, m in means])
        bounds = np.array([[m.value - m.low, m.high - m.value] for _, m in means]).T
        bars = None if np.isnan(bounds).all() else np.nan_to_num(bounds)
        axes.errorbar(d, value, bars, capsize=3, lw=1.3, label=method, ms=5, **style)
        axes.plot(own["d"] * beside, own["val_accuracy"], ls="none", marker=".", ms=3, color=style["color"], alpha=0.6)
        theirs = _published_last(results, method)
        if not theirs.empty:
            axes.plot(theirs["d"], theirs["val_accuracy_mean"], color=style["color"], lw=0.9, ls=":", zorder=1)
    axes.set(xscale="log", xlabel=SIZE, ylabel="validation accuracy")
    finish(axes, outside=figure)
    return figure


def epoch_time(results: Results) -> Figure:
    """Seconds of an epoch's training steps against d, median over epochs and seeds."""
    _check_seconds(results)
    figure = Figure(figsize=(5.4, 4), layout="constrained")
    axes = figure.subplots()
    for method in results.methods:
        own, style = rows_of(results.table, method=method), style_of(results, method)
        middle = own.groupby("d")["epoch_seconds"].quantile(np.array([0.1, 0.5, 0.9])).unstack()
        axes.plot(middle.index, middle[0.5], label=method, ms=5, **style)
        axes.fill_between(middle.index, middle[0.1], middle[0.9], color=style["color"], alpha=0.2, lw=0)
        theirs = _published_last(results, method)
        if not theirs.empty:
            axes.plot(theirs["d"], theirs["epoch_seconds_mean"], color=style["color"], lw=0.9, ls=":", zorder=1)
    axes.set(xscale="log", yscale="log", xlabel=SIZE, ylabel="seconds per epoch")
    plain_log_ticks(axes.yaxis)
    finish(axes, outside=figure)
    return figure


def _check_seconds(results: Results) -> None:
    if apart := unlike_devices(results.table):
        raise NothingToDraw(apart[0].lower() + apart[1:].rstrip("."))


def _by_size(results: Results, titles: Mapping[str, str], label: str) -> Figure:
    compared = _compared(results)
    methods = [method for method in results.others if method in set(compared["method"])]
    size = (4.2 * len(titles), 3.2 * len(methods) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(methods), len(titles), squeeze=False, sharex=True, sharey="col")
    colours = size_colours(results)
    published_drawn = False
    for row, method in zip(grid, methods, strict=True):
        for axes, (column, title) in zip(row, titles.items(), strict=True):
            for task, d in results.tasks.items():
                curve = over_seeds(rows_of(compared, method=method, task=task), column)
                if curve.empty:
                    continue
                band(axes, curve["epoch"].to_numpy(float), curve, color=colours[task], label=f"d = {d:,}")
                theirs = _published_ratio(results, column, d) if method == "ZO-AdaMM" else pd.DataFrame()
                if not theirs.empty:
                    axes.plot(theirs["epoch"], theirs["ratio"], color=colours[task], lw=0.9, ls=":", zorder=1)
                    published_drawn = True
            axes.set_title(title.format(method=method), fontsize=8)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8, labelbottom=True)
    for axes in grid[0]:
        axes.set_yscale("log")  # of the whole column, which shares the axis
        plain_log_ticks(axes.yaxis)
        whole_epochs(axes)
    label_panels(list(grid.ravel()), "epoch", label)
    panel_legend(
        figure, [grid[0][0]], {"published": {"color": "dimgrey", "lw": 0.9, "ls": ":"}} if published_drawn else {}
    )
    return figure


def _compared(results: Results) -> pd.DataFrame:
    compared = ratios(results.table, results.study.reference)
    if compared.empty:
        raise NothingToDraw(f"no finished run of {results.study.reference} to compare another method with")
    return compared


def _published_ratio(results: Results, column: str, d: int | None = None) -> pd.DataFrame:
    """The ratio of the published means; the loss behind ``k`` is divided by √d."""
    empty = pd.DataFrame(columns=["d", "epoch", "ratio"])
    if results.published is None or results.study.reference != "FO-AdaMM":
        return empty
    name = {"k_train": "train_loss", "k_val": "val_loss"}.get(column, column) + "_mean"
    rows = []
    for size in [d] if d is not None else results.tasks.values():
        fo, zo = (published_at(results, method, size).set_index("epoch")[[name]] for method in ("FO-AdaMM", "ZO-AdaMM"))
        if fo.empty or zo.empty:
            continue
        ratio = fo[name] / zo[name] if "accuracy" in name else zo[name] / fo[name]
        scale = np.sqrt(size) if column.startswith("k_") else 1.0
        rows.append(pd.DataFrame({"d": size, "epoch": ratio.index, "ratio": ratio.to_numpy() / scale}))
    return pd.concat(rows, ignore_index=True) if rows else empty


def _published_last(results: Results, method: str) -> pd.DataFrame:
    found = [published_at(results, method, d).tail(1) for d in results.tasks.values()]
    found = [table for table in found if not table.empty]
    return pd.concat(found) if found else pd.DataFrame()
