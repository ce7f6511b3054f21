"""How the weights of two methods compare."""

import numpy as np
import pytest

from zo_lightning.study.results import Results
from zo_lightning.study.weights import filter_paths, first_filters, similarity


def test_similarity_begins_with_the_same_weights(results: Results) -> None:
    similar = similarity(results)
    start = similar[similar["epoch"] == 0]
    assert start["cosine"].to_numpy() == pytest.approx(np.ones(len(start)))
    assert start["l2"].to_numpy() == pytest.approx(np.zeros(len(start)))
    later = similar[similar["epoch"] == 3]
    assert (later["l2"] > 0).all()
    assert set(later["layer"]) == {"all", "conv1", "conv2", "fc1", "fc2", "fc3"}
    convolutions = later.dropna(subset=["matched"])
    assert set(convolutions["layer"]) == {"conv1", "conv2"}
    assert (convolutions["matched"] >= convolutions["cosine"] - 1e-9).all()


def test_paths_and_first_filters(results: Results) -> None:
    paths = filter_paths(results, "ScalableCNN 1", 1)
    shapes = {layer: {path.run: path.filters.shape for path in runs} for layer, runs in paths.items()}
    assert shapes == {  # snapshots, filters, weights
        "conv1": {"FO-AdaMM": (4, 3, 25), "ZO-AdaMM": (4, 3, 25)},
        "conv2": {"FO-AdaMM": (4, 3, 27), "ZO-AdaMM": (4, 3, 27)},
    }
    assert paths["conv1"][0].epochs == [0, 1, 2, 3]
    assert {method: f.shape for method, f in first_filters(results, "ScalableCNN 1", 1).items()} == {
        "FO-AdaMM": (3, 1, 5, 5),
        "ZO-AdaMM": (3, 1, 5, 5),
    }
    assert filter_paths(results, "ScalableCNN 1", 99) == {}
