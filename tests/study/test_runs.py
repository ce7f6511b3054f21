"""Cells run side by side, each in its own folder; here with a stand-in for training."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.study.stand_in import fake_fit, run, study
from zo_lightning.study.folder import FINISHED, is_finished
from zo_lightning.study.grid import Cell
from zo_lightning.study.runs import Outcome, own_overlay, run_cell
from zo_lightning.user_errors import UserError


def test_finished_cells_are_not_run_again_and_broken_ones_are(folder: Path) -> None:
    declared = study(1, 2, A="work")
    assert run(declared, folder) == {"A, SmallCNN, seed 1": None, "A, SmallCNN, seed 2": None}
    first, second = (folder / cell.folder for cell in declared.cells())
    assert yaml.safe_load((first / FINISHED).read_text())["parameters"] == 3
    assert "said by the run" in (first / "log.txt").read_text()
    (first / FINISHED).unlink()
    (first / "half").touch()
    before = (second / "pid").stat().st_mtime_ns
    assert run(declared, folder) == {"A, SmallCNN, seed 1": None}
    assert not (first / "half").exists()
    assert (second / "pid").stat().st_mtime_ns == before
    assert run(declared, folder) == {}


def test_failed_cell_is_told_and_stops_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = study(1, A="raise", B="work", C="exit")
    told: list[Outcome] = []
    assert run(declared, folder, report=told.append) == {
        "A, SmallCNN, seed 1": "no such luck",
        "B, SmallCNN, seed 1": None,
        "C, SmallCNN, seed 1": "1",
    }
    assert len(told) == 3
    broken = folder / declared.cells()[0].folder
    assert "ValueError: no such luck" in (broken / "error.txt").read_text()
    assert not is_finished(folder, declared.cells()[0])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "content"), [(FINISHED, b""), (FINISHED, b"seconds: ["), (FINISHED, b"\0\xff"), ("metrics.csv", b"")]
)
def test_run_of_which_a_crash_left_a_broken_file_is_run_again(folder: Path, name: str, content: bytes) -> None:
    declared = study(1, A="work")
    [cell] = declared.cells()
    assert run_cell(cell, declared, folder, fake_fit).error is None
    (folder / cell.folder / name).write_bytes(content)
    assert not is_finished(folder, cell)
    assert run_cell(cell, declared, folder, fake_fit).error is None
    assert is_finished(folder, cell)
    (folder / cell.folder / name).unlink()
    assert not is_finished(folder, cell)


def test_run_without_metrics_has_failed(folder: Path) -> None:
    declared = study(1, A="nothing")
    error = run_cell(declared.cells()[0], declared, folder, fake_fit).error
    assert error == "the run has written no metrics.csv: has it trained an epoch?"


def test_callback_that_a_cell_has_is_not_added_again(tmp_path: Path) -> None:
    def added(*trainers: Any) -> list[str]:
        overlays = tuple({"trainer": trainer} for trainer in trainers)
        own = own_overlay(tmp_path, Cell("A", "SmallCNN", 1, overlays), study(1, A="work"))
        return [callback["class_path"] for callback in own["trainer"]["callbacks+"]]

    ours: dict[str, Any] = {"callbacks": [{"class_path": "zo_lightning.callbacks.WeightSnapshots"}, "Budget"]}
    assert added() == added(None, {"callbacks": None}) == ["EpochCost", "WeightSnapshots"]
    assert added(ours) == added(ours, {"callbacks+": "Budget"}) == ["EpochCost"]
    assert added(ours, {"callbacks": "EpochCost"}) == ["WeightSnapshots"]


@pytest.mark.parametrize("how", ["interrupt", "stop", "terminate"])
def test_interrupted_training_ends_the_study_and_is_not_finished(folder: Path, how: str) -> None:
    declared = study(1, A=how)
    with pytest.raises(KeyboardInterrupt):
        run_cell(declared.cells()[0], declared, folder, fake_fit)
    assert not is_finished(folder, declared.cells()[0])
    assert not (folder / declared.cells()[0].folder / "error.txt").exists()


def test_cells_run_in_processes_that_do_not_outnumber_jobs(folder: Path) -> None:
    declared = study(1, 2, 3, 4, A="work")
    assert set(run(declared, folder, jobs=2).values()) == {None}
    processes = {(folder / cell.folder / "pid").read_text() for cell in declared.cells()}
    assert str(os.getpid()) not in processes
    assert len(processes) <= 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_cell_whose_process_dies_is_told_and_takes_no_other_with_it(folder: Path, jobs: int) -> None:
    """Even one that is running at that moment, each time that it does."""
    told: list[Outcome] = []
    outcomes = run(study(1, A="die", B="wait", C="work"), folder, jobs=jobs, report=told.append)
    assert outcomes == {
        "A, SmallCNN, seed 1": "its process died, also when it ran alone: was there enough memory?",
        "B, SmallCNN, seed 1": None,
        "C, SmallCNN, seed 1": None,
    }
    assert len(told) == 3
    assert "was there enough memory?" in (folder / "A/SmallCNN/seed_1/error.txt").read_text()
    assert (folder / "A/SmallCNN/seed_1/pid").read_text() != str(os.getpid())


def test_study_runs_once_at_a_time(folder: Path) -> None:
    declared = study(1, A="work")
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(folder / ".lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is running the study in"):
            run(declared, folder)
        other.kill()
    assert run(declared, folder) == {"A, SmallCNN, seed 1": None}
