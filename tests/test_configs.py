"""Every file in configs/ is run by the very command that its second line gives, cut short."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

from zo_lightning.__main__ import main
from zo_lightning.data.downloaded import DownloadedDataModule

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
SHORT = [
    "--trainer.max_epochs",
    "1",
    "--trainer.limit_train_batches",
    "2",
    "--trainer.limit_val_batches",
    "1",
    "--trainer.logger",
    "false",
    "--trainer.enable_checkpointing",
    "false",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.num_sanity_val_steps",
    "0",
]


def fake(self: DownloadedDataModule, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    n = 6000 if train else 300
    images = torch.randint(256, (n, self.in_channels, self.image_size, self.image_size), dtype=torch.uint8)
    return images, torch.arange(n) % self.num_classes


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_documented_command_runs(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, words = (ROOT / config).read_text().splitlines()[1].split("zo-lightning ")
    assert prefix.strip() == "#"
    assert str(config) in words
    # The images are made up: what is tested is the file, not the data set, which need not be there.
    monkeypatch.setattr("zo_lightning.data.MNIST.load", fake)
    monkeypatch.setattr("zo_lightning.data.CIFAR10.load", fake)
    monkeypatch.setattr(DownloadedDataModule, "_missing", lambda self: [])
    monkeypatch.setattr("zo_lightning.data.MNIST.check_files", lambda self: None)
    monkeypatch.setattr("zo_lightning.data.CIFAR10.check_files", lambda self: None)
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(words), *SHORT, "--trainer.default_root_dir", str(tmp_path)]) == 0
