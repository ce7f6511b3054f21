"""``zo-lightning study`` as a whole: what it writes, and that it does not matter where it was stopped."""

import contextlib
import itertools
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from pytorch_lightning import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.study.conftest import DECLARED
from zo_lightning.__main__ import main
from zo_lightning.snapshots import read_snapshots
from zo_lightning.study.grid import Method, Study
from zo_lightning.study.plan import Stopwatch, check
from zo_lightning.study.results import Results, read_results
from zo_lightning.user_errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STUDY = Path("lightning_logs", "tiny")
ZO = STUDY / "ZO-AdaMM" / "ScalableCNN_1" / "seed_2"


def cli(words: str) -> int:
    try:
        return main(shlex.split(words))
    except SystemExit as end:  # --help
        return int(end.code or 0)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])
    (tmp_path / "tiny.yaml").write_text(DECLARED)
    return tmp_path


def started() -> list[str]:
    """By which process each cell was begun; cells come and go while this looks."""
    tokens = []
    for path in STUDY.rglob("started"):
        with contextlib.suppress(FileNotFoundError):
            tokens.append(path.read_text())
    return tokens


def comparable(results: Results) -> pd.DataFrame:
    return results.table.drop(columns=["epoch_seconds", "seconds"])


def test_every_cell_is_an_ordinary_run(finished: Path) -> None:
    run = finished / ZO
    assert {"config.yaml", "metrics.csv", "finished.yaml", "log.txt"} <= {path.name for path in run.iterdir()}
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["net"]["init_args"]["scale"] == 1.0
    assert [shot.epoch for shot in read_snapshots(run)] == [0, 1, 2, 3]
    assert "val/acc" in EventAccumulator(str(run)).Reload().Tags()["scalars"]
    assert not list((finished / STUDY).rglob("error.txt"))


def test_finished_run_is_repeated_elsewhere_and_never_overwritten(
    elsewhere: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / ZO, elsewhere / ZO)  # its configuration names the relative folder
    before = {path: path.read_bytes() for path in ZO.rglob("*") if path.is_file()}
    assert cli(f"fit -c {ZO}/config.yaml") == 2
    assert f"'{ZO}' holds a finished run of a study" in capsys.readouterr().err
    assert cli(f"fit -c {ZO}/config.yaml --trainer.logger true") == 0
    assert {path: path.read_bytes() for path in ZO.rglob("*") if path.is_file()} == before
    there, here = (read_snapshots(run)[-1].load() for run in (ZO, "lightning_logs/version_0"))
    assert all(torch.equal(weight, here[name]) for name, weight in there.items())


def test_methods_start_from_the_same_weights_and_seeds_do_not(finished: Path) -> None:
    def start(method: str, seed: int) -> dict[str, torch.Tensor]:
        return read_snapshots(finished / STUDY / method / "ScalableCNN_1" / f"seed_{seed}")[0].load()

    fo, zo, other = start("FO-AdaMM", 1), start("ZO-AdaMM", 1), start("ZO-AdaMM", 2)
    assert all(torch.equal(weight, zo[name]) for name, weight in fo.items())
    assert not torch.equal(zo["net.fc1.weight"], other["net.fc1.weight"])


def test_table_of_results(results: Results) -> None:
    assert len(results.table) == 2 * 2 * 2 * 3
    assert results.tasks == {"ScalableCNN 0.111111": 1400, "ScalableCNN 1": 10_602}
    assert results.missing == {}
    assert results.published is None  # the digits are not the published data
    assert results.table.notna().all(axis=None)
    fo, zo = (results.table[results.table["method"] == method] for method in ("FO-AdaMM", "ZO-AdaMM"))
    # 2 steps an epoch; three passes a step by backpropagation, two by the central difference
    assert sorted(set(fo["forward_passes"])) == [6, 12, 18]
    assert sorted(set(zo["forward_passes"])) == [4, 8, 12]
    # the two of an epoch cost as much in every one; a central difference is two forward passes, backpropagation more
    for table in (fo, zo):
        by_epoch = table.pivot_table(index="task", columns="epoch", values="flops")
        assert (by_epoch[3] / by_epoch[1]).to_numpy() == pytest.approx(3, rel=1e-6)  # logged as float32
    spent = fo.groupby("task")["flops"].max() / zo.groupby("task")["flops"].max()
    assert ((spent > 1) & (spent < 1.5)).all()
    last = fo[fo["epoch"] == 3]
    total = fo.groupby(["task", "seed"])["epoch_seconds"].sum()
    assert last.set_index(["task", "seed"])["seconds"].to_dict() == pytest.approx(total.to_dict())


