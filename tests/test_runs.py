"""Folders of runs: none is overwritten, a run goes on in its own, and the newest whole checkpoint is found."""

import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_cli import QUIET, cli
from zo_lightning.checkpoint_io import load_checked
from zo_lightning.locks import locked
from zo_lightning.runs import own_folder

VERSION = Path("lightning_logs", "version_0")
SHORT = f"--trainer.limit_train_batches 2 --trainer.check_val_every_n_epoch 1 --trainer.log_every_n_steps 1 {QUIET}"
ONE, TWO = f"{SHORT} --trainer.max_epochs 1", f"{SHORT} --trainer.max_epochs 2"
NAMED = "--trainer.logger TensorBoardLogger --trainer.logger.save_dir runs --trainer.logger.name a"
NAMED += " --trainer.logger.version b"


class Terminated(Callback):
    """Sends SIGTERM, or what it is told, to its own process after a step."""

    def __init__(self, number: int = signal.SIGTERM, step: int = 3) -> None:
        self.number, self.step = number, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class FullDisk(Callback):
    """Nothing can be written any more."""

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")


class Deleted(Callback):
    """Somebody deletes the runs."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        shutil.rmtree("lightning_logs", ignore_errors=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the default was trained for one epoch of two steps."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["zo-lightning"])
        assert cli(f"fit {ONE}") == 0
    return folder


@pytest.fixture
def trained(one_epoch: Path, tmp_path: Path) -> Path:
    """A copy of it, here."""
    shutil.copytree(one_epoch, tmp_path, dirs_exist_ok=True)
    return VERSION / "checkpoints"


def files() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def steps(folder: Path, tag: str) -> list[int]:
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def test_last_holds_the_last_weights_and_best_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the metric never gets better after the first validation, too."""
    assert cli(f"fit {TWO} --checkpoint.monitor epoch --checkpoint.mode min --model.estimator Backprop") == 0
    ends = {path.stem: load_checked(path)["global_step"] for path in (VERSION / "checkpoints").glob("*.ckpt")}
    assert ends == {"best": 2, "last": 4}


def test_a_run_goes_on_in_its_own_folder(trained: Path) -> None:
    assert cli(f"fit {TWO} --ckpt_path last") == 0
    assert [folder.name for folder in Path("lightning_logs").iterdir()] == ["version_0"]
    assert load_checked(trained / "last.ckpt")["global_step"] == 4
    assert steps(VERSION, "train/loss") == [0, 1, 2, 3]
    assert steps(VERSION, "train/loss_epoch") == [1, 3]
    assert yaml.safe_load((VERSION / "config.yaml").read_text())["trainer"]["max_epochs"] == 2


@pytest.mark.parametrize("path", ["best", VERSION / "checkpoints" / "last.ckpt"])
def test_from_any_other_checkpoint_it_goes_on_in_a_new_one(trained: Path, path: Any) -> None:
    before = files()
    assert cli(f"fit {TWO} --ckpt_path {path}") == 0
    assert {name: content for name, content in files().items() if name in before} == before
    assert steps(VERSION.with_name("version_1"), "train/loss") == [0, 1, 2, 3]


