"""Cells run side by side, each in its own folder; here with a stand-in for training."""

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.utilities.exceptions import SIGTERMException

from zo_lightning.cli_errors import UserError
from zo_lightning.study.grid import Cell, Method, Study
from zo_lightning.study.runs import (
    FINISHED,
    Outcome,
    claim,
    is_finished,
    own_overlay,
    read_declaration,
    run_cell,
    run_cells,
)

ROOT = Path(__file__).resolve().parents[2]


def fake_fit(words: Sequence[str]) -> Any:
    """Do what the last overlay's model says, and note it in the run's folder."""
    settings: dict[str, Any] = {}
    for file in (word for flag, word in zip(words, words[1:], strict=False) if flag == "-c"):
        settings |= yaml.safe_load(Path(file).read_text()).get("model", {})
    run = Path(words[words.index("-c") + 1]).parents[1]
    print("said by the run")
    (run / "pid").write_text(str(os.getpid()))
    (run / "metrics.csv").write_text("" if settings["do"] == "nothing" else "epoch\n0\n")
    if settings["do"] == "raise":
        raise ValueError("no such luck")
    if settings["do"] == "exit":
        raise SystemExit(1)
    if settings["do"] == "stop":  # Lightning's answer to Ctrl-C
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904
    if settings["do"] == "terminate":
        raise SIGTERMException
    if settings["do"] == "die":
        time.sleep(0.5)
        os._exit(9)
    if settings["do"] == "wait":
        time.sleep(2)
    module = SimpleNamespace(parameters=lambda: iter([torch.zeros(3, requires_grad=True), torch.zeros(2)]))
    return SimpleNamespace(interrupted=settings["do"] == "interrupt", lightning_module=module)


def study(*seeds: int, options: tuple[str, ...] = (), **methods: str) -> Study:
    made = {name: Method(({"model": {"do": what}},), {}) for name, what in methods.items()}
    return Study("fake", (), made, {"SmallCNN": None}, seeds, next(iter(made)), options=options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "fake"
    path.mkdir()
    return path


def run(declared: Study, folder: Path, **settings: Any) -> dict[str, str | None]:
    return {str(outcome.cell): outcome.error for outcome in run_cells(declared, folder, fake_fit, **settings)}


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
        own = own_overlay(tmp_path, Cell("A", "SmallCNN", None, 1, overlays), 1)
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


class TestClaim:
    def test_same_study_and_a_grown_one_may_go_on(self, folder: Path) -> None:
        claim(study(1, A="work"), folder)
        claim(study(1, A="work"), folder)
        claim(study(1, 2, A="work", B="work"), folder)
        assert read_declaration(folder).cells() == study(1, 2, A="work", B="work").cells()

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (study(1, A="else"), "another configuration of A, SmallCNN, seed 1: model.do is 'work' there and 'else'"),
            (study(2, A="work"), "a cell that this one lacks .A, SmallCNN, seed 1."),
            (study(1, A="work", options=("--data.root", "x")), "a study with the options '', not '--data.root x'"),
        ],
    )
    def test_other_study_is_refused_and_nothing_changes(self, folder: Path, other: Study, message: str) -> None:
        claim(study(1, A="work"), folder)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=message):
            claim(other, folder)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    def test_exception_of_a_scale_is_named_by_its_first_key(self, folder: Path) -> None:
        method = Method(({"model": {"do": "work"}},), {})
        plain = Study("fake", (), {"A": method}, {"ScalableCNN": (2.0,)}, (1,), "A")
        claim(plain, folder)
        special = replace(method, by_scale={2.0: {"model": {"optimizer": {"class_path": "torch.optim.Adam"}}}})
        message = "seed 1: model is absent there and {'optimizer': {'class_path': 'torch.optim.Adam'}} here; choose"
        with pytest.raises(UserError, match=re.escape(message)):
            claim(replace(plain, methods={"A": special}), folder)

    def test_options_may_be_written_with_an_equals_sign(self, folder: Path) -> None:
        claim(study(1, A="work", options=("--data.root", "x=y")), folder)
        claim(study(1, A="work", options=("--data.root=x=y",)), folder)
        with pytest.raises(UserError, match="a study with the options '--data.root=x=y', not '--data.root=y'"):
            claim(study(1, A="work", options=("--data.root=y",)), folder)

    def test_claim_that_was_stopped_is_no_foreign_folder(self, folder: Path) -> None:
        (folder / ".study.yaml.new").touch()
        claim(study(1, A="work"), folder)
        assert read_declaration(folder).name == "fake"

    def test_running_study_keeps_its_declaration(self, folder: Path) -> None:
        claim(study(1, A="work"), folder)
        before = (folder / "study.yaml").read_bytes()
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="another process is running the study in"):
                claim(study(1, 2, A="work"), folder)
        assert (folder / "study.yaml").read_bytes() == before

    def test_foreign_folder_is_refused(self, folder: Path) -> None:
        (folder / "thesis.txt").touch()
        with pytest.raises(UserError, match="holds something that is no study"):
            claim(study(1, A="work"), folder)
        assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
        with pytest.raises(UserError, match="is a file"):
            claim(study(1, A="work"), folder / "thesis.txt")

    @pytest.mark.parametrize("content", ["", "name: x\n", "methods: [1\n", "just words\n"])
    def test_damaged_declaration_is_told(self, folder: Path, content: str) -> None:
        (folder / "study.yaml").write_text(content)
        with pytest.raises(UserError, match="study.yaml"):
            read_declaration(folder)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Dask scheduler with two workers, in processes of their own."""
    pytest.importorskip("dask.distributed")
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    dask = [sys.executable, "-m", "dask"]
    worker = [*dask, "worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard", "--no-nanny"]
    commands = [
        [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file), "--no-dashboard"],
        worker,
        worker,
    ]
    processes = [
        subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    try:
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        yield yaml.safe_load(file.read_text())["address"]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_dask_scheduler_with_two_workers(folder: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers were started elsewhere, and a relative path means what it means here."""
    from dask.distributed import Client

    monkeypatch.chdir(folder.parent)

    with Client(scheduler) as client:
        client.wait_for_workers(2, timeout=60)
    declared = study(1, 2, 3, A="work", B="raise")
    outcomes = run(declared, Path(folder.name), backend="dask", address=scheduler)
    assert sorted(outcomes.values(), key=str) == [None, None, None, "no such luck", "no such luck", "no such luck"]
    processes = {(folder / cell.folder / "pid").read_text() for cell in declared.cells()}
    assert str(os.getpid()) not in processes
    assert len(processes) == 2


def test_no_scheduler_is_told(folder: Path) -> None:
    pytest.importorskip("dask.distributed")
    with pytest.raises(UserError, match="no Dask scheduler answers at 'tcp://127.0.0.1:9'"):
        run(study(1, A="work"), folder, backend="dask", address="tcp://127.0.0.1:9")
