"""The command line on other people's modules, and on checkpoints that are not quite what was asked for."""

import csv
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import LightningModule

import zo_lightning as zo
from zo_lightning import Classifier, EstimatedGradient
from zo_lightning.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
QUIET = "--trainer.enable_progress_bar false --trainer.enable_model_summary false"
RUN = Path("lightning_logs", "version_0")
SHORT = f"--trainer.limit_train_batches 2 --trainer.max_epochs 1 {QUIET}"

THEIRS = """
import torch
from pytorch_lightning import Callback, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Remembers(Callback):
    memory = []


class LitNet(LightningModule):
    def __init__(self, width: int = 8, lr: float = 1e-2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        losses = F.mse_loss(self.net(batch[0]), batch[1], reduction="none").mean(1)
        return {"loss": losses.mean(), "losses": losses}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)

    val_dataloader = predict_dataloader = train_dataloader
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A project's folder with a module of its own, of whose name Python knows none before nor afterwards."""
    sys.modules.pop("theirs", None)
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("theirs", None)


def cli(words: str) -> int:
    try:
        return main(shlex.split(words))
    except SystemExit as end:
        return int(end.code or 0)


def printed(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    assert cli(f"fit {words} --print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_module_is_trained_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the default's estimator kind, with its own optimizer and data; continued from its files; then it predicts."""
    assert cli(f"fit --model theirs.LitNet --trainer.max_epochs 2 {QUIET}") == 0
    assert "after 8 steps, 16 forward passes of a batch." in capsys.readouterr().out
    last = f"-c {RUN / 'config.yaml'} --ckpt_path {RUN / 'checkpoints' / 'last.ckpt'}"
    checkpoint = torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(checkpoint["optimizer_states"][0]["param_groups"][0]) >= {"nesterov"}  # SGD's
    assert cli(f"fit {last} --trainer.max_epochs 3 {QUIET}") == 0
    assert "after 12 steps, 24 forward passes of a batch." in capsys.readouterr().out
    assert cli(f"predict {last} {QUIET}") == 0
    file = tmp_path / "lightning_logs" / "version_2" / "predictions.csv"
    assert f"The predictions are in {file}" in capsys.readouterr().out
    with file.open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["prediction"] and len(rows) == 65


def test_estimator_optimizer_and_schedule_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = "--optimizer Adam --optimizer.lr 0.5 --lr_scheduler StepLR --lr_scheduler.step_size 1"
    words = f"--model theirs.LitNet --model.width 16 --estimator Backprop {optimizer} --trainer.max_epochs 2 {QUIET}"
    assert cli(f"fit {words}") == 0
    assert "after 8 steps, 24 forward passes of a batch." in capsys.readouterr().out
    checkpoint = torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert group["amsgrad"] is False and group["initial_lr"] == 0.5 and group["lr"] < 0.5
    assert len(checkpoint["state_dict"]["net.0.bias"]) == 16


def test_a_console_script_finds_the_project(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; from zo_lightning.__main__ import main; sys.exit(main())"
    )
    words = shlex.split(f"fit --model theirs.LitNet --trainer.fast_dev_run true {QUIET}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_any_checkpoint_is_loaded_by_its_class_alone() -> None:
    assert cli(f"fit --model.optimizer SGD {SHORT}") == 0
    file = RUN / "checkpoints" / "last.ckpt"
    loaded = Classifier.load_from_checkpoint(file)
    assert type(loaded.net).__name__ == "SmallCNN" and loaded.estimator.samples == 4  # type: ignore[attr-defined]
    assert isinstance(loaded.configure_optimizers()["optimizer"], torch.optim.SGD)
    state = torch.load(file, weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert cli(f"fit --model theirs.LitNet --model.width 5 {SHORT}") == 0
    theirs: type[LightningModule] = sys.modules["theirs"].LitNet
    again = theirs.load_from_checkpoint(RUN.with_name("version_1") / "checkpoints" / "last.ckpt")
    assert len(again.net[0].weight) == 5  # type: ignore[index]


def test_weights_alone_are_taken_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(f"fit {SHORT}") == 0
    file = RUN / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    frozen = "--model.optimizer SGD --model.optimizer.lr 0.0"
    assert cli(f"fit --init_from {file} {frozen} {SHORT}") == 0
    assert "after 2 steps, 16 forward passes" in capsys.readouterr().out  # a run of its own
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (RUN, RUN.with_name("version_1"))
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.optimizer SGD", "has the state of another optimizer than SGD: .* --init_from"),
        ("--model.lr_scheduler null", "has the state of another schedule than no schedule: .* --init_from"),
        ("--model.lr_scheduler StepLR --model.lr_scheduler.step_size 3", "of another schedule than StepLR: .*"),
        (f"--init_from {RUN / 'checkpoints' / 'last.ckpt'}", "ckpt_path continues a run and init_from begins one: .*"),
    ],
)
def test_a_checkpoint_of_other_settings_is_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(f"fit {SHORT}") == 0
    capsys.readouterr()
    assert cli(f"fit --ckpt_path {RUN / 'checkpoints' / 'last.ckpt'} {words} {SHORT}") == 2
    assert re.search(f"^zo-lightning: error: .*{message}$", capsys.readouterr().err.rstrip().splitlines()[-1])


ERRORS = {
    "--model Regresor": "model: unknown class 'Regresor' (did you mean Regressor?)",
    "--model theirs.LitNt": "model: cannot import 'theirs.LitNt': module 'theirs' has no attribute 'LitNt'",
    "--model theirs.LitNet --model.widht 3": "unknown option 'widht' (did you mean width?)",
    "--model theirs.LitNet --estimator PerExampl": "unknown class 'PerExampl' (did you mean PerExample?)",
    "--model theirs.LitNet --estimtor PerExample": "(did you mean --estimator?)",
    "--model theirs.LitNet --lr_scheduler StepLR --lr_scheduler.step_size 1": "lr_scheduler needs an optimizer",
    f"--model theirs.LitNet -c {ROOT / 'configs' / 'mnist.yaml'}": "sets the Classifier's net, estimator, optimizer",
    "--init_from nowhere.ckpt": "init_from 'nowhere.ckpt' does not exist",
    "--model.lr_scheduler ReduceLROnPlateau": "model.lr_scheduler: ReduceLROnPlateau needs monitor",
    "--model.lr_scheduler SequentialLR": "model.lr_scheduler: SequentialLR needs schedulers, milestones",
}


@pytest.mark.parametrize(("words", "message"), ERRORS.items(), ids=list(ERRORS))
def test_mistakes_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(f"fit {words}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and len(lines) <= 3


@pytest.mark.parametrize("estimator", ["PerExample", "ForwardGradient", "Backprop"])
def test_a_class_that_is_switched_starts_from_its_own_defaults(
    estimator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = getattr(zo, estimator)()
    model = printed(capsys, f"--model.estimator {estimator}")["model"]
    arguments = model["estimator"].get("init_args") or {}
    assert arguments.get("samples", 1) == getattr(own, "samples", 1) == 1
    if own.mu is not None:
        assert arguments["stencil"]["init_args"]["mu"] == own.mu == 1e-2
    same = printed(capsys, "--model.estimator ZerothOrder --model.optimizer AdaMM")["model"]
    assert same["estimator"]["init_args"]["samples"] == 4 and same["optimizer"]["init_args"]["lr"] == 1e-2


def test_a_short_run_ends_with_its_schedule_and_its_validation(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--trainer.limit_train_batches 2 --trainer.max_epochs 4 {QUIET}"
    assert cli(f"fit {words}") == 0
    assert "Validation accuracy" in capsys.readouterr().out
    assert (RUN / "checkpoints" / "best.ckpt").is_file()
    checkpoint = torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["lr_schedulers"][0]["T_max"] == 4
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)  # its very end


SEQUENCE = "'[{class_path: LinearLR}, {class_path: ExponentialLR, init_args: {gamma: 0.9}}]'"


@pytest.mark.parametrize(
    "words",
    [
        "ReduceLROnPlateau --model.lr_scheduler.monitor val/loss",
        "torch.optim.lr_scheduler.ReduceLROnPlateau --model.lr_scheduler.monitor val/loss",
        f"SequentialLR --model.lr_scheduler.milestones [1] --model.lr_scheduler.schedulers {SEQUENCE}",
        f"ChainedScheduler --model.lr_scheduler.schedulers {SEQUENCE}",
    ],
)
def test_schedulers_by_short_names(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(f"fit --model.lr_scheduler {words} {SHORT}") == 0
    assert "after 2 steps" in capsys.readouterr().out


def test_a_module_with_an_estimator_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    mixed = "from zo_lightning import EstimatedGradient\nclass Mixed(EstimatedGradient, LitNet):\n    pass\n"
    Path("theirs.py").write_text(THEIRS + mixed)
    assert cli(f"fit --model theirs.Mixed {SHORT}") == 0
    assert issubclass(sys.modules["theirs"].Mixed, EstimatedGradient)
    assert "after 2 steps, 4 forward passes" in capsys.readouterr().out
    assert cli(f"fit --model theirs.Mixed --estimator Backprop {SHORT}") == 2
    assert "Mixed has an estimator of its own: give --model.estimator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "keeps"),
    [
        ("--model.memory full", True),
        ("--model.optimizer SGD --model.memory lean", False),
        ("--model theirs.LitNet --trainer.callbacks GradientFree --trainer.callbacks.memory lean", False),
        ("--model theirs.LitNet", True),
        ("--model theirs.LitNet --trainer.callbacks theirs.Remembers", True),
    ],
    ids=["full", "lean", "lean callback", "neither", "a memory of another kind"],
)
def test_freed_memory_is_kept_where_time_counts_for_more(
    words: str, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("zo_lightning.cli.keep_freed_memory", lambda: calls.append(True))
    assert cli(f"fit {words} {SHORT}") == 0
    assert bool(calls) == keeps
    calls.clear()
    monkeypatch.setattr("zo_lightning.modules.memory.LARGE", 1)  # from which on `auto` is lean
    assert cli(f"fit {words} {SHORT}") == 0
    assert bool(calls) == ("full" in words)
