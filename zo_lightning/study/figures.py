"""The study's figures, one function each: tables in, a figure out."""

from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from zo_lightning.measures import WHOLE
from zo_lightning.study.measures import common_epoch, exponent, exponents, final, mean_interval, over_seeds, ratios
from zo_lightning.study.results import Results, published_at
from zo_lightning.study.weights import embed, first_filters, trajectories

# Okabe and Ito's, for every kind of colour vision; beside it, markers and dashes tell the methods apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABELS = {
    "train_loss": "training loss [nats]",
    "val_loss": "validation loss [nats]",
    "val_accuracy": "validation accuracy",
    "epoch": "epoch",
    "forward_passes": "forward passes of a batch (backward = 2)",
    "flops": "floating-point operations of training steps",
    "seconds": "seconds of training steps",
}
SIZE = "number of weights d"


class NothingToDraw(Exception):
    """What a figure shows is not in the results; the message says what is missing."""


def learning_curves(results: Results, quantity: str, against: str = "epoch") -> Figure:
    """A quantity over training, one panel per size: mean ± standard deviation over seeds, published means thin."""
    figure, panels = _panels(results)
    published_drawn = False
    for axes, (net, d) in zip(panels, results.nets.items(), strict=True):
        for method in results.methods:
            runs = _of(results.table, method=method, net=net)
            if runs.empty:
                continue
            style = _style(results, method)
            if against == "epoch":
                curve = over_seeds(runs, quantity)
                x = curve["epoch"].to_numpy(float)
            else:  # runs differ in their seconds: the mean of both, epoch by epoch
                curve = over_seeds(runs, quantity)
                x = over_seeds(runs, against)["mean"].to_numpy(float)
            _band(axes, x, curve, label=method, **style)
            theirs = published_at(results, method, d)
            if against == "epoch" and not theirs.empty:
                axes.plot(theirs["epoch"], theirs[f"{quantity}_mean"], color=style["color"], lw=0.9, ls=":", zorder=1)
                published_drawn = True
        axes.set_title(_size_title(net, d), fontsize=9)
        if "loss" in quantity:
            axes.set_yscale("log")
            _plain_log_ticks(axes.yaxis)
        if against == "epoch":
            _whole_epochs(axes)
        else:
            axes.set_xscale("log")
            _plain_log_ticks(axes.xaxis, (1, 2, 5))
    _share_labels(figure, LABELS[against], LABELS[quantity])
    extra = {"published (mean of 10)": {"color": "grey", "lw": 0.9, "ls": ":"}} if published_drawn else {}
    _method_legend(figure, results, extra)
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
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    start, last = np.nan, 0
    for method in results.others:
        own = _of(compared, method=method)
        if own["d"].nunique() < 2:
            continue
        style = _style(results, method)
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
        left.plot(then["d"], then["ratio"], color="grey", lw=0.9, ls=":", marker=".", label=label, zorder=1)
    left.set(xscale="log", yscale="log", xlabel=SIZE, ylabel=f"validation loss: method / {results.study.reference}")
    _plain_log_ticks(left.yaxis)
    left.set_title("after the last epoch that all runs have", fontsize=9)
    right.axhline(0.5, color="black", ls="--", lw=1)
    right.axhline(0, color="grey", lw=0.8)
    right.set(xlabel="epoch", ylabel="exponent α")
    right.set_title("band: 95 % bootstrap over seeds; dashed: 1/2", fontsize=9)
    _whole_epochs(right)
    _finish(left)
    _finish(right)
    return figure


def final_accuracy(results: Results) -> Figure:
    """Validation accuracy after the last epoch against d: every seed, and the 95 % interval of the mean."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    last = final(results.table)
    for method in results.methods:
        own, style = _of(last, method=method), _style(results, method)
        beside = _beside(results, method)
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
    axes.set_title("bars: 95 % interval of the mean over seeds; dots: seeds" + _dotted(results), fontsize=9)
    _finish(axes, outside=figure)
    return figure


def epoch_time(results: Results) -> Figure:
    """Seconds of an epoch's training steps against d, median over epochs and seeds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method in results.methods:
        own, style = _of(results.table, method=method), _style(results, method)
        middle = own.groupby("d")["epoch_seconds"].quantile(np.array([0.1, 0.5, 0.9])).unstack()
        axes.plot(middle.index, middle[0.5], label=method, ms=5, **style)
        axes.fill_between(middle.index, middle[0.1], middle[0.9], color=style["color"], alpha=0.2, lw=0)
        theirs = _published_last(results, method)
        if not theirs.empty:
            axes.plot(theirs["d"], theirs["epoch_seconds_mean"], color=style["color"], lw=0.9, ls=":", zorder=1)
    axes.set(xscale="log", yscale="log", xlabel=SIZE, ylabel="seconds per epoch")
    _plain_log_ticks(axes.yaxis)
    axes.set_title("line: median over epochs and seeds; band: 10 % to 90 %" + _dotted(results), fontsize=9)
    _finish(axes, outside=figure)
    return figure


