from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

from tests.callbacks.runs import batches, classifier, events, scalars, trainer
from zo_lightning.callbacks import (
    Budget,
    Dashboard,
    FilterImages,
    FilterProjection,
    GradientAlignment,
    WeightSimilarity,
    WeightSnapshots,
    log_image,
)
from zo_lightning.callbacks.reporting import log_scalars, run_folder

PICTURE = torch.linspace(0, 1, 12).view(1, 3, 4)


def every() -> list[Callback]:
    return [
        WeightSnapshots(),
        WeightSimilarity(),
        GradientAlignment(3),
        FilterImages(),
        FilterProjection(),
        Budget(),
        Dashboard(),
    ]


class Shows(Callback):
    """Uses ``log_image`` as anybody's callback would."""

    def __init__(self, image: Tensor = PICTURE) -> None:
        self.image = image

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        log_image(trainer, "group/picture", self.image)
        log_scalars(trainer, {"good": 1.5, "bad": float("nan")})


class Recorder(Logger):
    """A logger with pictures of its own, like that of Weights & Biases."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.images: list[tuple[str, list[Any], int]] = []
        self.metrics: list[dict[str, float]] = []

    name = property(lambda self: "project")  # type: ignore[assignment]
    version = property(lambda self: "abc")  # type: ignore[assignment]
    save_dir = property(lambda self: str(self.folder))  # type: ignore[assignment]

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images.append((key, images, step))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hparams = params


def test_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, Shows(), logger=logger, max_epochs=1).fit(classifier(), batches())
    (event,) = events(Path(logger.log_dir)).Images("group/picture")
    assert (event.step, event.width, event.height) == (0, 4, 3)
    assert "bad" not in events(Path(logger.log_dir)).Tags()["scalars"]
    assert not (Path(logger.log_dir) / "images").exists()


def test_a_logger_with_pictures_of_its_own(tmp_path: Path) -> None:
    logger = Recorder(tmp_path)
    trainer(tmp_path, Shows(), *every(), logger=logger, max_epochs=1).fit(classifier(), batches())
    key, (picture,), step = logger.images[0]
    assert (key, step, picture.size) == ("group/picture", 0, (4, 3))
    assert picture.getpixel((3, 2)) == (255, 255, 255)
    assert {"good": 1.5} in logger.metrics
    assert logger.hparams["estimator"] == "ZerothOrder"
    # what is no picture lies where the logger's checkpoints would
    assert [path.name for path in (tmp_path / "project" / "abc").iterdir()] == ["snapshots"]


@pytest.mark.parametrize(
    "image", [PICTURE, PICTURE.mul(255).byte(), PICTURE.expand(3, -1, -1)], ids=["float", "byte", "rgb"]
)
def test_files_where_no_logger_shows_pictures(image: Tensor, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, Shows(image), logger=logger, max_epochs=1).fit(classifier(), batches())
    picture = Image.open(Path(logger.log_dir) / "images" / "group" / "picture" / "step=000000000.png")
    assert picture.size == (4, 3)
    assert picture.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    assert picture.convert("RGB").getpixel((3, 2)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["none", "csv"])
def test_every_callback_without_tensorboard(kind: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path) if kind == "csv" else False
    fit = trainer(tmp_path, *every(), logger=logger)
    fit.fit(classifier(), batches())
    folder = run_folder(fit)
    assert {path.name for path in (folder / "images").iterdir()} == {"filters", "filter_projection"}
    if kind == "none":
        assert {"vs_true_gradient/cosine/all", "vs_start/l2/all", "weight_norm/all", "budget/seconds"} <= scalars(
            folder
        ).keys()
    else:
        header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"vs_true_gradient/cosine/all", "vs_start/l2/all", "weight_norm/all", "budget/seconds"} <= set(header)


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    trainer(tmp_path, Shows(), *every()).fit(classifier(), batches())
    assert not list(tmp_path.iterdir())


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, Shows(), *every(), fast_dev_run=True).fit(classifier(), batches())
    assert not list(tmp_path.iterdir())


def test_every_callback_over_a_resume(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    whole = classifier()
    trainer(tmp_path / "whole", *every(), logger=TensorBoardLogger(tmp_path, "whole")).fit(whole, batches())
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=8)
    logger = TensorBoardLogger(tmp_path, "broken")
    options = {"max_steps": 8, "enable_checkpointing": True, "logger": logger}
    trainer(tmp_path, *every(), checkpoint, **options).fit(classifier(), batches())
    logger = TensorBoardLogger(tmp_path, "resumed")
    resumed = classifier()
    trainer(tmp_path, *every(), logger=logger).fit(resumed, batches(), ckpt_path=checkpoint.best_model_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    seen, expected = events(Path(logger.log_dir)), events(tmp_path / "whole" / "version_0")
    for tag in ("vs_start/l2/all", "vs_true_gradient/cosine/all", "weight_norm/all"):
        points = [(event.step, event.value) for event in expected.Scalars(tag) if event.step > 8]
        assert points and [(event.step, event.value) for event in seen.Scalars(tag)] == points, tag
    ours, theirs = (one.Images("filter_projection/net.0.weight")[0] for one in (seen, expected))
    assert ours.encoded_image_string == theirs.encoded_image_string
