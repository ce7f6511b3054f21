import re
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from tests.callbacks.runs import Linear, automatic, batches, classifier, events, trainer, validation
from zo_lightning import Backprop
from zo_lightning.callbacks import Budget, Dashboard, GradientAlignment, WeightSimilarity
from zo_lightning.callbacks.dashboard import LAYOUT


def hparams(folder: Path) -> dict[str, Any]:
    found = events(folder).summary_metadata
    return {
        tag: metadata.parse_session_start_info_plugin_data(one.plugin_data.content)
        if "session_start" in tag
        else one.plugin_data.content
        for tag, one in found.items()
        if one.plugin_data.plugin_name == metadata.PLUGIN_NAME
    }


def test_layout_and_hyperparameters(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    callbacks = Dashboard(), Budget(), GradientAlignment(1), WeightSimilarity()
    trainer(tmp_path, *callbacks, logger=logger).fit(classifier(), batches(), validation())
    seen = events(Path(logger.log_dir))
    layout = layout_pb2.Layout()  # type: ignore[attr-defined]
    layout.ParseFromString(seen.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    tags = seen.Tags()["scalars"]
    for category in layout.category:
        for chart in category.chart:
            if "reference" not in chart.title:
                assert any(re.search(pattern, tag) for pattern in chart.multiline.tag for tag in tags), chart.title
    assert hparams(Path(logger.log_dir)).keys() == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    experiment = metadata.parse_experiment_plugin_data(hparams(Path(logger.log_dir))["_hparams_/experiment"])
    heads = {info.name: info.display_name or info.name for info in experiment.hparam_infos}
    assert (heads["d"], heads["random_directions"], heads["estimator"]) == ("weights (d)", "directions", "estimator")
    start = hparams(Path(logger.log_dir))["_hparams_/session_start_info"]
    values = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    d = sum(p.numel() for p in classifier().parameters())
    assert {name: value for name, value in values.items() if name != "seed"} == {
        "d": d,
        "estimator": "ZerothOrder",
        "lr": 0.01,
        "mu": 1e-3,
        "optimizer": "Adam",
        "random_directions": "Rademacher",
        "samples": 1,
        "task": "Classifier, Sequential",
    }
    assert values["seed"] == torch.initial_seed()


def test_what_an_estimator_does_not_have_is_left_empty(tmp_path: Path) -> None:
    """The columns are the same for all runs, as TensorBoard takes them from one."""
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, Dashboard(), logger=logger).fit(classifier(Backprop()), batches())
    found = hparams(Path(logger.log_dir))
    columns = {info.name for info in metadata.parse_experiment_plugin_data(found["_hparams_/experiment"]).hparam_infos}
    assert columns - set(found["_hparams_/session_start_info"].hparams) == {"mu", "random_directions", "samples"}


def test_other_loggers_get_the_hyperparameters(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, Dashboard(), logger=logger).fit(automatic(), batches())
    text = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert "estimator: Backprop" in text and "task: AutomaticClassifier, Sequential" in text
    assert "mu:" not in text


def test_without_a_logger_nothing_happens(tmp_path: Path) -> None:
    trainer(tmp_path, Dashboard()).fit(Linear(), batches())
    assert not list(tmp_path.iterdir())