def weight_similarity(results: Results, similar: pd.DataFrame, measure: str, method: str) -> Figure:
    """Cosine or L2 distance between a method's weights and the reference's, per layer and epoch; one panel per size."""
    own = _of(similar, method=method)
    if own.empty:
        raise NothingToDraw("no two runs of the same net and seed have weight snapshots")
    figure, panels = _panels(results)
    layers = list(dict.fromkeys(own["layer"]))
    for axes, (net, d) in zip(panels, results.nets.items(), strict=True):
        for layer, colour, marker in zip(layers, cycle(COLOURS), cycle(MARKERS), strict=False):
            curve = over_seeds(_of(own, net=net, layer=layer), measure)
            if curve.empty:
                continue
            is_all = layer == WHOLE
            style = {"color": "black", "lw": 1.8} if is_all else {"color": colour, "lw": 1.1, "marker": marker, "ms": 3}
            label = "all weights" if is_all else layer
            _band(axes, curve["epoch"].to_numpy(float), curve, label=label, markevery=max(1, len(curve) // 6), **style)
        axes.set_title(_size_title(net, d), fontsize=9)
        _whole_epochs(axes)
    name = {"cosine": "cosine similarity", "l2": "L2 distance"}[measure]
    _share_labels(figure, "epoch (0: the same initialisation)", f"{name}, {method} and {results.study.reference}")
    _legend_below(figure, panels)
    return figure


def matched_similarity(results: Results, similar: pd.DataFrame, method: str) -> Figure:
    """Convolutions at the last snapshot: the cosine as it is, and after the best matching of filters, against d."""
    own = _of(similar, method=method).dropna(subset=["matched"])
    if own.empty:
        raise NothingToDraw("no two runs of the same net and seed have snapshots of a convolution")
    last = own[own["epoch"] == own.groupby(["net", "seed"])["epoch"].transform("max")]
    layers = list(dict.fromkeys(last["layer"]))
    figure = Figure(figsize=(4.2 * len(layers) + 1, 3.6), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        table = _of(last, layer=layer)
        for column, label, style in (  # often equal: the one drawn last lets the other be seen
            ("matched", "after matching", {"color": COLOURS[1], "marker": "s", "ms": 5, "lw": 1.4}),
            ("cosine", "filter by filter", {"color": COLOURS[0], "marker": "o", "ms": 9, "mfc": "none", "ls": "--"}),
        ):
            curve = over_seeds(table, column, by="d")
            error = None if curve["std"].isna().all() else curve["std"].fillna(0)
            axes.errorbar(curve["d"], curve["mean"], error, label=label, capsize=4, **style)
        axes.set(xscale="log", xlabel=SIZE, ylabel="cosine similarity (mean ± std)")
        axes.set_title(f"{layer}: {method} and {results.study.reference}", fontsize=9)
        _finish(axes)
    return figure


def filter_trajectories(results: Results, layer: str, seed: int) -> Figure:
    """t-SNE of a convolution's filters through training, all methods in one embedding; one panel per size."""
    figure, panels = _panels(results)
    drawn = False
    for axes, (net, d) in zip(panels, results.nets.items(), strict=True):
        axes.set_title(_size_title(net, d), fontsize=9)
        axes.set(xticks=[], yticks=[])
        table = trajectories(results, net, seed).get(layer)
        if table is None:
            continue
        drawn = True
        weights = table.drop(columns=["method", "epoch", "filter"]).to_numpy()
        for (method, _), path in table.assign(**dict(zip("xy", embed(weights).T, strict=True))).groupby(
            ["method", "filter"]
        ):
            path = path.sort_values("epoch")
            style = _style(results, str(method))
            axes.plot(path["x"], path["y"], color=style["color"], lw=0.9, marker=".", ms=2.5, alpha=0.8)
            axes.plot(path["x"].iloc[0], path["y"].iloc[0], "o", mfc="white", mec="black", ms=6, zorder=3)
            axes.plot(
                path["x"].iloc[-1], path["y"].iloc[-1], marker="*", color=style["color"], mec="black", ms=10, zorder=4
            )
    if not drawn:
        raise NothingToDraw(f"no run of seed {seed} has weight snapshots of {layer}")
    _share_labels(figure, "t-SNE dimension 1 (no unit)", "t-SNE dimension 2 (no unit)")
    ends = {
        "start": {"ls": "none", "marker": "o", "mfc": "white", "mec": "black"},
        "end": {"ls": "none", "marker": "*", "color": "grey", "mec": "black", "ms": 10},
    }
    _method_legend(figure, results, ends, marker=".")
    return figure


def first_layer(results: Results, seed: int) -> Figure:
    """The first convolution's filters at the last snapshot as grey-scale images: a row per method, a block per size."""
    found = {net: first_filters(results, net, seed) for net in results.nets}
    found = {net: filters for net, filters in found.items() if filters}
    if not found:
        raise NothingToDraw(f"no run of seed {seed} has weight snapshots of a convolution")
    shown = {net: min(8, max(len(f) for f in filters.values())) for net, filters in found.items()}
    columns = max(1, min(len(found), 12 // max(shown.values())))
    rows = -(-len(found) // columns)
    tile = 0.62
    size = (max(4.0, columns * (tile * max(shown.values()) + 0.9)), rows * (tile * len(results.methods) + 0.6))
    figure = Figure(figsize=size, layout="constrained")
    blocks = np.array(figure.subfigures(rows, columns, squeeze=False)).ravel()
    for block, (net, filters) in zip(blocks, found.items(), strict=False):
        block.suptitle(_size_title(net, results.nets[net]), fontsize=8)
        grid = block.subplots(len(results.methods), shown[net], squeeze=False)
        for row, method in zip(grid, results.methods, strict=True):
            for axes in row:
                axes.set(xticks=[], yticks=[])
                axes.set_frame_on(False)
            row[0].set_ylabel(method, rotation=0, ha="right", va="center", fontsize=7)
            for axes, image in zip(row, _grey(filters.get(method)), strict=False):
                axes.imshow(image, cmap="gray")
    return figure


def minima_line(results: Results, line: pd.DataFrame, quantity: str) -> Figure:
    """Loss or accuracy on the straight line from the reference's minimum (0) to a method's (1); a panel per size."""
    if line.empty:
        raise NothingToDraw("no two runs of the same net and seed have their last weights")
    figure, panels = _panels(results)
    for axes, (net, d) in zip(panels, results.nets.items(), strict=True):
        for method in results.others:
            own = _of(line, method=method, net=net)
            if not own.empty:
                curve = over_seeds(own, quantity, by="position")
                _band(
                    axes, curve["position"].to_numpy(float), curve, label=method, **_style(results, method), markevery=5
                )
        for end in (0, 1):
            axes.axvline(end, color="grey", lw=0.8, ls=":")
        axes.set_title(_size_title(net, d), fontsize=9)
        if quantity == "loss":
            axes.set_yscale("log")
            _plain_log_ticks(axes.yaxis)
    label = "training loss [nats]" if quantity == "loss" else "training accuracy"
    _share_labels(figure, f"position on the line (0: {results.study.reference}, 1: the other method)", label)
    _legend_below(figure, panels)
    return figure


def sharpness_by_size(results: Results, around: pd.DataFrame) -> Figure:
    """By how much noise on the weights raises the training loss, where each method has ended, against d."""
    if around.empty:
        raise NothingToDraw("no run has its last weights")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method in results.methods:
        beside = _beside(results, method)
        curve = over_seeds(_of(around, method=method), "increase", by="d")
        if not curve.empty:
            error = None if curve["std"].isna().all() else curve["std"].fillna(0)
            axes.errorbar(
                curve["d"] * beside, curve["mean"], error, label=method, capsize=3, ms=5, **_style(results, method)
            )
    axes.set(xscale="log", xlabel=SIZE, ylabel="rise of the training loss [nats]")
    axes.set_title("under noise of 10 % of each filter's norm; mean ± standard deviation over seeds", fontsize=9)
    _finish(axes, outside=figure)
    return figure


def _by_size(results: Results, titles: Mapping[str, str], label: str) -> Figure:
    compared = _compared(results)
    methods = [method for method in results.others if method in set(compared["method"])]
    size = (4.2 * len(titles) + 1.2, 3.2 * len(methods) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(methods), len(titles), squeeze=False, sharex=True)
    colours = _size_colours(results)
    published_drawn = False
    for row, method in zip(grid, methods, strict=True):
        for axes, (column, title) in zip(row, titles.items(), strict=True):
            for net, d in results.nets.items():
                curve = over_seeds(_of(compared, method=method, net=net), column)
                if curve.empty:
                    continue
                _band(axes, curve["epoch"].to_numpy(float), curve, color=colours[net], label=f"d = {d:,}")
                theirs = _published_ratio(results, column, d) if method == "ZO-AdaMM" else pd.DataFrame()
                if not theirs.empty:
                    axes.plot(theirs["epoch"], theirs["ratio"], color=colours[net], lw=0.9, ls=":", zorder=1)
                    published_drawn = True
            axes.set_yscale("log")
            _plain_log_ticks(axes.yaxis)
            axes.set_title(title.format(method=method), fontsize=8)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
        _whole_epochs(axes)
    handles, names = grid[0][0].get_legend_handles_labels()
    title = "published: dotted" if published_drawn else None
    figure.legend(handles, names, loc="outside right center", fontsize=8, title=title, title_fontsize=8)
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
    for size in [d] if d is not None else results.nets.values():
        fo, zo = (published_at(results, method, size).set_index("epoch")[[name]] for method in ("FO-AdaMM", "ZO-AdaMM"))
        if fo.empty or zo.empty:
            continue
        ratio = fo[name] / zo[name] if "accuracy" in name else zo[name] / fo[name]
        scale = np.sqrt(size) if column.startswith("k_") else 1.0
        rows.append(pd.DataFrame({"d": size, "epoch": ratio.index, "ratio": ratio.to_numpy() / scale}))
    return pd.concat(rows, ignore_index=True) if rows else empty


def _published_last(results: Results, method: str) -> pd.DataFrame:
    found = [published_at(results, method, d).tail(1) for d in results.nets.values()]
    found = [table for table in found if not table.empty]
    return pd.concat(found) if found else pd.DataFrame()


def _dotted(results: Results) -> str:
    drawn = any(not _published_last(results, method).empty for method in results.methods)
    return "; dotted: published, same epoch" if drawn else ""


def _of(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def _style(results: Results, method: str) -> dict[str, Any]:
    index = list(results.study.methods).index(method)
    return {"color": next(islice(cycle(COLOURS), index, None)), "marker": next(islice(cycle(MARKERS), index, None))}


def _beside(results: Results, method: str) -> float:
    """A factor that moves a method's points a little aside: bars at the same size would hide each other."""
    return float(1.06 ** (results.methods.index(method) - (len(results.methods) - 1) / 2))


def _size_colours(results: Results) -> dict[str, Any]:
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(results.nets)))
    return dict(zip(results.nets, colours, strict=True))


def _size_title(net: str, d: int) -> str:
    return f"{net.partition(' ')[0]}, d = {d:,}"


def _panels(results: Results) -> tuple[Figure, list[Axes]]:
    count = len(results.nets)
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(5.5, 3.1 * columns), 2.6 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[:count]:
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    return figure, list(grid[:count])


def _band(axes: Axes, x: np.ndarray, curve: pd.DataFrame, **style: Any) -> None:
    style = {"lw": 1.4, "ms": 3.5, "markevery": max(1, len(x) // 6), **style}
    axes.plot(x, curve["mean"], **style)
    if curve["std"].notna().any():
        low, high = curve["mean"] - curve["std"], curve["mean"] + curve["std"]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, lw=0)


def _share_labels(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)


def _method_legend(figure: Figure, results: Results, extra: Mapping[str, Any], **override: Any) -> None:
    from matplotlib.lines import Line2D

    entries = {method: {**_style(results, method), "ms": 4, **override} for method in results.methods}
    entries |= extra
    handles = [Line2D([], [], label=label, **style) for label, style in entries.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9)


def _legend_below(figure: Figure, panels: list[Axes]) -> None:
    entries = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(7, len(entries)), fontsize=9)


def _finish(axes: Axes, outside: Figure | None = None) -> None:
    axes.grid(alpha=0.3)
    if outside is None:
        axes.legend(fontsize=8)
    else:
        handles, names = axes.get_legend_handles_labels()
        outside.legend(handles, names, loc="outside right center", fontsize=8)


def _whole_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _plain_log_ticks(axis: Any, steps: tuple[float, ...] = (1, 1.5, 2, 3, 5, 7)) -> None:
    """Numbers such as 0.3 in place of powers; within a decade at all ``steps``."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    if high < 2 * low:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=steps if high < 10 * low else (1, 3)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _grey(filters: Tensor | None) -> list[np.ndarray]:
    """Filters [n, channels, height, width] as images, averaged over channels; none where there are no filters."""
    return [] if filters is None else [image.mean(0).numpy() for image in filters]
