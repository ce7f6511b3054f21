import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from zo_lightning.__main__ import main

ROOT = Path(__file__).parent.parent
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.check_val_every_n_epoch", "1"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])  # LightningCLI warns about extra words of pytest's


def printed_config(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--print_config"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


class NaNNet(nn.Module):
    """Its loss is always NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight.expand(len(images), 10) * torch.nan


def test_the_default_from_fit_to_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SHORT, "--trainer.log_every_n_steps", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Validation accuracy 0\.\d+ after 3 steps, 24 forward passes", out)
    assert "tensorboard --logdir" in out
    run = tmp_path / "lightning_logs" / "version_0"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    events = EventAccumulator(str(run))
    events.Reload()
    tags = {"train/loss", "train/acc", "train/loss_epoch", "val/loss", "val/acc", "lr", "mu"}
    assert tags | {"budget/forward_passes", "skipped_steps"} <= set(events.Tags()["scalars"])
    same = ["-c", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert main(["test", *same]) == 0
    assert "test/acc" in capsys.readouterr().out
    assert main(["validate", *same]) == 0
    assert main(["predict", *same]) == 0


def test_short_names_and_overlays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = "--model.estimator ZerothOrder --model.estimator.samples 16 --model.estimator.directions Rademacher"
    config = printed_config(capsys, *words.split(), *["--model.optimizer", "SignSGD", "--model.optimizer.lr", "0.5"])
    for shown in ("zo_lightning.Rademacher", "samples: 16", "zo_lightning.SignSGD", "lr: 0.5"):
        assert shown in config
    for name, samples in (("a", 3), ("b", 5)):
        Path(f"{name}.yaml").write_text(f"model:\n  estimator:\n    init_args:\n      samples: {samples}\n")
    assert "samples: 5" in printed_config(capsys, "-c", "a.yaml", "-c", "b.yaml")
    assert "samples: 3" in printed_config(capsys, "-c", "b.yaml", "-c", "a.yaml")
    assert "zo_lightning.Backprop" in printed_config(capsys, "--model.estimator", "Backprop")


def test_print_config_round_trips(capsys: pytest.CaptureFixture[str]) -> None:
    first = printed_config(capsys, "--model.estimator.samples", "7")
    Path("c.yaml").write_text(first)
    assert printed_config(capsys, "-c", "c.yaml") == first


def test_environment_variables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZO_LIGHTNING_FIT__TRAINER__MAX_EPOCHS", "17")
    assert "max_epochs: 17" in printed_config(capsys)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    weights = []
    for run, seed in enumerate((1, 1, 2)):
        assert main(["fit", *SHORT, "--seed_everything", str(seed)]) == 0
        checkpoint = torch.load(f"lightning_logs/version_{run}/checkpoints/last.ckpt", weights_only=True)
        weights.append(torch.cat([value.flatten() for value in checkpoint["state_dict"].values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zo-lightning {setup['metadata']['version']}\n"


@pytest.mark.parametrize(
    ("statement", "given", "absent"),
    [
        ("import zo_lightning.__main__ as m; m.main(['--version'])", "", {"torch", "pytorch_lightning"}),
        ("import zo_lightning.cli", "import pytorch_lightning.cli", {"sklearn", "matplotlib", "torchvision"}),
    ],
)
def test_what_is_not_imported(statement: str, given: str, absent: set[str]) -> None:
    """Nothing heavy beyond what Lightning itself has imported."""
    check = (
        f"{given}\nimport sys\nold = set(sys.modules)\n{statement}\nsys.exit(bool((set(sys.modules) - old) & {absent}))"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


BAD: dict[str, tuple[str, str]] = {
    "mu below 0": ("--model.estimator.stencil.mu -1", r"mu must be a positive finite number .* got -1\.0"),
    "mu not a number": ("--model.estimator.stencil.mu .nan", "mu must be a positive finite number .* got nan"),
    "no samples": ("--model.estimator.samples 0", "samples must be at least 1, got 0"),
    "samples in words": ("--model.estimator.samples two", "samples: expected int, got 'two'"),
    "lr below 0": ("--model.optimizer.lr -1", "lr must be a finite number of at least 0, got -1.0"),
    "lr of torch below 0": ("--model.optimizer SGD --model.optimizer.lr -1", "Invalid learning rate: -1.0"),
    "betas": ("--model.optimizer.betas [1.0,0.9]", r"betas\[0\] must be in \[0, 1\), got 1.0"),
    "estimator": ("--model.estimator Zeroth", "unknown class 'Zeroth' .did you mean ZerothOrder.*Backprop, Forward"),
    "optimizer": ("--model.optimizer AdaM", "unknown class 'AdaM' .*AdaMM"),
    "direction": ("--model.estimator.directions Spere", "unknown class 'Spere' .did you mean Sphere"),
    "net": ("--model.net SmalCNN", "unknown class 'SmalCNN' .did you mean SmallCNN.*ScalableCNN"),
    "data": ("--data MNST", "unknown class 'MNST' .did you mean MNIST.*Digits"),
    "batch size": ("--data.batch_size 0", "batch_size=0 must be a whole number of at least 1"),
    "validation size": ("--data.val_size 9999", "val_size=9999 must be below the number of training images, 1433"),
    "option": ("--trainer.max_epochz 3", "unknown argument --trainer.max_epochz 3 .did you mean --trainer.max_epochs"),
    "component's option": ("--model.estimator.sample 3", "unknown option 'sample' .did you mean samples"),
    "key": ("-c key.yaml", "unknown key 'model.estimater' .did you mean model.estimator"),
    "no such file": ("-c absent.yaml", "File does not exist: .*absent.yaml"),
    "not YAML": ("-c broken.yaml", "Problems parsing config"),
    "no data": ("--data MNIST --data.root absent --data.download false", "root 'absent' does not exist"),
    "root is a file": ("--data MNIST --data.root key.yaml", "root 'key.yaml' is a file"),
    "no checkpoint": ("--ckpt_path absent.ckpt", "ckpt_path 'absent.ckpt' does not exist"),
    "not a checkpoint": ("--ckpt_path key.yaml", "ckpt_path 'key.yaml' is damaged or not a checkpoint"),
    "another architecture": (
        "--ckpt_path other.ckpt",
        r"of another architecture: net.conv1.weight has shape \(1, 2\) there and \(3, 1, 5, 5\) in the model",
    ),
    "accelerator": ("--trainer.accelerator abacus", "abacus"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("key.yaml").write_text("model:\n  estimater:\n    class_path: ZerothOrder\n")
    Path("broken.yaml").write_text("model: [\n")
    torch.save({"state_dict": {"net.conv1.weight": torch.zeros(1, 2)}}, "other.ckpt")
    before = sorted(tmp_path.rglob("*"))
    assert main(["fit", *SHORT, *words.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert lines[-1].startswith("zo-lightning: error: ")
    assert len(lines) <= 2
    assert re.search(message, lines[-1])
    assert sorted(tmp_path.rglob("*")) == before


def test_no_or_an_unknown_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["fitt"]):
        assert main(words) == 2
        assert "zo-lightning: error: " in capsys.readouterr().err


def test_a_run_that_diverges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model.net", f"{__name__}.NaNNet", "--trainer.max_epochs", "3"]) == 1
    assert "the loss is nan for 20 steps in a row, at step 0: training stops" in capsys.readouterr().err
