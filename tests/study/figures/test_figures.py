"""All figures of a study."""

import pandas as pd
import pytest

from zo_lightning.study import figures
from zo_lightning.study.figures import NothingToDraw
from zo_lightning.study.results import Results


def test_nothing_to_draw_says_why(results: Results) -> None:
    empty = pd.DataFrame(columns=["method", "net", "d", "seed", "epoch", "layer", "cosine", "matched", "increase"])
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
