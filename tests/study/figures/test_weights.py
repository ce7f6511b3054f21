"""Figures of the weights, and what all figures say where there is nothing to draw."""

import numpy as np
import pandas as pd
import pytest

from zo_lightning.study import figures
from zo_lightning.study.figures import NothingToDraw
from zo_lightning.study.results import Results
from zo_lightning.study.weights import first_filters


def test_nothing_to_draw_says_why(results: Results) -> None:
    empty = pd.DataFrame(columns=["method", "task", "d", "seed", "epoch", "layer", "cosine", "matched", "increase"])
    for draw in (
        lambda: figures.weight_similarity(results, empty, "cosine", "ZO-AdaMM"),
        lambda: figures.matched_similarity(results, empty, "ZO-AdaMM"),
        lambda: figures.filter_trajectories(results, "conv1", 99),
        lambda: figures.first_layer(results, 99),
        lambda: figures.minima_line(results, empty, "loss"),
        lambda: figures.sharpness_by_size(results, empty),
    ):
        with pytest.raises(NothingToDraw, match="no "):
            draw()


def test_first_layer_shows_the_filters_of_every_method_and_size(results: Results) -> None:
    panels = [axes for axes in figures.first_layer(results, 1).axes if axes.images]
    assert len(panels) == len(results.methods) * len(results.tasks)
    assert [axes.get_ylabel() for axes in panels] == results.methods * len(results.tasks)
    filters = first_filters(results, list(results.tasks)[0], 1)["ZO-AdaMM"].mean(1).numpy()
    side = filters.shape[-1]
    pixels = 48 // side  # of a weight's side
    shown = np.asarray(panels[1].images[0].get_array())
    for index, weights in enumerate(filters):
        left = 2 + index * (side * pixels + 2)
        tile = shown[2 : 2 + side * pixels : pixels, left : left + side * pixels : pixels]
        # each in its own range, to the rounding of float32
        assert tile == pytest.approx((weights - weights.min()) / np.ptp(weights), abs=1e-6)


def test_every_filter_has_a_way_in_its_methods_colour(results: Results) -> None:
    panels = figures.filter_trajectories(results, "conv1", 1).axes[: len(results.tasks)]
    for axes, net in zip(panels, results.tasks, strict=True):
        ways = [line for line in axes.lines if len(np.asarray(line.get_xdata())) == 4]  # snapshots
        assert len(ways) == sum(map(len, first_filters(results, net, 1).values()))
        assert len({line.get_color() for line in ways}) == len(results.methods)
