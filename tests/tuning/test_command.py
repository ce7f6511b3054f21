"""``zo-lightning tune``: the options of fit, two files, one command to go on with."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from zo_lightning.commands import main

SHORT = ["--trainer.max_epochs", "1", "--data.batch_size", "200", "--trainer.enable_progress_bar", "false"]


class Foreign(LightningModule):
    """Somebody's, with its data."""

    stops = False

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if type(self).stops:
            raise KeyboardInterrupt
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def train_dataloader(self) -> Any:
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1)), batch_size=8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


FOREIGN = ["--model", "tests.tuning.test_command.Foreign", "--trainer.max_epochs", "1"]


@pytest.fixture(autouse=True)
def _at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zo_lightning.tuning.tuner._FEWEST", 4)  # what is found is another test's matter


def test_two_numbers_a_picture_and_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *SHORT]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "lightning_logs" / "version_0"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "tune.png", "tune.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lightning_logs"]
    text = (folder / "tune.yaml").read_text()
    assert text in out
    model = yaml.safe_load(text)["model"]
    assert model["estimator"]["init_args"]["stencil"]["init_args"]["mu"] > 0
    assert Image.open(folder / "tune.png").size[0] > 500

    (command,) = [line for line in out.splitlines() if line.startswith("  zo-lightning fit")]
    words = shlex.split(command)[1:]
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]
    assert printed["optimizer"]["init_args"]["lr"] == model["optimizer"]["init_args"]["lr"]
    assert printed["optimizer"]["init_args"]["betas"] == [0.9, 0.99]  # as before
    assert printed["estimator"]["init_args"]["samples"] == 4
    given = model["estimator"]["init_args"]["stencil"]["init_args"]["mu"]
    assert printed["estimator"]["init_args"]["stencil"]["init_args"]["mu"] == given


def test_help_is_that_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("zo-lightning tune: find mu and the learning rate") and "--model.optimizer.lr" in out


def test_anybodys_module(tmp_path: Path) -> None:
    assert main(["tune", *FOREIGN]) == 0
    changed = yaml.safe_load((tmp_path / "lightning_logs/version_0/tune.yaml").read_text())
    assert changed["estimator"]["class_path"] == "ZerothOrder"
    assert changed["model"]["init_args"].keys() == {"learning_rate"}
    assert main(["fit", *FOREIGN, "-c", "lightning_logs/version_0/tune.yaml"]) == 0
    config = yaml.safe_load((tmp_path / "lightning_logs/version_1/config.yaml").read_text())
    assert config["model"]["init_args"] == changed["model"]["init_args"]


def test_backpropagation_has_a_rate_alone(tmp_path: Path) -> None:
    assert main(["tune", *FOREIGN, "--estimator", "Backprop"]) == 0
    assert yaml.safe_load((tmp_path / "lightning_logs/version_0/tune.yaml").read_text()).keys() == {"model"}


def test_ctrl_c_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Foreign, "stops", True)
    assert main(["tune", *FOREIGN]) == 130
    assert "tune was stopped: nothing is written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_numbers_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *FOREIGN, "--trainer.logger", "false"]) == 0
    assert "learning_rate: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.max_epochs", "quick"], "trainer.max_epochs: expected"),
        (["--ckpt_path", "last"], "ckpt_path last: there is no last.ckpt"),
        (["--trainer.epochs", "1"], "did you mean --trainer.max_epochs?"),
    ],
)
def test_mistakes_are_said_in_a_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if "zo-lightning: error" in line]) == 1 and message in error[-1]