def test_metrics_are_read_to_the_last_bit(finished: Path, results: Results) -> None:
    run = finished / ZO
    logged = EventAccumulator(str(run)).Reload().Scalars("val/loss")  # float32
    rows = results.table
    ours = rows[(rows["method"] == "ZO-AdaMM") & (rows["task"] == "ScalableCNN 1") & (rows["seed"] == 2)]
    assert ours["val_loss"].tolist() == [point.value for point in logged]


def test_killed_anywhere_and_started_again_it_ends_with_the_same_numbers(elsewhere: Path, results: Results) -> None:
    """SIGKILL at a moment that depends on chance; the next start goes on, while old workers may still be there."""
    (elsewhere / "tiny.yaml").write_text(DECLARED.replace("[0.1111111111111111, 1]", "[1]"))
    command = [sys.executable, "-m", "zo_lightning", "study", "-c", "tiny.yaml", "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as study:
        while not any(token.startswith(f"{study.pid} ") for token in started()):
            assert study.poll() is None
            time.sleep(0.05)
        time.sleep(random.uniform(0, 2))
        study.send_signal(signal.SIGKILL)
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False).returncode == 0
    whole = comparable(results)
    same_net = whole[whole["task"] == "ScalableCNN 1"].reset_index(drop=True)
    pd.testing.assert_frame_equal(comparable(read_results(STUDY)), same_net, check_exact=True)


@pytest.mark.usefixtures("elsewhere")
def test_failed_cell_is_reported_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diverging = "  Bad: {model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1e30}}}}\nnets"
    text = DECLARED.replace("\nnets", f"\n{diverging}", 1).replace("limit_train_batches: 2", "limit_train_batches: 10")
    text = text.replace("[0.1111111111111111, 1]", "[1]").replace("seeds: [1, 2]", "seeds: [1]")
    (tmp_path / "tiny.yaml").write_text(text)
    assert cli("study -c tiny.yaml --jobs 1") == 1
    printed = capsys.readouterr()
    assert "2 of 3 cells are finished" in printed.out
    assert re.search(r"error: Bad, ScalableCNN 1, seed 1: the loss is nan for 20 batches in a row", printed.err)
    assert "Traceback" in (STUDY / "Bad" / "ScalableCNN_1" / "seed_1" / "error.txt").read_text()
    assert list(read_results(STUDY).missing.values()) == ["failed"]


@pytest.mark.usefixtures("elsewhere")
def test_dry_run_lists_cells_and_time_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("study -c tiny.yaml --dry-run --jobs 2") == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^lightning_logs/tiny/\S+  d = (1,400|10,602)  about \d+ s$", printed, re.M)) == 8
    assert re.search(r"^8 cells, 0 of them finished; the others take about \d+ s with 2 at a time", printed, re.M)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.usefixtures("elsewhere")
def test_dry_run_of_a_single_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("study -c tiny.yaml --dry-run --trainer.max_epochs 1 --trainer.limit_train_batches 1") == 0
    assert "8 cells, 0 of them finished; the others take about" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "steps"), [(0.6, 4), (2.0, 3)], ids=["two after the warm-up", "one"])
