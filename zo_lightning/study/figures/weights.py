"""Figures of the weights: how similar two methods' are, and where the filters have gone."""

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from zo_lightning.filters import filter_grid
from zo_lightning.measures import WHOLE
from zo_lightning.palette import COLOURS, MARKERS
from zo_lightning.study.figures.style import (
    SIZE,
    NothingToDraw,
    band,
    finish,
    label_panels,
    method_legend,
    panel_grid,
    panel_legend,
    rows_of,
    size_title,
    style_of,
    whole_epochs,
)
from zo_lightning.study.results import Results
from zo_lightning.study.statistics import over_seeds
from zo_lightning.study.weights import filter_paths, first_filters
from zo_lightning.trajectories import draw, project, tsne


def weight_similarity(results: Results, similar: pd.DataFrame, measure: str, method: str) -> Figure:
    """Cosine or L2 distance between a method's weights and the reference's, per layer and epoch; one panel per size."""
    own = rows_of(similar, method=method)
    if own.empty:
        raise NothingToDraw("no two runs of the same task and seed have weight snapshots")
    figure, panels = panel_grid(results)
    layers = list(dict.fromkeys(own["layer"]))
    for axes, (task, d) in zip(panels, results.tasks.items(), strict=True):
        for layer, colour, marker in zip(layers, cycle(COLOURS), cycle(MARKERS), strict=False):
            curve = over_seeds(rows_of(own, task=task, layer=layer), measure)
            if curve.empty:
                continue
            is_all = layer == WHOLE
            style = {"color": "black", "lw": 1.8} if is_all else {"color": colour, "lw": 1.1, "marker": marker, "ms": 3}
            label = "all weights" if is_all else layer
            band(axes, curve["epoch"].to_numpy(float), curve, label=label, markevery=max(1, len(curve) // 6), **style)
        axes.set_title(size_title(task, d), fontsize=9)
        whole_epochs(axes)
    name = {"cosine": "cosine similarity", "l2": "L2 distance"}[measure]
    label_panels(panels, "epoch (0: the same initialisation)", f"{name}, {method} and {results.study.reference}")
    panel_legend(figure, panels)
    return figure


def matched_similarity(results: Results, similar: pd.DataFrame, method: str) -> Figure:
    """Convolutions at the last snapshot: the cosine as it is, and after the best matching of filters, against d."""
    own = rows_of(similar, method=method).dropna(subset=["matched"])
    if own.empty:
        raise NothingToDraw("no two runs of the same task and seed have snapshots of a convolution")
    last = own[own["epoch"] == own.groupby(["task", "seed"])["epoch"].transform("max")]
    layers = list(dict.fromkeys(last["layer"]))
    figure = Figure(figsize=(4.2 * len(layers) + 1, 3.6), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False, sharey=True)[0], layers, strict=True):
        table = rows_of(last, layer=layer)
        for column, label, style in (  # often equal: the one drawn last lets the other be seen
            ("matched", "after matching", {"color": COLOURS[1], "marker": "s", "ms": 5, "lw": 1.4}),
            ("cosine", "filter by filter", {"color": COLOURS[0], "marker": "o", "ms": 9, "mfc": "none", "ls": "--"}),
        ):
            curve = over_seeds(table, column, by="d")
            error = None if curve["std"].isna().all() else curve["std"].fillna(0)
            axes.errorbar(curve["d"], curve["mean"], error, label=label, capsize=4, **style)
        axes.set(xscale="log", xlabel=SIZE, ylabel="cosine similarity (mean ± std)")
        axes.tick_params(labelleft=True)
        axes.set_title(f"{layer}: {method} and {results.study.reference}", fontsize=9)
        finish(axes)
    return figure


def filter_trajectories(results: Results, layer: str, seed: int) -> Figure:
    """t-SNE of a convolution's filters through training, all methods in one embedding; one panel per size."""
    figure, panels = panel_grid(results, share=False)
    drawn = False
    start: dict[str, Any] = {"ls": "none", "marker": "o", "mfc": "white", "mec": "black"}
    end: dict[str, Any] = {"ls": "none", "marker": "*", "mec": "black", "ms": 10}
    for axes, (task, d) in zip(panels, results.tasks.items(), strict=True):
        axes.set_title(size_title(task, d), fontsize=9)
        axes.set(xticks=[], yticks=[])
        paths = filter_paths(results, task, seed).get(layer, [])
        for path, plane in zip(paths, project(paths, tsne) if paths else [], strict=True):
            drawn = True
            colour = style_of(results, path.run)["color"]
            for way in plane.swapaxes(0, 1):
                draw(axes, way, {**start, "ms": 6}, {**end, "color": colour}, color=colour, lw=0.9, ms=2.5, alpha=0.8)
    if not drawn:
        raise NothingToDraw(f"no run of seed {seed} has weight snapshots of {layer}")
    label_panels(panels, "t-SNE dimension 1 (no unit)", "t-SNE dimension 2 (no unit)")
    method_legend(figure, results, {"start": start, "end": {**end, "color": "grey"}}, marker=".")
    return figure


def first_layer(results: Results, seed: int) -> Figure:
    """The first convolution's filters at the last snapshot as grey-scale images: a row per method, a block per size."""
    found = {task: first_filters(results, task, seed) for task in results.tasks}
    found = {task: filters for task, filters in found.items() if filters}
    if not found:
        raise NothingToDraw(f"no run of seed {seed} has weight snapshots of a convolution")
    shown = {task: min(8, max(len(f) for f in filters.values())) for task, filters in found.items()}
    columns = max(1, min(len(found), 12 // max(shown.values())))
    rows = -(-len(found) // columns)
    tile = 0.62
    size = (max(4.0, columns * (tile * max(shown.values()) + 0.9)), rows * (tile * len(results.methods) + 0.6))
    figure = Figure(figsize=size, layout="constrained")
    blocks = np.array(figure.subfigures(rows, columns, squeeze=False)).ravel()
    for block, (task, filters) in zip(blocks, found.items(), strict=False):
        block.suptitle(size_title(task, results.tasks[task]), fontsize=8)
        column = block.subplots(len(results.methods), squeeze=False)[:, 0]
        for axes, method in zip(column, results.methods, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
            axes.set_ylabel(method, rotation=0, ha="right", va="center", fontsize=7)
            if method in filters:  # averaged over channels
                image = filter_grid(filters[method][: shown[task]].float().mean(1, keepdim=True), scale=None)[0]
                axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return figure
