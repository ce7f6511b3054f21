"""What the study's figures share."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zo_lightning.study.figures.style import panel_legend

SHORT = ("FO-AdaMM", "ZO-AdaMM")
LONG = ("FO-AdaMM", "FO-AdaMM, other order", "ZO-AdaMM", "PerExample")


@pytest.mark.parametrize("names", [SHORT, LONG])
@pytest.mark.parametrize("width", [4.0, 5.4, 12.6])
def test_a_legend_is_not_wider_than_its_figure(names: tuple[str, ...], width: float) -> None:
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        axes.plot([0, 1], marker="o", label=name)
    panel_legend(figure, [axes])
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
