"""Where the filters travel during training: their trajectories in the plane."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from zo_lightning.callbacks.filter_images import filters_of
from zo_lightning.callbacks.reporting import log_figure, run_folder, say_once, tensorboards
from zo_lightning.callbacks.weight_similarity import check_reference
from zo_lightning.callbacks.weight_snapshots import WeightSnapshots, check_at_least_1
from zo_lightning.snapshots import FOLDER, Snapshot, read_snapshots


class FilterProjection(Callback):
    """The trajectories of a layer's filters through training, projected by PCA and by t-SNE that starts from PCA.

    Draws ``filter_projection/<name>`` for convolutions, start and end marked; with a reference, both runs' filters are
    in one embedding. TensorBoard's embedding projector gets the filters themselves, labelled by run, layer, filter and
    epoch. It reads the run's ``WeightSnapshots``, and takes its own where the trainer has none.

    t-SNE: van der Maaten & Hinton, *Visualizing data using t-SNE*, 2008.

    Args:
        reference: folder of a run that was trained with ``WeightSnapshots``, or None.
        every_n_epochs: epochs from one figure to the next; None draws at the end of training only.
        layers: patterns of the names of weights; None takes the first four convolutions.
        max_filters: filters of a layer, the first ones.
        max_points: of one embedding; beyond, snapshots in between are left out.

    Raises:
        ValueError: a number is below 1 (``max_points``: below 10).
        MisconfigurationException: in ``setup``: the reference does not exist, has no snapshots, or has other weights.
    """

    def __init__(
        self,
        reference: str | None = None,
        every_n_epochs: int | None = None,
        layers: Sequence[str] | None = None,
        max_filters: int = 16,
        max_points: int = 1000,
    ) -> None:
        check_at_least_1(every_n_epochs=every_n_epochs, max_filters=max_filters, max_points=max_points // 10)
        self.reference = reference
        self.every_n_epochs = every_n_epochs
        self.layers = layers
        self.max_filters = max_filters
        self.max_points = max_points
        self._own = WeightSnapshots(histograms=False)
        self._takes_own = False

    @property
    def state_key(self) -> str:
        """By the reference and the layers, since several instances are plausible."""
        return self._generate_state_key(reference=self.reference, layers=self.layers)

    def state_dict(self) -> dict[str, Any]:
        """That of its own snapshots, where it takes any."""
        return {"snapshots": self._own.state_dict() if self._takes_own else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of its own snapshots."""
        if state_dict["snapshots"] is not None:
            self._own.load_state_dict(state_dict["snapshots"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the reference, and see whether there is anything to project."""
        if stage != "fit":
            return
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._takes_own = not any(isinstance(c, WeightSnapshots) for c in others)
        if self._takes_own and any(isinstance(c, FilterProjection) for c in others[: others.index(self)]):
            self._takes_own = False  # a second instance reads those of the first
        if self.reference is not None:
            check_reference(self.reference, dict(pl_module.named_parameters()))
        if not self._layers(pl_module):
            say_once(f"FilterProjection does nothing: {type(pl_module).__name__} has no such convolution")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first snapshot."""
        if self._takes_own:
            self._own.on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Take a snapshot."""
        if self._takes_own:
            self._own.on_train_batch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, where that is wanted before the end."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, and write for the projector."""
        self._draw(trainer, pl_module, projector=True)

    def _draw(self, trainer: Trainer, module: LightningModule, projector: bool = False) -> None:
        layers = self._layers(module)
        if not layers or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        runs = {"this run": run_folder(trainer) / FOLDER}
        if self.reference is not None:
            runs["reference"] = Path(self.reference)
        try:
            histories = {run: read_snapshots(folder) for run, folder in runs.items()}
        except FileNotFoundError as error:  # the run was too short, or the reference is gone
            say_once(f"FilterProjection draws nothing: {error}")
            return
        names = list(layers)
        tracks: dict[str, list[Track]] = {name: [] for name in names}
        for run, history in histories.items():
            snapshots = self._thinned(history, max(map(self._shown, layers.values())) * len(runs))
            weights = [snapshot.load(names) for snapshot in snapshots]
            for name in names:
                for index in range(self._shown(layers[name])):
                    path = np.stack([w[name][index].float().flatten().numpy() for w in weights])
                    tracks[name].append(Track(run, index, [s.epoch for s in snapshots], path))
        for name in names:
            log_figure(trainer, f"filter_projection/{name}", trajectories_figure(name, tracks[name]))
            if projector:
                _write_projector(trainer, name, tracks[name])

    def _layers(self, module: LightningModule) -> dict[str, Tensor]:
        found = filters_of(module)
        if self.layers is None:
            return dict(list(found.items())[:4])
        return {name: w for name, w in found.items() if any(fnmatchcase(name, pattern) for pattern in self.layers)}

    def _shown(self, weight: Tensor) -> int:
        return min(len(weight), self.max_filters)

    def _thinned(self, snapshots: list[Snapshot], filters: int) -> list[Snapshot]:
        """Evenly many of a run's snapshots, first and last among them, so that all points are few enough."""
        count = max(2, self.max_points // filters)
        if len(snapshots) <= count:
            return snapshots
        return [snapshots[round(i * (len(snapshots) - 1) / (count - 1))] for i in range(count)]


class Track(NamedTuple):
    """One filter's way through one run.

    Attributes:
        run: a label.
        filter: its index in the layer.
        epochs: of the snapshots, [t].
        path: the filter at these times, [t, n].
    """

    run: str
    filter: int
    epochs: list[int]
    path: np.ndarray


def trajectories_figure(title: str, tracks: Sequence[Track]) -> Any:
    """A matplotlib ``Figure`` of all tracks by PCA and by t-SNE, a colour per filter; ring: start, cross: end."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points = np.concatenate([track.path for track in tracks])
    panels = {"PCA": _pca(points)}
    if len(points) > 10:
        panels["t-SNE"] = _tsne(points)
    figure = Figure(figsize=(4 * len(panels), 3.8), dpi=140, layout="constrained")
    colours = colormaps["tab10" if max(track.filter for track in tracks) < 10 else "tab20"]
    runs = list(dict.fromkeys(track.run for track in tracks))
    styles = dict(zip(runs, ("-", "--", ":"), strict=False))
    for axes, (method, plane) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        ends = np.cumsum([len(track.path) for track in tracks])
        for track, xy in zip(tracks, np.split(plane, ends[:-1]), strict=True):
            colour = colours(track.filter % colours.N)
            axes.plot(*xy.T, styles[track.run], color=colour, linewidth=1, marker=".", markersize=3)
            axes.plot(*xy[0], "o", color=colour, markersize=9, markerfacecolor="white", zorder=3)
            axes.plot(*xy[-1], "X", color=colour, markersize=9, markeredgecolor="black", zorder=4)
        axes.set(title=f"{title}: {method}", xticks=[], yticks=[])
    grey = {"color": "grey", "markersize": 8}
    marks = [Line2D([], [], linestyle=styles[run], color="grey", label=run) for run in runs]
    marks += [Line2D([], [], linestyle="", marker="o", markerfacecolor="white", label="start", **grey)]
    marks += [Line2D([], [], linestyle="", marker="X", markeredgecolor="black", label="end", **grey)]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))
    return figure


def _pca(points: np.ndarray) -> np.ndarray:
    """The first two principal components, or what there is of them."""
    centred = points - points.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    plane = (left * sizes)[:, :2]
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))


def _tsne(points: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE  # slow to import

    # PCA-initialised, as init="pca" does, which refuses filters of a single weight.
    start = _pca(points)
    spread = start[:, 0].std()
    if spread == 0:
        return start
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init=start / spread * 1e-4, random_state=0).fit_transform(points)


def _write_projector(trainer: Trainer, name: str, tracks: Sequence[Track]) -> None:
    labels = [(t.run, name, str(t.filter), str(epoch)) for t in tracks for epoch in t.epochs]
    points = np.concatenate([track.path for track in tracks])
    for writer in tensorboards(trainer):
        if len(points) > 1 and math.prod(points.shape) and not _is_written(writer, name, trainer.global_step):
            writer.add_embedding(
                points,
                metadata=labels,
                metadata_header=["run", "layer", "filter", "epoch"],
                global_step=trainer.global_step,
                tag=name,
            )


def _is_written(writer: Any, name: str, step: int) -> bool:
    folder = getattr(writer, "log_dir", None)
    return folder is not None and Path(folder, f"{step:05d}", name).exists()
