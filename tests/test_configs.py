"""Every file under configs/, by the command that its second line documents."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from zo_lightning.__main__ import main
from zo_lightning.data import CIFAR10, CIFAR10Images, FashionMNIST, InMemoryDataModule

CONFIGS = Path(__file__).resolve().parents[1] / "zo_lightning" / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
LIMITS = """
    --trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1
    --trainer.num_sanity_val_steps 0 --trainer.check_val_every_n_epoch 1 --trainer.accelerator cpu
    --trainer.logger false --trainer.enable_checkpointing false
    --trainer.enable_progress_bar false --trainer.enable_model_summary false
"""

# What goes to the logger, and to files where there is none.
WRITES = {"observe.yaml": ("images", "scalars.csv", "snapshots")}


def documented_command(file: Path) -> list[str]:
    program, *words = shlex.split(file.read_text(encoding="utf-8").splitlines()[1].removeprefix("#"))
    assert program == "zo-lightning"
    return words


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in place of what a test must not download."""

    def noise(self: InMemoryDataModule, train: bool) -> tuple[Tensor, Tensor]:
        shape = (300, self.in_channels, self.image_size, self.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8), torch.arange(300) % self.num_classes

    for data_class in (FashionMNIST, CIFAR10):
        monkeypatch.setattr(data_class, "load", noise)
        monkeypatch.setattr(data_class, "_missing", lambda self: [])
        monkeypatch.setattr(data_class, "check_files", lambda self: None)
    monkeypatch.setattr(CIFAR10Images, "load", noise)
    monkeypatch.setattr(CIFAR10Images, "_archive", lambda self: Path())
    monkeypatch.setattr("zo_lightning.data.cifar10_images.decoded", lambda archive: {})


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(CONFIGS)) for file in FILES])
def test_documented_command_runs(
    file: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = documented_command(file)
    assert file.relative_to(CONFIGS).with_suffix("").as_posix() in words
    if "--data.root" in words:
        words[words.index("--data.root") + 1] = str(request.getfixturevalue("mnist_root"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])
    is_study = words[0] == "study"
    code = main([*words, *shlex.split("--dry-run --data.batch_size 8" if is_study else LIMITS)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert ("cells, 0 of them finished" if is_study else "after 2 steps") in printed.out
    assert {path.name for path in tmp_path.iterdir()} == set(WRITES.get(file.name, ()))


def optimizers(node: Any) -> Iterator[dict[str, Any]]:
    """All optimizers in a configuration that say what class they are of."""
    if isinstance(node, dict):
        found = node.get("optimizer")
        if isinstance(found, dict) and "class_path" in found:
            yield found
        for value in node.values():
            yield from optimizers(value)


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(CONFIGS)) for file in FILES])
def test_betas_are_written_where_the_optimizer_is_chosen(file: Path) -> None:
    """Where a file beneath has some, an overlay that changes the class alone would inherit them unseen."""
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    for method in (config.get("methods") or {"": config}).values():
        chosen = [one for one in optimizers({**method, "by_task": None}) if "Adam" in one["class_path"]]
        assert all("betas" in one["init_args"] for one in chosen)
