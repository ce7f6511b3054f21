"""How the weights of two methods compare over training, read from the snapshots of their runs."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd
from torch import Tensor

from zo_lightning.measures import WHOLE, cosine, l2_distance, matched
from zo_lightning.snapshots import Snapshot, snapshots_by_epoch
from zo_lightning.study.grid import Cell
from zo_lightning.study.results import Results
from zo_lightning.trajectories import Trajectory, trajectories

SIMILARITY = ("method", "task", "d", "seed", "epoch", "layer", "cosine", "l2", "matched")
Progress = Callable[[str], None]


def similarity(results: Results, progress: Progress = lambda what: None) -> pd.DataFrame:
    """Compare each method's weights with the reference's, of the same task and seed, wherever both have a snapshot.

    Rows are `SIMILARITY`: ``cosine`` and ``l2`` distance of each layer's weight, and under the layer ``"all"`` of all
    weights and biases as one vector; ``matched``, the cosine after the best one-to-one matching of filters, for
    convolutions only. A snapshot that is damaged is left out.
    """
    rows = []
    for cell, ref in pairs(results):
        progress(f"weights of {cell}")
        one, other = (snapshots_by_epoch(results.folder / run.folder) for run in (cell, ref))
        for epoch in sorted(one.keys() & other.keys()):
            a, b = _load(one[epoch]), _load(other[epoch])
            if a and b:
                rows += _compared(a, b, cell, results.tasks[cell.task], epoch)
    return pd.DataFrame(rows, columns=list(SIMILARITY))


def pairs(results: Results) -> Iterator[tuple[Cell, Cell]]:
    """Every finished cell of another method with the reference's of the same task and seed."""
    reference = {(cell.task, cell.seed): cell for cell in results.cells if cell.method == results.study.reference}
    for cell in results.cells:
        if cell.method != results.study.reference and (cell.task, cell.seed) in reference:
            yield cell, reference[cell.task, cell.seed]


def filter_paths(results: Results, task: str, seed: int) -> dict[str, list[Trajectory]]:
    """The filters of a net over training, a trajectory for each method with this seed, by convolution layer."""
    found: dict[str, list[Trajectory]] = {}
    for cell in results.cells:
        if (cell.task, cell.seed) == (task, seed):
            shots = sorted(snapshots_by_epoch(results.folder / cell.folder).items())
            history = ((epoch, _convolutions(_load(shot))) for epoch, shot in shots)
            for layer, path in trajectories(cell.method, history).items():
                found.setdefault(layer, []).append(path)
    return found


def first_filters(results: Results, task: str, seed: int) -> dict[str, Tensor]:
    """The last snapshot's first convolution, [filters, channels, height, width], by method."""
    found = {}
    for cell in results.cells:
        if (cell.task, cell.seed) != (task, seed):
            continue
        if shots := snapshots_by_epoch(results.folder / cell.folder):
            layers = _convolutions(_load(shots[max(shots)]))
            if layers:
                found[cell.method] = next(iter(layers.values()))
    return {method: found[method] for method in results.methods if method in found}


def short(name: str) -> str:
    """A layer's name without what all have in common: ``net.conv1.weight`` is ``conv1``."""
    return name.removeprefix("net.").removesuffix(".weight")


def _load(shot: Snapshot) -> dict[str, Tensor]:
    """The weights of a snapshot; none where it is damaged."""
    try:
        return shot.load()
    except (OSError, ValueError):
        return {}


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
            "task": cell.task,
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
