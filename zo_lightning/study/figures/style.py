"""What the study's figures share: colours and marks of the methods, panels of the sizes, legends and ticks."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from zo_lightning.palette import COLOURS, MARKERS, ordered
from zo_lightning.study.results import Results

SIZE = "number of weights d"


class NothingToDraw(Exception):
    """What a figure shows is not in the results; the message says what is missing."""


def rows_of(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The rows of a table in which the named columns have the given values."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def style_of(results: Results, method: str) -> dict[str, Any]:
    """The colour and the marker of a method, the same in every figure of the study."""
    return style_at(list(results.study.methods).index(method))


def style_at(index: int) -> dict[str, Any]:
    """The colour and the marker of the method at a place; where colours come again, they do so with other markers."""
    count = len(COLOURS)
    turn = index // count
    return {
        "color": COLOURS[index % count],
        "marker": MARKERS[(index + turn) % count],
        **({"ls": "--"} if turn else {}),
    }


def aside(results: Results, method: str) -> float:
    """A factor that moves a method's points a little aside: bars at the same size would hide each other."""
    return float(1.06 ** (results.methods.index(method) - (len(results.methods) - 1) / 2))


def size_colours(results: Results) -> dict[str, Any]:
    """A colour for each task, the darker the smaller."""
    return dict(zip(results.tasks, ordered(len(results.tasks)), strict=True))


def size_title(task: str, d: int) -> str:
    """The title of a task's panel: its name and its size."""
    return f"{task.partition(' ')[0]}, d = {d:,}"


def panel_grid(results: Results, share: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each task, smallest first; they have one vertical axis, or each has its own."""
    count = len(results.tasks)
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(4.0, 3.3 * columns), 2.8 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[:count]:
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8, labelleft=True)
    return figure, list(grid[:count])


def band(axes: Axes, x: np.ndarray, curve: pd.DataFrame, **style: Any) -> None:
    """Draw a mean over ``x``, and the standard deviation around it where there is one (columns of ``over_seeds``)."""
    style = {"lw": 1.4, "ms": 3.5, "markevery": max(1, len(x) // 6), **style}
    axes.plot(x, curve["mean"], **style)
    if curve["std"].notna().any():
        low, high = curve["mean"] - curve["std"], curve["mean"] + curve["std"]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, lw=0)


def label_panels(panels: list[Axes], x: str, y: str) -> None:
    """Label the axes of every panel, each of which may be looked at alone."""
    for axes in panels:
        axes.set_xlabel(x, fontsize=8)
        axes.set_ylabel(y, fontsize=8)


def method_legend(figure: Figure, results: Results, extra: Mapping[str, Any], **override: Any) -> None:
    """A legend above the panels: a line for each method, its style changed by ``override``, and ``extra`` lines."""
    entries = {method: {**style_of(results, method), "ms": 4, **override} for method in results.methods}
    entries |= extra
    handles = [Line2D([], [], label=label, **style) for label, style in entries.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=_columns(figure, entries), fontsize=9)


def panel_legend(figure: Figure, panels: list[Axes], extra: Mapping[str, Any] | None = None, columns: int = 7) -> None:
    """A legend above the panels of what is drawn in any of them, and of ``extra`` lines."""
    entries = {label: _line(h) for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    entries |= {label: Line2D([], [], **style) for label, style in (extra or {}).items()}
    ncols = min(columns, _columns(figure, entries))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=ncols, fontsize=9)


def finish(axes: Axes, outside: Figure | None = None) -> None:
    """Add the grid and the legend, which is in the axes or above them in the figure ``outside``."""
    axes.grid(alpha=0.3)
    if outside is None:
        axes.legend(fontsize=8)
    else:
        panel_legend(outside, [axes])


def _columns(figure: Figure, labels: Collection[str]) -> int:
    """How many entries of a legend stand side by side within a figure."""
    widest = 0.65 + 0.075 * max(map(len, labels), default=0)  # inches: the sample and the gaps, and letters of 9 points
    return max(1, min(len(labels), int(figure.get_figwidth() / widest)))


def _line(handle: Any) -> Any:
    return handle[0] if isinstance(handle, ErrorbarContainer) else handle


def whole_epochs(axes: Axes) -> None:
    """Ticks at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def plain_log_ticks(axis: Any, steps: tuple[float, ...] = (1, 1.5, 2, 3, 5, 7)) -> None:
    """Numbers such as 0.3 in place of powers; within a decade at all ``steps``."""
    low, high = axis.get_view_interval()
    if high < 2 * low:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=steps if high < 10 * low else (1, 3)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
