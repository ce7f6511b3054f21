from pathlib import Path

import pytest
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from tests.callbacks.runs import Linear, batches, classifier, events, net, trainer
from zo_lightning.callbacks import FilterImages


def test_files_where_there_is_no_logger(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no logger of this run shows images: they are written to"):
        trainer(tmp_path, FilterImages()).fit(classifier(), batches())
    folder = tmp_path / "images" / "filters"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == [
        f"net.{layer}.weight/step={step:09d}.png" for layer in (0, 3) for step in (0, 6, 12)
    ]
    assert Image.open(folder / "net.3.weight" / "step=000000000.png").size == (4 * 50 + 2, 2 * 50 + 2)


def test_one_scale_per_layer_also_after_a_resume(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3)
    logger = TensorBoardLogger(tmp_path, "first")
    callbacks = [first := FilterImages(every_n_epochs=2), checkpoint]
    trainer(tmp_path, *callbacks, max_steps=3, logger=logger, enable_checkpointing=True).fit(classifier(), batches())
    logger = TensorBoardLogger(tmp_path, "second")
    resumed = FilterImages(every_n_epochs=2)
    trainer(tmp_path, resumed, logger=logger).fit(classifier(), batches(), ckpt_path=checkpoint.best_model_path)
    assert resumed.state_dict() == first.state_dict()
    # at initialisation the largest weight is at 1 / headroom of the scale
    largest = float(net()[0].weight.abs().max())  # type: ignore[index]
    assert first.state_dict()["scales"]["net.0.weight"] == pytest.approx(1.5 * largest)
    assert [event.step for event in events(Path(logger.log_dir)).Images("filters/net.0.weight")] == [12]


def test_limits_of_what_is_shown(tmp_path: Path) -> None:
    trainer(tmp_path, FilterImages(max_filters=1, max_channels=2), max_epochs=1).fit(classifier(), batches())
    assert Image.open(tmp_path / "images/filters/net.3.weight/step=000000006.png").size == (102, 52)


def test_a_net_without_convolution_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="FilterImages does nothing: Linear has no convolution"):
        trainer(tmp_path, FilterImages()).fit(Linear(), batches())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["every_n_epochs", "max_filters", "max_channels", "headroom"])
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        FilterImages(**{name: 0})
