"""Where the filters travel during training: their trajectories in the plane."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from zo_lightning.callbacks.reporting import log_figure, run_folder, say_once, tensorboards
from zo_lightning.callbacks.weight_similarity import check_reference
from zo_lightning.callbacks.weight_snapshots import WeightSnapshots, check_at_least_1
from zo_lightning.filters import filters_of
from zo_lightning.snapshots import FOLDER, Snapshot, read_snapshots
from zo_lightning.trajectories import Trajectory, draw, pca, project, trajectories, tsne


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
            paths = self._paths(runs, layers)
        except (OSError, ValueError) as error:  # the run was too short, or the reference is gone
            say_once(f"FilterProjection draws nothing: {error}")
            return
        for name in layers:
            log_figure(trainer, f"filter_projection/{name}", trajectories_figure(name, paths[name]))
            if projector:
                _write_projector(trainer, name, paths[name])

    def _paths(self, runs: dict[str, Path], layers: dict[str, Tensor]) -> dict[str, list[Trajectory]]:
        histories = {run: read_snapshots(folder) for run, folder in runs.items()}
        filters = max(min(len(weight), self.max_filters) for weight in layers.values()) * len(runs)
        paths: dict[str, list[Trajectory]] = {name: [] for name in layers}
        for run, snapshots in histories.items():
            history = ((shot.epoch, shot.load(layers)) for shot in self._thinned(snapshots, filters))
            for name, path in trajectories(run, history, self.max_filters).items():
                paths[name].append(path)
        return paths

    def _layers(self, module: LightningModule) -> dict[str, Tensor]:
        found = filters_of(module)
        if self.layers is None:
            return dict(list(found.items())[:4])
        return {name: w for name, w in found.items() if any(fnmatchcase(name, pattern) for pattern in self.layers)}

    def _thinned(self, snapshots: list[Snapshot], filters: int) -> list[Snapshot]:
        """Evenly many of a run's snapshots, first and last among them, so that all points are few enough."""
        count = max(2, self.max_points // filters)
        if len(snapshots) <= count:
            return snapshots
        return [snapshots[round(i * (len(snapshots) - 1) / (count - 1))] for i in range(count)]


def trajectories_figure(title: str, paths: Sequence[Trajectory]) -> Any:
    """A matplotlib ``Figure`` of all filters by PCA and by t-SNE, a colour per filter; ring: start, cross: end."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from zo_lightning.palette import COLOURS  # slow to import, as all of these

    panels = {"PCA": project(paths, pca)}
    if sum(path.filters[..., 0].size for path in paths) > 10:
        panels["t-SNE"] = project(paths, tsne)
    # TensorBoard shows a picture some 350 pixels wide: small inches make letters that can still be read there.
    figure = Figure(figsize=(max(3.0, 2.3 * len(panels)), 2.9), dpi=200, layout="constrained")
    start: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 5.5, "markerfacecolor": "white"}
    end: dict[str, Any] = {"linestyle": "", "marker": "X", "markersize": 5.5, "markeredgecolor": "black"}
    styles = dict(zip((path.run for path in paths), ("-", "--", ":"), strict=False))
    for axes, (method, planes) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for path, plane in zip(paths, planes, strict=True):
            for index, way in enumerate(plane.swapaxes(0, 1)):
                colour = {"color": COLOURS[index % len(COLOURS)]}
                line = {"linestyle": styles[path.run], "linewidth": 1, "markersize": 3, **colour}
                draw(axes, way, {**start, **colour}, {**end, **colour}, **line)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"{method}, first axis", fontsize=11)
        axes.set_ylabel(f"{method}, second axis", fontsize=11)
    entries: dict[str, dict[str, Any]] = {run: {"linestyle": style} for run, style in styles.items()}
    entries |= {"start": {**start, "markersize": 8}, "end": {**end, "markersize": 8}}
    marks = [Line2D([], [], color="dimgrey", label=label, **style) for label, style in entries.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def _write_projector(trainer: Trainer, name: str, paths: Sequence[Trajectory]) -> None:
    labels = [
        (path.run, name, str(index), str(epoch))
        for path in paths
        for epoch in path.epochs
        for index in range(path.filters.shape[1])
    ]
    points = np.concatenate([path.filters.reshape(-1, path.filters.shape[-1]) for path in paths])
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