def test_slow_steps_are_timed_for_a_second_after_the_warm_up(
    seconds: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("zo_lightning.study.plan.time", SimpleNamespace(perf_counter=lambda: seconds * next(clock)))
    trainer, stopwatch = Trainer(logger=False, max_steps=10), Stopwatch()
    stopwatch.on_train_start(trainer, LightningModule())
    while not trainer.should_stop:
        stopwatch.on_train_batch_end(trainer, LightningModule())
    assert len(stopwatch.times) == 1 + steps


def test_error_of_torch_in_a_trial_names_the_cell() -> None:
    def fit(words: Sequence[str]) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    declared = Study("x", (), {"FO": Method(({},), {})}, {"SmallCNN": ({},)}, (1,), "FO")
    with pytest.raises(UserError, match="^FO, SmallCNN, seed 1: DefaultCPUAllocator: can't allocate"):
        check(declared, fit)


def test_dry_run_sees_what_is_finished(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    assert cli("study -c tiny.yaml --dry-run") == 0
    assert "8 cells, 8 of them finished" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in STUDY.rglob("*/seed_1/*")}
    assert cli("study -c tiny.yaml") == 0
    assert "8 of 8 cells are finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in STUDY.rglob("*/seed_1/*")} == before


@pytest.mark.usefixtures("elsewhere")
def test_help_names_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--help") == 0
    printed = capsys.readouterr().out
    assert "study" in printed and "report" in printed
    assert cli("study --help") == 0
    assert "--dry-run" in capsys.readouterr().out
    assert cli("report --help") == 0
    assert "--output" in capsys.readouterr().out


TINY = yaml.safe_load(DECLARED)
BAD_STUDIES = {
    "an unknown method": (
        {"methods": {"X": {"model": {"estimator": "ZerothOrdr"}}}},
        r"X, ScalableCNN 0.111111, seed 1: .*unknown class 'ZerothOrdr' \(did you mean ZerothOrder\?\).*",
    ),
    "an unknown key of a method": (
        {"methods": {"X": {"model": {"estimtor": "Backprop"}}}},
        r"X, .*unknown key 'model.estimtor' \(did you mean model.estimator\?\)",
    ),
    "an empty grid": ({"seeds": []}, "bad.yaml: 'seeds' is empty: a study needs .*"),
    "an absurd net": (
        {"nets": {"ScalableCNN": [1e5]}},
        "FO-AdaMM, .*scale=100000.0 gives .* parameters.*",
    ),
    "a scale below zero": ({"nets": {"ScalableCNN": [-1]}}, r".*scale=-1.0 must be a finite number above 0.*"),
    "an unknown net": ({"nets": {"ScalableCN": [1]}}, r".*unknown class 'ScalableCN' \(did you mean ScalableCNN\?\).*"),
    "a net without scale": ({"nets": {"SmallCNN": [1]}}, r".*'scale'.*"),
    "a value out of range": (
        {"methods": {"X": {"model": {"estimator": {"class_path": "ZerothOrder", "init_args": {"samples": 0}}}}}},
        ".*samples must be at least 1, got 0",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_STUDIES.values(), ids=list(BAD_STUDIES))
def test_bad_study_is_one_clear_line_and_writes_nothing(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], message: str
) -> None:
    (elsewhere / "bad.yaml").write_text(yaml.safe_dump({**TINY, **change}, sort_keys=False))
    before = set(elsewhere.rglob("*"))
    assert cli("study -c bad.yaml") == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"zo-lightning: error: {message}", lines[-1])
    assert len(lines) <= 3
    assert set(elsewhere.rglob("*")) == before


BAD_WORDS = {
    "study": "the following arguments are required: -c/--config",
    "study -c nowhere.yaml": "'nowhere.yaml' is neither a file nor a configuration .*; see zo-lightning configs",
    "study -c tiny.yaml --jobs 0": "argument --jobs: must be a whole number of at least 1, got '0'",
    "study -c tiny.yaml --job 2": "unknown argument '--job'; see zo-lightning study --help",
    "study -c tiny.yaml --seed_everything 1": "unknown argument '--seed_everything'; .*",
    "study -c tiny.yaml --backend fast": "argument --backend: invalid choice: 'fast'.*",
    "study -c tiny.yaml --data.batch_size 0": "FO-AdaMM, .*batch_size=0 must be a whole number of at least 1",
    "study -c tiny.yaml --data MNIST --data.root nowhere --data.download false": ".*root 'nowhere' does not exist; .*",
    "report": "the following arguments are required: folder",
    "report nowhere": "'nowhere' does not exist",
    "report tiny.yaml": "'tiny.yaml' is no study's folder, and not the results.csv of a report, which begins with .*",
    "report empty": "'empty' holds no study: it has no study.yaml",
    "report begun": r"'begun': none of its 8 cells is finished \(not begun, not finished\)",
}


@pytest.mark.parametrize(("words", "message"), BAD_WORDS.items(), ids=list(BAD_WORDS))
def test_bad_words_are_one_clear_line_and_write_nothing(
    elsewhere: Path, finished: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    (elsewhere / "empty").mkdir()
    (elsewhere / "begun/FO-AdaMM/ScalableCNN_1/seed_1").mkdir(parents=True)
    shutil.copy(finished / STUDY / "study.yaml", elsewhere / "begun")
    before = set(elsewhere.rglob("*"))
    assert cli(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"zo-lightning: error: {message}", lines[-1])
    assert len(lines) <= 3
    assert set(elsewhere.rglob("*")) == before


def test_folder_of_another_study_stays_as_it_is(
    elsewhere: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / STUDY, elsewhere / STUDY)
    (elsewhere / "tiny.yaml").write_text(DECLARED.replace("lr: 1e-3", "lr: 2e-3"))
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    assert cli("study -c tiny.yaml") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "belongs to a study with another configuration of FO-AdaMM" in error
    assert "model.optimizer.init_args.lr is 0.001 there and 0.002 here" in error
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
