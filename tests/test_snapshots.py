import os
import re
from pathlib import Path

import pytest
import torch

from zo_lightning.snapshots import continue_snapshots, read_snapshots, snapshots_by_epoch, write_snapshot


def test_what_is_written_is_read(tmp_path: Path) -> None:
    weights = {"a": torch.randn(2, 3, dtype=torch.bfloat16), "b": torch.randn(4, 4).T, "c": torch.tensor(1.0)}
    write_snapshot(tmp_path / "run" / "snapshots", weights, step=7, epoch=2)
    for folder in (tmp_path / "run", str(tmp_path / "run" / "snapshots")):
        (snapshot,) = read_snapshots(folder)
        assert (snapshot.step, snapshot.epoch, snapshot.within_epoch) == (7, 2, False)
        loaded = snapshot.load()
        assert loaded.keys() == weights.keys()
        assert all(
            torch.equal(loaded[name], weights[name]) and loaded[name].dtype == weights[name].dtype for name in weights
        )
        assert snapshot.load(["b"]).keys() == {"b"}


def test_snapshots_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        write_snapshot(tmp_path, {"a": torch.ones(1)}, step, epoch=1, within_epoch=step == 20)
    (tmp_path / "notes.safetensors").touch()  # somebody else's
    assert [(s.step, s.within_epoch) for s in read_snapshots(tmp_path)] == [(3, False), (20, True), (100, False)]


def test_by_epoch_only_whole_epochs_count(tmp_path: Path) -> None:
    for step, epoch, within in ((0, 0, False), (3, 0, True), (6, 1, False), (9, 1, True)):
        write_snapshot(tmp_path, {"a": torch.ones(1)}, step, epoch, within)
    assert {epoch: snapshot.step for epoch, snapshot in snapshots_by_epoch(tmp_path).items()} == {0: 0, 1: 6}
    assert snapshots_by_epoch(tmp_path / "nowhere") == {}


def test_a_step_has_one_snapshot(tmp_path: Path) -> None:
    for value, epoch in ((1, 1), (2, 1), (3, 2)):
        write_snapshot(tmp_path, {"a": torch.tensor(float(value))}, 5, epoch)
    (snapshot,) = read_snapshots(tmp_path)
    assert snapshot.load()["a"] == 3 and snapshot.epoch == 2


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshot(tmp_path, {"a": torch.ones(1)}, 5, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_snapshot(tmp_path, {"a": torch.zeros(1)}, 5, 1)
    assert len(list(tmp_path.iterdir())) == 1
    assert read_snapshots(tmp_path)[0].load()["a"] == 1


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run 'nowhere' does not exist"):
        read_snapshots("nowhere")
    with pytest.raises(FileNotFoundError, match=f"run '{re.escape(str(tmp_path))}' has no weight snapshots"):
        read_snapshots(tmp_path)
    damaged = write_snapshot(tmp_path, {"a": torch.ones(9)}, 5, 1)
    with pytest.raises(ValueError, match=r"snapshot '.*step=000000005\.safetensors': .*b"):
        damaged.load(["b"])
    damaged.path.write_bytes(damaged.path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"snapshot '.*step=000000005\.safetensors': "):
        damaged.load()


def test_reading_unpickles_nothing(tmp_path: Path) -> None:
    path = tmp_path / "epoch=00001-step=000000001.safetensors"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="snapshot"):
        read_snapshots(tmp_path)[0].load()


def steps(folder: Path) -> list[int]:
    return [snapshot.step for snapshot in read_snapshots(folder)]


def test_history_is_continued_in_the_same_folder_and_in_another(tmp_path: Path) -> None:
    for step in (0, 1, 2, 3):
        write_snapshot(tmp_path / "old", {"a": torch.tensor(float(step))}, step, step)
    assert continue_snapshots(tmp_path / "new", tmp_path / "old", [0, 1]) == set()
    assert steps(tmp_path / "new") == [0, 1]
    assert steps(tmp_path / "old") == [0, 1, 2, 3]
    assert continue_snapshots(tmp_path / "old", tmp_path / "old", [0, 1, 9]) == {9}
    assert steps(tmp_path / "old") == [0, 1]
    with pytest.raises(FileExistsError, match="new' holds snapshots of another run"):
        continue_snapshots(tmp_path / "new", tmp_path / "old", [0])
    assert steps(tmp_path / "new") == [0, 1]
