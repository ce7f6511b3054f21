"""Figures of training."""

from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib.figure import Figure

from zo_lightning.study import figures
from zo_lightning.study.results import Results, published, published_at


def drawn(results: Results, with_published: bool) -> Iterator[Figure]:
    if with_published:
        results = Results(results.study, results.folder, results.table, {}, published())
    for quantity in ("val_accuracy", "train_loss", "val_loss"):
        for against in ("epoch", "forward_passes", "flops", "seconds"):
            yield figures.learning_curves(results, quantity, against)
    for draw in ("loss_ratios", "slowdown", "slowdown_exponent", "final_accuracy", "epoch_time"):
        yield getattr(figures, draw)(results)


@pytest.mark.parametrize("with_published", [False, True])
def test_axes_have_names_and_methods_are_told_apart(results: Results, with_published: bool) -> None:
    for figure in drawn(results, with_published):
        shared = [text.get_text() for text in figure.texts]  # labels of all panels together
        for axes in filter(lambda a: a.get_visible(), figure.axes):
            place = axes.get_subplotspec()
            assert shared or axes.get_xlabel() or (place is not None and not place.is_last_row())
            assert axes.lines
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        named = {text.get_text() for legend in legends for text in legend.get_texts()}
        assert any("ZO-AdaMM" in name or name.startswith("d = ") for name in named)


def test_published_curves_are_drawn_at_their_size_only(results: Results) -> None:
    beside = Results(results.study, results.folder, results.table, {}, published())
    first, second = figures.learning_curves(beside, "val_accuracy").axes[:2]
    theirs = published_at(beside, "ZO-AdaMM", 1400)
    assert any(np.array_equal(line.get_ydata(), theirs["val_accuracy_mean"]) for line in first.lines)
    assert len(second.lines) == 2  # 10,602 is none of their sizes
    assert theirs["epoch"].tolist() == [1, 2, 3]  # no longer than the study's own runs
