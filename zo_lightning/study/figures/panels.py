"""A figure for a page: each panel by itself, and the legend as text, so that all can be read on a narrow screen."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

_MARGIN = 0.05  # inches around a panel


@dataclass(frozen=True)
class Sample:
    """What a legend shows of a line: colour, dashes as in SVG, and the outlines of its mark in a unit square."""

    label: str
    colour: str
    dashes: str | None
    fill: str
    marks: tuple[str, ...]


def split(figure: Figure) -> list[bytes]:
    """Each panel of a figure that has been laid out, as SVG: its subfigures, or its axes."""
    panels: list[Any] = list(figure.subfigs) or [axes for axes in figure.axes if axes.get_visible()]
    return [_alone(figure, panel, panels) for panel in panels]


def legend(figure: Figure) -> list[Sample]:
    """The entries of a figure's own legend; those of its axes are in their panels."""
    from matplotlib.colors import to_hex
    from matplotlib.markers import MarkerStyle

    samples = []
    for own in figure.legends:
        for line, text in zip(own.legend_handles, own.get_texts(), strict=True):
            assert isinstance(line, Line2D), f"the legend's '{text.get_text()}' is no line"
            style = MarkerStyle(line.get_marker() or "")
            path = style.get_path().transformed(style.get_transform())
            outlines: list[Any] = path.to_polygons()
            marks = tuple(" ".join(f"{x:.2f},{-y:.2f}" for x, y in outline) for outline in outlines)
            dashes = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "5 2 1 2"}.get(str(line.get_linestyle()))
            filled = to_hex(line.get_markerfacecolor())  # type: ignore[arg-type]
            samples.append(Sample(text.get_text(), to_hex(line.get_color()), dashes, filled, marks))
    return samples


def _alone(figure: Figure, panel: Any, panels: list[Any]) -> bytes:
    svg = io.BytesIO()
    inches = Bbox(panel.get_tightbbox().get_points() / figure.dpi)
    with _hidden([*(one for one in panels if one is not panel), *figure.legends, *figure.texts]):
        figure.savefig(svg, format="svg", metadata={"Date": None}, bbox_inches=inches.padded(_MARGIN))
    return svg.getvalue()


@contextmanager
def _hidden(artists: list[Any]) -> Iterator[None]:
    for one in artists:
        one.set_visible(False)
    try:
        yield
    finally:
        for one in artists:
            one.set_visible(True)
