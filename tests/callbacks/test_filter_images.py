from pathlib import Path

import pytest
import torch
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from tests.callbacks.runs import Linear, batches, classifier, events, net, trainer
from zo_lightning.callbacks import FilterImages
from zo_lightning.callbacks.filter_images import filter_grid, filters_of


def test_grey_filters_of_one_channel_fill_a_grid() -> None:
    filters = torch.tensor([-1.0, 0.0, 0.5, 1.0, 9.0]).view(5, 1, 1, 1).expand(-1, -1, 3, 3)
    image = filter_grid(filters, scale=1.0)
    assert image.shape == (1, 52, 5 * 50 + 2)  # 5 filters in a row, 48 pixels each and lines of 2
    assert [round(float(image[0, 20, 20 + 50 * i]), 3) for i in range(5)] == [0.0, 0.5, 0.75, 1.0, 1.0]
    assert filter_grid(filters.expand(-1, -1, 3, 3).repeat(3, 1, 1, 1), 1.0).shape == (1, 202, 202)  # 15: four by four


def test_rgb_and_deeper_filters() -> None:
    filters = torch.zeros(4, 3, 5, 5)
    filters[1, 2] = 1.0
    colour = filter_grid(filters, 1.0)
    assert colour.shape == (3, 49, 4 * 47 + 2)
    assert colour[:, 20, 47 + 20].tolist() == [0.5, 0.5, 1.0]
    by_channel = filter_grid(filters, 1.0, rgb=False)
    assert by_channel.shape == (1, 4 * 47 + 2, 3 * 47 + 2)  # a row per filter, a column per channel
    assert by_channel[0, 47 + 20, 2 * 47 + 20] == 1.0
    assert (by_channel == 1.0).sum() == 45 * 45 + by_channel.numel() - 12 * 45 * 45  # one white square, and the lines


def test_convolutions_are_found_once_and_in_order() -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 5), nn.Linear(4, 4), nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3))
    module[3].weight = module[2].weight
    assert {name: tuple(w.shape) for name, w in filters_of(module).items()} == {
        "0.weight": (3, 2, 1, 5),
        "2.weight": (2, 1, 3, 3),
    }


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
