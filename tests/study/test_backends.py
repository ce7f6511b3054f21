"""Cells run by processes that were started elsewhere."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.study.stand_in import run, study
from zo_lightning.user_errors import UserError

ROOT = Path(__file__).resolve().parents[2]


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
