import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from tests.callbacks.runs import Linear, batches, classifier, first_order, net, scalars, trainer, weights
from zo_lightning.callbacks import FilterProjection, WeightSimilarity, WeightSnapshots
from zo_lightning.measures import cosine, l2_distance
from zo_lightning.snapshots import read_snapshots, write_snapshot


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    trainer(folder, WeightSnapshots()).fit(first_order(), batches())
    return folder


def test_values_are_those_of_the_snapshots(reference: Path, tmp_path: Path) -> None:
    module = classifier()
    start = weights(module)
    trainer(tmp_path, WeightSimilarity(str(reference))).fit(module, batches())
    logged, end, other = scalars(tmp_path), weights(module), read_snapshots(reference)[-1].load()
    for tag, expected in (
        ("vs_start/cosine", cosine(end, start)),
        ("vs_start/l2", l2_distance(end, start)),
        ("vs_reference/cosine", cosine(end, other)),
        ("vs_reference/l2", l2_distance(end, other)),
    ):
        for name in ("all", "net.0.weight", "net.5.bias"):
            assert logged[f"{tag}/{name}"][-1] == (12, pytest.approx(expected[name])), tag
    assert logged["vs_reference/cosine/all"][0] == (0, pytest.approx(1))  # of the same initialisation
    assert [step for step, _ in logged["vs_reference/l2/all"]] == [0, 6, 12]
    assert {tag.rpartition("/")[2] for tag in logged if "matched" in tag} == {"net.0.weight", "net.3.weight"}


def test_filters_that_swapped_roles(tmp_path: Path) -> None:
    swapped = weights(classifier())
    swapped["net.0.weight"] = swapped["net.0.weight"].flip(0)
    write_snapshot(tmp_path / "snapshots", swapped, 0, 0)
    trainer(tmp_path / "run", WeightSimilarity(str(tmp_path)), max_epochs=1).fit(classifier(), batches())
    logged = scalars(tmp_path / "run")
    assert logged["vs_reference/cosine/net.0.weight"][0][1] < 0.9
    assert logged["vs_reference/matched/net.0.weight"][0][1] == pytest.approx(1)


def test_the_start_survives_a_resume(tmp_path: Path) -> None:
    module = classifier()
    start = weights(module)
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3)
    trainer(tmp_path / "a", WeightSimilarity(), checkpoint, max_steps=3, enable_checkpointing=True).fit(
        module, batches()
    )
    resumed = classifier()
    trainer(tmp_path / "b", WeightSimilarity()).fit(resumed, batches(), ckpt_path=checkpoint.best_model_path)
    logged = scalars(tmp_path / "b")["vs_start/l2/all"]
    assert logged[-1] == (12, pytest.approx(l2_distance(weights(resumed), start)["all"]))
    assert [step for step, _ in logged] == [6, 12]


def test_a_start_that_is_unknown_is_said(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3)
    trainer(tmp_path, checkpoint, max_steps=3, enable_checkpointing=True).fit(classifier(), batches())
    with pytest.warns(UserWarning, match="the checkpoint has no start for it: vs_start is from step 3"):
        trainer(tmp_path, WeightSimilarity()).fit(classifier(), batches(), ckpt_path=checkpoint.best_model_path)


def test_a_reference_with_fewer_epochs_is_compared_as_far_as_it_goes(reference: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no snapshot of epoch 3"):
        trainer(tmp_path, WeightSimilarity(str(reference)), max_epochs=4).fit(classifier(), batches())
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["vs_reference/cosine/all"]] == [0, 6, 12]
    assert [step for step, _ in logged["vs_start/cosine/all"]] == [6, 12, 18, 24]


def test_a_reference_that_does_not_fit_is_named(reference: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        "nowhere": (classifier(), "reference: run 'nowhere' does not exist"),
        str(tmp_path / "empty"): (classifier(), "reference: run '.*empty' has no weight snapshots"),
    }
    for path, (module, message) in cases.items():
        with pytest.raises(MisconfigurationException, match=message):
            trainer(tmp_path, WeightSimilarity(path)).fit(module, batches())
    shapes = (
        r"reference '.*' is of another net: net.0.weight has shape \(4, 1, 3, 3\) in this run and .* in the reference"
    )
    with pytest.raises(MisconfigurationException, match=shapes):
        trainer(tmp_path, WeightSimilarity(str(reference))).fit(classifier(of=net(1)), batches(channels=1))
    with pytest.raises(MisconfigurationException, match="is of another net: only this run has inner.weight"):
        trainer(tmp_path, WeightSimilarity(str(reference))).fit(Linear(), batches())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_low_precision_and_tied_weights(tmp_path: Path) -> None:
    trainer(tmp_path, WeightSimilarity(), max_epochs=1).fit(Linear(torch.bfloat16), batches())
    assert 0.5 < scalars(tmp_path)["vs_start/cosine/all"][0][1] <= 1


def test_weights_that_are_not_finite_stop_nothing(reference: Path, tmp_path: Path) -> None:
    module: Any = classifier()
    with torch.no_grad():
        module.net[0].weight[0] = torch.nan
    module.max_skipped_in_a_row = 100
    with pytest.warns(UserWarning, match=r"matches no filters of net\.0\.weight: it, or the reference's, is NaN"):
        trainer(tmp_path, WeightSimilarity(str(reference))).fit(module, batches())
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["vs_reference/matched/net.3.weight"]] == [0, 6, 12]
    assert "vs_reference/matched/net.0.weight" not in logged


def test_a_damaged_snapshot_is_found_before_training(reference: Path, tmp_path: Path) -> None:
    """Not at the epoch that would compare with it, hours later; a pipe of such a name is none."""
    shutil.copytree(reference, tmp_path / "other")
    last = read_snapshots(tmp_path / "other")[-1].path
    os.mkfifo(last.with_name("epoch=00009-step=000000099.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(MisconfigurationException, match=f"reference: snapshot '{last}'"):
        trainer(tmp_path / "run", WeightSimilarity(str(tmp_path / "other"))).fit(classifier(), batches())
    assert not (tmp_path / "run").exists()


def test_a_snapshot_that_is_damaged_while_training_stops_nothing(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "other")
    last = read_snapshots(tmp_path / "other")[-1].path

    class Damages(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            last.write_bytes(b"")

    callbacks = WeightSimilarity(str(tmp_path / "other")), FilterProjection(str(tmp_path / "other"))
    with pytest.warns(UserWarning, match="snapshot") as said:
        trainer(tmp_path, Damages(), *callbacks).fit(classifier(), batches())
    assert {"reference: snap", "FilterProjectio"} <= {str(warning.message)[:15] for warning in said}
    assert [step for step, _ in scalars(tmp_path)["vs_reference/cosine/all"]] == [0, 6]
