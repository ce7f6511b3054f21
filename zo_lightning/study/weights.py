"""How the weights of two methods compare over training, read from the snapshots of their runs."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from zo_lightning.measures import WHOLE, cosine, l2_distance, matched
from zo_lightning.snapshots import Snapshot, read_snapshots
from zo_lightning.study.grid import Cell
from zo_lightning.study.results import Results

SIMILARITY = ("method", "net", "d", "seed", "epoch", "layer", "cosine", "l2", "matched")
Progress = Callable[[str], None]


def snapshots(run: Path) -> dict[int, Callable[[], dict[str, Tensor] | None]]:
    """Readers of a run's weights by the number of epochs done, 0 at initialisation; empty where there are none.

    A reader gives None where its snapshot is damaged.
    """
    try:
        return {shot.epoch: partial(_load, shot) for shot in read_snapshots(run) if not shot.within_epoch}
    except FileNotFoundError:
        return {}


def similarity(results: Results, progress: Progress = lambda what: None) -> pd.DataFrame:
    """Compare each method's weights with the reference's, of the same net and seed, wherever both have a snapshot.

    Rows are `SIMILARITY`: ``cosine`` and ``l2`` distance of each layer's weight, and under the layer ``"all"`` of all
    weights and biases as one vector; ``matched``, the cosine after the best one-to-one matching of filters, for
    convolutions only. A snapshot that is damaged is left out.
    """
    rows = []
    for cell, ref in pairs(results):
        progress(f"weights of {cell}")
        one, other = snapshots(results.folder / cell.folder), snapshots(results.folder / ref.folder)
        for epoch in sorted(one.keys() & other.keys()):
            a, b = one[epoch](), other[epoch]()
            if a is not None and b is not None:
                rows += _compared(a, b, cell, results.nets[cell.net], epoch)
    return pd.DataFrame(rows, columns=list(SIMILARITY))


def pairs(results: Results) -> Iterator[tuple[Cell, Cell]]:
    """Every finished cell of another method with the reference's of the same net and seed."""
    reference = {(cell.net, cell.seed): cell for cell in results.cells if cell.method == results.study.reference}
    for cell in results.cells:
        if cell.method != results.study.reference and (cell.net, cell.seed) in reference:
            yield cell, reference[cell.net, cell.seed]


def trajectories(results: Results, net: str, seed: int) -> dict[str, pd.DataFrame]:
    """The filters of a net over training, of all methods with this seed, by convolution layer.

    Each table has ``method``, ``epoch``, ``filter`` and the filter's weights, one per further column.
    """
    rows: dict[str, list[pd.DataFrame]] = {}
    for cell in results.cells:
        if (cell.net, cell.seed) != (net, seed):
            continue
        for epoch, load in sorted(snapshots(results.folder / cell.folder).items()):
            for layer, weight in _convolutions(load() or {}).items():
                table = pd.DataFrame(weight.flatten(1).numpy())
                table.insert(0, "filter", np.arange(len(weight)))
                table.insert(0, "epoch", epoch)
                table.insert(0, "method", cell.method)
                rows.setdefault(layer, []).append(table)
    return {layer: pd.concat(tables, ignore_index=True) for layer, tables in rows.items()}


def embed(weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE of vectors [n, k] in the plane [n, 2], initialised by PCA (van der Maaten & Hinton 2008).

    NaN where there are fewer than four vectors, where they are all the same, and for one that is not finite.
    """
    from sklearn.manifold import TSNE

    placed, finite = np.full((len(weights), 2), np.nan), np.isfinite(weights).all(1)
    chosen = weights[finite].astype(np.float64)
    if len(chosen) >= 4 and np.ptp(chosen, axis=0).max() > 0:
        perplexity = min(30.0, (len(chosen) - 1) / 3)
        placed[finite] = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(chosen)
    return placed


def first_filters(results: Results, net: str, seed: int) -> dict[str, Tensor]:
    """The last snapshot's first convolution, [filters, channels, height, width], by method."""
    found = {}
    for cell in results.cells:
        if (cell.net, cell.seed) != (net, seed):
            continue
        if shots := snapshots(results.folder / cell.folder):
            layers = _convolutions(shots[max(shots)]() or {})
            if layers:
                found[cell.method] = next(iter(layers.values()))
    return {method: found[method] for method in results.methods if method in found}


def short(name: str) -> str:
    """A layer's name without what all have in common: ``net.conv1.weight`` is ``conv1``."""
    return name.removeprefix("net.").removesuffix(".weight")


def _load(shot: Snapshot) -> dict[str, Tensor] | None:
    try:
        return shot.load()
    except (OSError, ValueError):
        return None


def _convolutions(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The snapshot's order is alphabetical, or that of the module: in both the first convolution comes first.
    return {short(name): weight for name, weight in sorted(weights.items()) if weight.ndim == 4}


def _compared(a: dict[str, Tensor], b: dict[str, Tensor], cell: Cell, d: int, epoch: int) -> list[dict[str, object]]:
    angles, distances = cosine(a, b), l2_distance(a, b)
    best = matched(a, b) if all(bool(w.isfinite().all()) for w in (*a.values(), *b.values())) else {}
    layers = [WHOLE, *(name for name, weight in a.items() if weight.ndim > 1)]
    return [
        {
            "method": cell.method,
            "net": cell.net,
            "d": d,
            "seed": cell.seed,
            "epoch": epoch,
            "layer": short(layer),
            "cosine": angles[layer],
            "l2": distances[layer],
            "matched": best.get(layer, np.nan),
        }
        for layer in layers
    ]
