"""Figures in parts, for a page that may be narrow."""

import re

import pytest
from matplotlib.figure import Figure

from zo_lightning.study import figures
from zo_lightning.study.figures.panels import legend, split
from zo_lightning.study.results import Results


def laid_out(figure: Figure) -> Figure:
    figure.canvas.draw()
    figure.set_layout_engine("none")
    return figure


def width(svg: bytes) -> float:
    found = re.search(rb'width="([\d.]+)pt"', svg)
    assert found
    return float(found[1])


def test_each_panel_is_alone_and_fits_a_narrow_screen(results: Results) -> None:
    for draw, count in (
        (lambda: figures.learning_curves(results, "val_loss"), len(results.tasks)),
        (lambda: figures.loss_ratios(results), 3),
        (lambda: figures.slowdown_exponent(results), 2),
        (lambda: figures.final_accuracy(results), 1),
        (lambda: figures.first_layer(results, 1), len(results.tasks)),
    ):
        figure = laid_out(draw())
        whole = figure.get_figwidth() * 72
        panels = split(figure)
        assert len(panels) == count
        for panel in panels:
            # 8 points are the smallest letters: on a screen 370 pixels wide they have 7.5 or more.
            assert 100 < width(panel) <= 8 / 7.5 * 370
            assert count == 1 or width(panel) < 1.2 * whole / min(count, 4)
        assert all(axes.get_visible() for axes in figure.axes)
        assert all(one.get_visible() for one in figure.legends)


def test_panels_keep_their_content(results: Results) -> None:
    whole, (panel, _) = laid_out(figures.learning_curves(results, "val_loss")), (b"", b"")
    first, second = split(whole)
    assert first.count(b"<path") > 10 and second.count(b"<path") > 10 and first != second
    assert panel == b""


def test_legend_is_text_with_its_lines(results: Results) -> None:
    samples = legend(figures.learning_curves(results, "val_loss"))
    assert [sample.label for sample in samples] == ["FO-AdaMM", "ZO-AdaMM"]
    assert len({sample.colour for sample in samples}) == len({sample.marks for sample in samples}) == 2
    assert all(sample.dashes == "" and sample.marks for sample in samples)
    assert [sample.dashes for sample in legend(figures.filter_trajectories(results, "conv1", 1))][-1] is None


@pytest.mark.parametrize("quantity", ["val_accuracy", "val_loss"])
def test_sizes_are_compared_on_one_axis(results: Results, quantity: str) -> None:
    limits = {axes.get_ylim() for axes in figures.learning_curves(results, quantity).axes if axes.get_visible()}
    assert len(limits) == 1