def test_the_newest_run_goes_on(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(f"fit {ONE}") == 0
    assert cli(f"fit {TWO} --ckpt_path last") == 0
    reached = [load_checked(path)["global_step"] for path in sorted(Path().rglob("last.ckpt"))]
    assert reached == [2, 4]


def test_a_run_that_goes_on_elsewhere_takes_its_curves_along(trained: Path) -> None:
    before = files()
    assert cli(f"fit {TWO} --ckpt_path {trained / 'last.ckpt'} {NAMED}") == 0
    assert steps(Path("runs/a/b"), "train/loss") == [0, 1, 2, 3]
    assert {name: content for name, content in files().items() if name in before} == before


@pytest.mark.parametrize("word", ["last", "best"])
@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_no_checkpoint_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, subcommand: str
) -> None:
    assert cli(f"{subcommand} --ckpt_path {word} {QUIET}") == 2
    assert f"error: ckpt_path {word}: there is no {word}.ckpt in any run in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_test_takes_the_newest(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(f"test --ckpt_path best {QUIET} --trainer.default_root_dir .") == 0
    assert "test/acc" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["torn", "bit flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over(trained: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    content = bytearray((trained / "last.ckpt").read_bytes())
    if damage == "bit flipped":
        content[len(content) // 2] ^= 1
    (trained / "last.ckpt").write_bytes({"torn": content[:-100], "empty": b""}.get(damage, content))
    assert cli(f"fit {TWO} --ckpt_path last") == 0
    error = capsys.readouterr().err
    assert "zo-lightning: warning:" in error and "last.ckpt' is damaged" in error and "best.ckpt' of step 2" in error
    assert load_checked(trained / "last.ckpt")["global_step"] == 4


def test_all_damaged(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in trained.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    before = files()
    assert cli(f"fit {TWO} --ckpt_path last") == 2
    assert "last.ckpt' is damaged" in capsys.readouterr().err
    assert files() == before


def test_a_named_folder_with_another_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(f"fit {ONE} {NAMED}") == 0
    before = files()
    assert cli(f"fit {ONE} {NAMED} --seed_everything 1") == 2
    assert "'runs/a/b' holds another run: go on with that one by --ckpt_path last, or" in capsys.readouterr().err
    assert cli(f"test {QUIET} {NAMED} --ckpt_path last") == 0
    assert {name: content for name, content in files().items() if name in before} == before
    assert cli(f"fit {TWO} {NAMED} --ckpt_path last") == 0
    assert steps(Path("runs/a/b"), "train/loss") == [0, 1, 2, 3]


def test_rows_of_metrics_survive(capsys: pytest.CaptureFixture[str]) -> None:
    named = NAMED.replace("TensorBoardLogger", "CSVLogger")
    assert cli(f"fit {ONE} {named}") == 0
    before = Path("runs/a/b/metrics.csv").read_text().splitlines()
    assert cli(f"fit {TWO} {named} --ckpt_path last") == 0
    after = Path("runs/a/b/metrics.csv").read_text().splitlines()
    assert after[: len(before)] == before and len(after) == 2 * len(before) - 1


def test_two_processes_are_not_in_one_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(VERSION / ".lock"):
        before = files()
        assert cli(f"fit {TWO} --ckpt_path last") == 2
        assert "another process is training in" in capsys.readouterr().err
        assert files() == before


def test_versions_are_claimed_by_one_alone(tmp_path: Path) -> None:
    """The second asks for its number before the first has made its folder."""
    trainers = [Trainer(logger=[kind(tmp_path) for kind in (TensorBoardLogger, CSVLogger)]) for _ in range(2)]
    numbers = [trainer.loggers[0]._get_next_version() for trainer in trainers]  # type: ignore[attr-defined]
    assert numbers == [0, 0]
    for trainer in trainers:
        trainer.loggers[0]._get_next_version = lambda: 0  # type: ignore[attr-defined]
    with own_folder(trainers[0]), own_folder(trainers[1]):
        assert [[logger.version for logger in trainer.loggers] for trainer in trainers] == [[0, 0], [1, 1]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_so_and_goes_on(capsys: pytest.CaptureFixture[str], number: int, code: int) -> None:
    words = f"{TWO} --trainer.callbacks+ tests.test_runs.Terminated --trainer.callbacks.number {int(number)}"
    assert cli(f"fit {words}") == code
    assert f"stopped; to go on: --ckpt_path {Path.cwd() / VERSION}/checkpoints/last.ckpt" in capsys.readouterr().err
    assert load_checked(VERSION / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert cli(f"fit {TWO} --ckpt_path last") == 0
    assert steps(VERSION, "train/loss") == [0, 1, 2, 3]


def test_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(f"fit {ONE} --trainer.callbacks+ tests.test_runs.FullDisk") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "zo-lightning: error: No space left on device: 'somewhere'"


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_deleted_folder(capsys: pytest.CaptureFixture[str], logger: str) -> None:
    words = f"--trainer.logger {logger} --trainer.logger.save_dir ."
    assert cli(f"fit {TWO} {words} --trainer.callbacks+ tests.test_runs.Deleted") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zo-lightning: error: the folder of the run was deleted while it ran: '")


def test_nothing_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("no network here")

    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert cli(f"fit {ONE}") == 0
    assert cli(f"test --ckpt_path last {QUIET}") == 0


@pytest.mark.parametrize(("number", "lines"), [(28, 0), (2, 1)])
def test_a_thread_on_a_full_disk_leaves_the_word_to_the_run(
    capsys: pytest.CaptureFixture[str], number: int, lines: int
) -> None:
    assert cli("fit --model.estimator.samples 0") == 2  # sets the hook
    hook, error = threading.excepthook, OSError(number, "such as TensorBoard's writer")
    capsys.readouterr()
    hook(threading.ExceptHookArgs((OSError, error, None, threading.current_thread())))
    assert capsys.readouterr().err.count("such as TensorBoard's writer") == lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--weights_only false", "weights_only false would run code that a checkpoint can hold"),
        ("--checkpoint.save_last true", "checkpoint.save_last: last.ckpt is written anyway"),
        ("--last_checkpoint.every_seconds -1", "every_seconds must be a finite number of at least 0"),
    ],
)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert cli(f"fit {ONE} {words}") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_malformed_checkpoints_are_one_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = load_checked(trained / "last.ckpt")
    weight = next(iter(whole["state_dict"]))
    malformed: dict[str, Any] = {
        "weights alone": {"state_dict": whole["state_dict"], "loops": whole["loops"]},
        "no loops": {key: value for key, value in whole.items() if key != "loops"},
        "other loops": {**whole, "loops": {"fit_loop": {"epoch_progress": 3}}},
        "states of numbers": {**whole, "optimizer_states": [1]},
        "no groups": {**whole, "optimizer_states": [{"state": {}, "param_groups": []}]},
        "lists in states": {**whole, "optimizer_states": [{**whole["optimizer_states"][0], "state": {0: []}}]},
        "no schedule": {**whole, "lr_schedulers": [3]},
        "a weight of text": {**whole, "state_dict": {**whole["state_dict"], weight: "text"}},
        "other callbacks": {**whole, "callbacks": {"ModelCheckpoint": 3}},
        "spent of text": {**whole, "estimated_gradient": "text"},
        "resume of text": {**whole, "exact_resume": {"point": "batch"}},
    }
    for name, checkpoint in malformed.items():
        path = trained / f"{name}.ckpt"
        torch.save(checkpoint, path)
        assert cli(f"fit {TWO} --ckpt_path '{path}'") in (0, 2), name
        error = capsys.readouterr().err
        assert name == "other callbacks" or "zo-lightning: error: " in error.splitlines()[-1], name
        assert "Traceback" not in error
