from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig  # type: ignore[attr-defined]

from tests.callbacks.runs import Linear, batches, classifier, events, first_order, net, trainer
from zo_lightning.callbacks import FilterProjection, WeightSnapshots
from zo_lightning.callbacks.filter_projection import trajectories_figure
from zo_lightning.snapshots import read_snapshots
from zo_lightning.trajectories import Trajectory


class Diverges(Callback):
    """Makes the first convolution NaN after the last step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        if trainer.current_epoch == 1 and trainer.is_last_batch:
            pl_module.net[0].weight.data.fill_(float("nan"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    trainer(folder, WeightSnapshots()).fit(first_order(), batches())
    return folder


def embeddings(folder: Path) -> dict[str, tuple[np.ndarray, list[list[str]]]]:
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    return {
        one.tensor_name: (
            np.loadtxt(folder / one.tensor_path, ndmin=2),
            [line.split("\t") for line in (folder / one.metadata_path).read_text().splitlines()],
        )
        for one in config.embeddings
    }


def test_both_runs_in_one_embedding(reference: Path, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    callbacks = WeightSnapshots(), FilterProjection(str(reference))
    trainer(tmp_path, *callbacks, logger=logger).fit(classifier(), batches())
    folder = Path(logger.log_dir)
    seen = events(folder)
    for layer in ("net.0.weight", "net.3.weight"):
        (event,) = seen.Images(f"filter_projection/{layer}")
        assert (event.step, event.width) == (12, 920)  # two panels
    points, labels = embeddings(folder)["net.0.weight:00012"]
    assert points.shape == (2 * 4 * 3, 27)  # runs, filters, snapshots; weights of a filter
    assert labels[0] == ["run", "layer", "filter", "epoch"]
    assert len(labels) == 1 + len(points)
    row = labels.index(["reference", "net.0.weight", "2", "1"]) - 1
    expected = read_snapshots(reference)[1].load()["net.0.weight"][2].flatten()
    assert points[row] == pytest.approx(expected.numpy(), abs=1e-6)


def test_it_takes_snapshots_where_there_are_none_and_keeps_them_over_a_resume(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=8)
    first = trainer(tmp_path / "a", FilterProjection(), checkpoint, max_steps=8, enable_checkpointing=True)
    first.fit(classifier(), batches())
    resumed = trainer(tmp_path / "b", FilterProjection(every_n_epochs=1), FilterProjection(layers=["net.0*"]))
    resumed.fit(classifier(), batches(), ckpt_path=checkpoint.best_model_path)
    assert [s.step for s in read_snapshots(tmp_path / "b")] == [0, 6, 12]
    assert (tmp_path / "b" / "images" / "filter_projection" / "net.3.weight" / "step=000000012.png").is_file()


def test_layers_filters_and_points_are_limited(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    projection = FilterProjection(layers=["*.3.*"], max_filters=1, max_points=10)
    trainer(tmp_path, projection, logger=logger, max_epochs=30, limit_train_batches=1).fit(classifier(), batches())
    ((name, (points, labels)),) = embeddings(Path(logger.log_dir)).items()
    assert name.startswith("net.3.weight")
    assert len(points) == 10
    assert (labels[1][3], labels[-1][3]) == ("0", "30")  # start and end are among them


def test_the_same_points_are_placed_where_the_runs_agree() -> None:
    way = np.cumsum(np.random.default_rng(0).normal(size=(8, 1, 9)), 0)
    runs = [Trajectory(run, list(range(8)), way) for run in ("this run", "reference")]
    for axes in trajectories_figure("conv", runs).axes:
        lines = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) == 8]
        assert len(lines) == 2
        assert np.abs(lines[0] - lines[1]).max() < 0.1 * np.ptp(lines[0])


def test_axes_are_named_in_letters_that_can_be_read_where_they_are_shown() -> None:
    """TensorBoard makes a picture 350 pixels wide; 8 of them is the least height of a line of text to read."""
    filters = np.random.default_rng(0).normal(size=(8, 4, 9))
    figure = trajectories_figure("conv", [Trajectory("this run", list(range(8)), filters)])
    for axes in figure.axes:
        assert "axis" in axes.get_xlabel() and "axis" in axes.get_ylabel()
        for label in (axes.xaxis.label, axes.yaxis.label):
            assert label.get_fontsize() / 72 * 350 / figure.get_figwidth() >= 8


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 4, 1), (5, 4, 1), (3, 4, 4)])
def test_few_points_and_filters_of_one_weight(shape: tuple[int, int, int]) -> None:
    for filters in (np.zeros(shape), np.arange(np.prod(shape), dtype=float).reshape(shape)):
        figure = trajectories_figure("conv", [Trajectory("this run", list(range(shape[0])), filters)])
        assert len(figure.axes) == (2 if 4 * shape[0] > 10 else 1)


def test_a_run_that_diverged_is_drawn_as_far_as_it_is_finite(tmp_path: Path) -> None:
    module: Any = classifier()
    trainer(tmp_path, Diverges(), FilterProjection()).fit(module, batches())
    assert module.net[0].weight.isnan().all()
    assert (tmp_path / "images/filter_projection/net.0.weight/step=000000012.png").is_file()


def test_no_convolution_and_no_such_reference(reference: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="FilterProjection does nothing: Linear has no such convolution"):
        trainer(tmp_path / "linear", FilterProjection(), max_epochs=1).fit(Linear(), batches())
    with pytest.raises(MisconfigurationException, match="reference: run 'nowhere' does not exist"):
        trainer(tmp_path, FilterProjection("nowhere")).fit(classifier(), batches())
    with pytest.raises(MisconfigurationException, match="is of another net: net.0.weight has shape"):
        trainer(tmp_path, FilterProjection(str(reference))).fit(classifier(of=net(1)), batches(channels=1))


def test_a_run_too_short_for_a_snapshot_is_no_error(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3)
    trainer(tmp_path, checkpoint, max_steps=3, enable_checkpointing=True).fit(classifier(), batches())
    with pytest.warns(UserWarning, match="FilterProjection draws nothing: run '.*' does not exist"):
        late = trainer(tmp_path, FilterProjection(), max_steps=5)
        late.fit(classifier(), batches(), ckpt_path=checkpoint.best_model_path)


def test_bad_arguments() -> None:
    for name, value in {"every_n_epochs": 0, "max_filters": 0, "max_points": 9}.items():
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            FilterProjection(**{name: value})  # type: ignore[arg-type]


def test_figures_are_pictures(tmp_path: Path) -> None:
    trainer(tmp_path, FilterProjection(), max_epochs=1).fit(classifier(), batches())
    picture = Image.open(tmp_path / "images/filter_projection/net.0.weight/step=000000006.png")
    assert picture.size == (600, 580)  # eight points: too few for t-SNE
    assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def test_weights_that_are_not_finite_stop_nothing(tmp_path: Path) -> None:
    module = classifier()
    with torch.no_grad():
        for p in module.net.parameters():
            p.fill_(torch.nan)
    module.max_skipped_in_a_row = 100
    trainer(tmp_path, FilterProjection(), logger=TensorBoardLogger(tmp_path)).fit(module, batches())
    assert "filter_projection/net.0.weight" in events(tmp_path / "lightning_logs" / "version_0").Tags()["images"]
