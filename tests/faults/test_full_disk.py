"""A disk that is full ends a run, and a run of a study, in one line, and what was whole before stays so."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import LONG
from tests.faults.runs import assert_ended_alike, run
from tests.faults.test_damage import STUDY
from tests.faults.test_kills import config
from zo_lightning.checkpoint_io import load_checked

ROOM = [0, 20, 60, 150, 400] if LONG else [0, 60]
"""Kilobytes that are left; a checkpoint has some 90, and the curves of the run come to 30."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, room: int) -> Path:
    """Leave so many kilobytes; the file that takes the others."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - room * 1024)))
    return ballast


@pytest.mark.parametrize("room", ROOM)
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on(disk: Path, tmp_path: Path, room: int) -> None:
    words = "fit -c config.yaml --model.estimator.samples 1"
    assert run(whole := config(tmp_path / "whole"), words).code == 0
    folder = config(disk / "a")
    assert run(folder, f"{words} --trainer.max_steps 13").code == 0
    ballast = fill(disk, room)
    ended = run(folder, f"{words} --ckpt_path last", timeout=60)
    assert "Traceback" not in ended.said and ended.code == 1, ended.said
    said = [line for line in ended.said.splitlines() if line.startswith("zo-lightning: error")]
    assert len(said) == 1 and "No space left on device" in said[0], ended.said
    for path in (folder / "run" / "checkpoints").glob("*.ckpt"):
        load_checked(path)
    ballast.unlink()
    again = run(folder, f"{words} --ckpt_path last")
    assert again.code == 0, again.said
    assert_ended_alike(whole / "run", folder / "run")


def test_a_study_on_a_full_disk_says_which_cell_and_goes_on(disk: Path) -> None:
    (disk / "tiny.yaml").write_text(STUDY)
    ballast = fill(disk, 40)
    ended = run(disk, "study -c tiny.yaml --jobs 1", timeout=120)
    assert ended.code == 1 and "Traceback" not in ended.said, ended.said
    assert "No space left on device" in ended.said, ended.said
    ballast.unlink()
    again = run(disk, "study -c tiny.yaml --jobs 1")
    assert again.code == 0 and "1 of 1 cells are finished" in again.said, again.said
