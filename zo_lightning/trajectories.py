"""Where filters travel during training: their trajectories, and these in the plane."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Trajectory(NamedTuple):
    """The filters of one layer through one run.

    Attributes:
        run: a label.
        epochs: of the moments, [t].
        filters: at these moments, each as a vector, [t, n, k].
    """

    run: str
    epochs: list[int]
    filters: np.ndarray


def trajectories(
    run: str, history: Iterable[tuple[int, Mapping[str, Tensor]]], max_filters: int | None = None
) -> dict[str, Trajectory]:
    """The trajectory of every layer of a run.

    Args:
        run: its label.
        history: epochs with the layers' weights, [n, ...] by name.
        max_filters: filters of a layer, the first ones; None takes all.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for epoch, weights in history:
        for name, weight in weights.items():
            found.setdefault(name, {})[epoch] = weight[:max_filters].float().flatten(1).numpy()
    return {name: Trajectory(run, list(path), np.stack(list(path.values()))) for name, path in found.items()}


def pca(points: np.ndarray) -> np.ndarray:
    """Vectors [n, k] by their first two principal components, or what there is of them, [n, 2].

    A vector that is not finite is placed at NaN and left out of the rest.
    """

    def place(points: np.ndarray) -> np.ndarray:
        left, sizes, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
        plane = (left * sizes)[:, :2]
        return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))

    return _of_finite(points, place, at_least=1)


def tsne(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """Vectors [n, k] by t-SNE that starts from their PCA, [n, 2].

    All are at NaN where they are the same or fewer than four; a vector that is not finite is, and is left out.

    van der Maaten & Hinton, *Visualizing data using t-SNE*, 2008.
    """

    def place(points: np.ndarray) -> np.ndarray:
        from sklearn.manifold import TSNE  # slow to import

        if np.ptp(points, axis=0).max() == 0:
            return np.full((len(points), 2), np.nan)
        # Its PCA refuses vectors of one number; a second one that is always 0 changes no distance.
        points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))
        perplexity = min(30.0, (len(points) - 1) / 3)
        return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(points)

    return _of_finite(points, place, at_least=4)


def project(paths: Sequence[Trajectory], into: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """All filters at all moments in one embedding, such as ``pca`` or ``tsne``: [t, n, 2] for each trajectory."""
    plane = into(np.concatenate([path.filters.reshape(-1, path.filters.shape[-1]) for path in paths]))
    ends = np.cumsum([path.filters[..., 0].size for path in paths])
    parts = np.split(plane, ends[:-1])
    return [part.reshape(*path.filters.shape[:2], 2) for part, path in zip(parts, paths, strict=True)]


def draw(axes: Any, path: np.ndarray, start: Mapping[str, Any], end: Mapping[str, Any], **line: Any) -> None:
    """Draw the way of one filter in the plane, [t, 2], into matplotlib's ``Axes``, with its start and end marked.

    Args:
        axes: where.
        path: the way.
        start: properties of the mark at its start.
        end: properties of that at its end.
        line: properties of the line.
    """
    axes.plot(*path.T, marker=".", **line)
    axes.plot(*path[0], zorder=3, **start)
    axes.plot(*path[-1], zorder=4, **end)


def _of_finite(points: np.ndarray, place: Callable[[np.ndarray], np.ndarray], at_least: int) -> np.ndarray:
    placed, finite = np.full((len(points), 2), np.nan), np.isfinite(points).all(1)
    if finite.sum() >= at_least:
        placed[finite] = place(points[finite].astype(np.float64))
    return placed
