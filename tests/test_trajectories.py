from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from zo_lightning.trajectories import Trajectory, draw, pca, project, trajectories, tsne


def test_trajectories_by_layer_and_moment() -> None:
    moments = [(epoch, {"a": torch.full((3, 1, 2, 2), float(epoch)), "b": torch.zeros(2, 3)}) for epoch in (0, 5)]
    found = trajectories("run", [*moments, (9, {"b": torch.ones(2, 3, dtype=torch.bfloat16)})], max_filters=2)
    assert {name: (path.epochs, path.filters.shape) for name, path in found.items()} == {
        "a": ([0, 5], (2, 2, 4)),
        "b": ([0, 5, 9], (3, 2, 3)),
    }
    assert found["a"].run == "run"
    assert found["a"].filters[:, 1, 0].tolist() == [0.0, 5.0]


def test_pca_keeps_distances_in_a_plane() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(30, 2))
    turned = flat @ np.linalg.qr(rng.normal(size=(9, 9)))[0][:2] + 3
    distances = [np.linalg.norm(points[:, None] - points, axis=-1) for points in (flat, pca(turned))]
    assert distances[1] == pytest.approx(distances[0])
    assert pca(turned).var(0).argmax() == 0
    assert np.abs(pca(np.array([[1.0], [3.0]]))) == pytest.approx(np.array([[1.0, 0], [1, 0]]))  # no second one


def test_tsne_separates_and_is_reproducible() -> None:
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(0, 0.1, (20, 9)), rng.normal(5, 0.1, (20, 9))])
    placed = tsne(two)
    assert np.array_equal(placed, tsne(two))
    halves = np.split(placed, 2)
    centres = [half.mean(0) for half in halves]
    widest = max(np.linalg.norm(half - centre, axis=1).max() for half, centre in zip(halves, centres, strict=True))
    assert np.linalg.norm(centres[0] - centres[1]) > widest
    assert np.isnan(tsne(two[:3])).all()
    assert np.isnan(tsne(np.ones((10, 4)))).all()


def test_tsne_of_single_numbers() -> None:
    """Filters of a convolution from one channel, of one pixel."""
    placed = tsne(np.linspace(0, 1, 12)[:, None])
    assert np.isfinite(placed).all()


@pytest.mark.parametrize("into", [pca, tsne])
def test_what_is_not_finite_is_left_out(into: Callable[[np.ndarray], np.ndarray]) -> None:
    points = np.random.default_rng(0).normal(size=(12, 5))
    spoiled = np.insert(points, [0, 7], [[np.nan] * 5, [1, 2, np.inf, 4, 5]], axis=0)
    assert np.array_equal(np.delete(into(spoiled), [0, 8], axis=0), into(points))
    assert np.isnan(into(spoiled)[[0, 8]]).all()
    assert np.isnan(into(spoiled[:1])).all()


def test_one_embedding_for_all_trajectories() -> None:
    first = Trajectory("a", [0, 1], np.arange(12.0).reshape(2, 3, 2))
    other = Trajectory("b", [0], np.arange(4.0).reshape(1, 2, 2))
    planes = project([first, other], lambda points: points * 10)
    assert [plane.tolist() for plane in planes] == [(first.filters * 10).tolist(), (other.filters * 10).tolist()]


def test_a_way_has_a_start_and_an_end() -> None:
    axes = Figure().subplots()
    draw(axes, np.array([[0.0, 1], [2, 3], [4, 5]]), {"marker": "o"}, {"marker": "X"}, color="red")
    line, start, end = axes.lines
    assert (line.get_color(), start.get_marker(), end.get_marker()) == ("red", "o", "X")
    assert [np.asarray(one.get_xydata()).tolist() for one in axes.lines] == [
        [[0, 1], [2, 3], [4, 5]],
        [[0, 1]],
        [[4, 5]],
    ]
