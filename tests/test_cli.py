"""The command line: what it runs, what it writes, and what a user reads when something is wrong."""

import configparser
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.data.idx_files import idx_bytes, write_mnist
from zo_lightning import ScalableCNN, SmallCNN
from zo_lightning.__main__ import main
from zo_lightning.snapshots import write_snapshot

ROOT = Path(__file__).resolve().parents[1]
QUIET = "--trainer.enable_progress_bar false --trainer.enable_model_summary false"
SHORT = f"--trainer.limit_train_batches 2 --trainer.max_epochs 1 --trainer.check_val_every_n_epoch 1 {QUIET}"
RUN = Path("lightning_logs", "version_0")
LAST = f"--ckpt_path {RUN / 'checkpoints' / 'last.ckpt'}"
CONFIG = f"-c {RUN / 'config.yaml'}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write into the test's own folder; LightningCLI warns of a command line that is not the one it was given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])


def cli(words: str) -> int:
    try:
        return main(shlex.split(words))
    except SystemExit as end:  # --help and --print_config
        return int(end.code or 0)


def printed_config(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    assert cli(f"fit {words} --print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


class TestRuns:
    """One run of the default, and what can be done with it afterwards."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        folder = tmp_path_factory.mktemp("trained")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["zo-lightning"])
            assert cli(f"fit {SHORT} --trainer.log_every_n_steps 1") == 0
            yield folder

    def test_fit_says_what_came_out_and_where(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli(f"fit {SHORT}") == 0
        printed = capsys.readouterr().out
        # 2 steps of 4 directions with 2 losses each
        assert re.search(r"^Validation accuracy 0\.\d{4} after 2 steps, 16 forward passes of a batch\.$", printed, re.M)
        assert f"The run is in {tmp_path / RUN};" in printed
        assert f"tensorboard --logdir {tmp_path / RUN.parent}\n" in printed

    def test_fit_writes_configuration_checkpoints_and_curves(self, trained: Path) -> None:
        assert [path.name for path in trained.iterdir()] == ["lightning_logs"]
        assert yaml.safe_load((trained / RUN / "config.yaml").read_text())["trainer"]["max_epochs"] == 1
        assert {path.name for path in (trained / RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        tags = set(EventAccumulator(str(trained / RUN)).Reload().Tags()["scalars"])
        assert {"train/loss", "train/acc", "train/loss_epoch", "val/loss", "val/acc"} <= tags
        assert {"lr", "mu", "budget/forward_passes", "skipped_steps"} <= tags

    @pytest.mark.parametrize(
        "words", [f"{CONFIG} {LAST}", f"{LAST} {CONFIG}"], ids=["config-first", "checkpoint-first"]
    )
    @pytest.mark.parametrize(("subcommand", "metric"), [("validate", "val/acc"), ("test", "test/acc"), ("predict", "")])
    def test_a_run_is_evaluated_from_its_files(
        self,
        trained: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        recwarn: pytest.WarningsRecorder,
        subcommand: str,
        metric: str,
        words: str,
    ) -> None:
        monkeypatch.chdir(trained)
        assert cli(f"{subcommand} {words} {QUIET} --trainer.logger false") == 0
        printed = capsys.readouterr()
        assert metric in printed.out
        assert "untrained" not in printed.err
        theirs = [str(warning.message) for warning in recwarn if "Jsonargparse" not in warning.category.__name__]
        assert theirs == []  # nothing that the user could mend

    @pytest.mark.parametrize(
        "words", [f"{CONFIG} {LAST}", f"{LAST} {CONFIG}"], ids=["config-first", "checkpoint-first"]
    )
    def test_a_run_is_resumed(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
    ) -> None:
        monkeypatch.chdir(trained)
        off = "--trainer.logger false --trainer.enable_checkpointing false"
        assert cli(f"fit {words} --trainer.max_epochs 2 {off}") == 0
        # 2 steps of 8 forward passes before, and 2 now; from the beginning it would be the same, without the line.
        assert "after 4 steps, 32 forward passes" in capsys.readouterr().out
        assert cli(f"fit {words} --trainer.max_epochs 1 {off}") == 0  # nothing is left to be done
        assert "Validation accuracy" not in capsys.readouterr().out

    def test_evaluating_without_a_checkpoint_is_remarked(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli(f"test {QUIET} --trainer.logger false") == 0
        assert "zo-lightning: note: test without --ckpt_path sees untrained weights\n" in capsys.readouterr().err

    def test_backprop_over_the_default_makes_no_noise(
        self, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
    ) -> None:
        words = f"--model.estimator Backprop {SHORT} --trainer.log_every_n_steps 1"
        assert printed_config(capsys, words)["model"]["estimator"]["class_path"] == "zo_lightning.Backprop"
        assert [str(warning.message) for warning in recwarn] == []
        assert cli(f"fit {words}") == 0
        printed = capsys.readouterr()
        assert "after 2 steps, 6 forward passes" in printed.out  # backpropagation counts for three
        assert "warning" not in printed.err.lower() and "discard" not in printed.err.lower()

    def test_diverged_training_ends_with_a_message_and_keeps_its_files(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = "--model.optimizer torch.optim.SGD --model.optimizer.lr 1e30 --trainer.check_val_every_n_epoch 1"
        assert cli(f"fit {words} {QUIET}") == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.match(r"zo-lightning: error: the loss is nan for 20 batches in a row, .*smaller learning rate", error)
        for name in ("config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
            assert (tmp_path / RUN / name).is_file()


class TestConfiguration:
    def test_short_names_and_options_of_what_they_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        estimator = "--model.estimator ZerothOrder --model.estimator.samples 16 --model.estimator.directions Rademacher"
        optimizer = "--model.optimizer SignSGD --model.optimizer.lr 0.1"
        model = printed_config(capsys, f"{estimator} {optimizer}")["model"]
        assert model["estimator"]["class_path"] == "zo_lightning.ZerothOrder"
        assert model["estimator"]["init_args"]["samples"] == 16
        assert model["estimator"]["init_args"]["directions"]["class_path"] == "zo_lightning.Rademacher"
        assert model["optimizer"]["class_path"] == "zo_lightning.SignSGD"
        assert model["optimizer"]["init_args"]["lr"] == 0.1

    def test_later_files_and_options_override_earlier_ones_key_by_key(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        texts = {
            "first": "model: {estimator: {class_path: ZerothOrder, init_args: {samples: 8, seed: 1}}}",
            "second": "{model: {estimator: {class_path: ZerothOrder, init_args: {samples: 16}}}, seed_everything: 3}",
        }
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        for words, samples in (
            ("-c first.yaml -c second.yaml", 16),
            ("-c second.yaml -c first.yaml", 8),
            ("-c first.yaml -c second.yaml --model.estimator.samples 2", 2),
        ):
            config = printed_config(capsys, words)
            arguments = config["model"]["estimator"]["init_args"]
            assert (arguments["samples"], arguments["seed"], config["seed_everything"]) == (samples, 1, 3)
            assert arguments["stencil"]["init_args"]["mu"] == 1e-3  # the embedded default lies below both

    @pytest.mark.parametrize(
        "words", ["", "--model.estimator Backprop --model.optimizer SignSGD --model.lr_scheduler null --data MNIST"]
    )
    def test_printed_configuration_gives_itself(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
    ) -> None:
        assert cli(f"fit {words} --print_config") == 0
        text = capsys.readouterr().out
        (tmp_path / "printed.yaml").write_text(text)
        assert cli("fit -c printed.yaml --print_config") == 0
        assert capsys.readouterr().out == text

    def test_environment_variables_lie_below_options(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("ZO_LIGHTNING_FIT__TRAINER__MAX_EPOCHS", "7")
        assert printed_config(capsys, "")["trainer"]["max_epochs"] == 7
        assert printed_config(capsys, "--trainer.max_epochs 9")["trainer"]["max_epochs"] == 9

    def test_the_whole_help_lists_options_and_environment_variables(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli("fit --help.all") == 0
        printed = capsys.readouterr().out
        for option in ("--model.estimator ", "--model.optimizer ", "--model.net ", "--data ", "--trainer.max_epochs "):
            assert option in printed
        assert "ZO_LIGHTNING_FIT__TRAINER__MAX_EPOCHS" in printed
        assert "--model.num_classes" not in printed  # comes from the data


class TestProcess:
    """What only a process of its own can show."""

    def test_version_imports_nothing_heavy(self) -> None:
        setup = configparser.RawConfigParser()
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        code = """if True:
            import runpy, sys
            sys.argv = ["zo-lightning", "--version"]
            try:
                runpy.run_module("zo_lightning", run_name="__main__")
            except SystemExit as end:
                print(end.code, sorted({"torch", "pytorch_lightning"} & set(sys.modules)))
        """
        assert python("-c", code).stdout == f"zo-lightning {setup['metadata']['version']}\n0 []\n"

    def test_command_line_leaves_slow_libraries_to_those_who_need_them(self) -> None:
        code = """if True:
            import sys
            import pytorch_lightning.cli  # whose torchmetrics imports matplotlib where it is installed
            before = set(sys.modules)
            import zo_lightning.cli
            print(sorted({"sklearn", "matplotlib", "tensorboard", "scipy"} & (set(sys.modules) - before)))
        """
        assert python("-c", code).stdout == "[]\n"

    def test_error_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        done = python("-m", "zo_lightning", "fit", "--model.estimator.samples", "0")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1] == "zo-lightning: error: samples must be at least 1, got 0"
        assert len(done.stderr.splitlines()) <= 3
        assert list(tmp_path.iterdir()) == []


SMALL_CNN = [f"net.{name}" for name in SmallCNN().state_dict()]


@pytest.fixture
def bad_files(tmp_path: Path) -> None:
    """What the bad inputs name."""
    configs = {
        "unknown_key": "model:\n  estimtor: ZerothOrder\n",
        "unknown_option": "model: {estimator: {class_path: ZerothOrder, init_args: {smaples: 3}}}\n",
        "callback_option": "trainer: {callbacks: [{class_path: WeightSnapshots, init_args: {kep: 3}}]}\n",
        "broken": "model: [1, {\n",
        "section": "trainer: 3\n",
        "class_number": "model: {estimator: {class_path: 3}}\n",
        "init_args": "model: {estimator: {class_path: ZerothOrder, init_args: 0.5}}\n",
        "beside": "model: {estimator: {class_path: ZerothOrder, samples: 2}}\n",
        "clas_path": "model: {estimator: {clas_path: ZerothOrder, init_args: {samples: 2}}}\n",
        "key_number": "model: {1: 2}\n",
        "union": "data: 0.5\n",
        "callable": "model: {optimizer: 3}\n",
        "no_module": "model: {optimizer: {class_path: a.b.C}}\n",
        "prose": "this is no configuration\n",
        "cycle": "model: &a {net: *a}\n",
        "aliases": "a: &a [1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefgh")),
        "digits": f"seed_everything: {'9' * 6000}\n",
        "deep": "model: " + "[" * 3000,
        "date": "model: {net: 2001-99-99}\n",
        "code": "model: !!python/object/apply:os.system ['touch ran']\n",
    }
    (tmp_path / "utf16.yaml").write_bytes("model: {}".encode("utf-16"))
    (tmp_path / "latin1.yaml").write_bytes("#   caf\xe9".encode("latin-1")[1:])
    for name, text in configs.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "file").touch()
    for name in ("truncated", "labels"):
        write_mnist(tmp_path / name / "MNIST" / "raw")
    images = tmp_path / "truncated/MNIST/raw/train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    (tmp_path / "labels/MNIST/raw/train-labels-idx1-ubyte").write_bytes(idx_bytes(torch.full((20,), 11)))
    (tmp_path / "prose.ckpt").write_text("this is no checkpoint\n")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "bare.ckpt")
    write_snapshot(tmp_path / "other" / "snapshots", {name: torch.zeros(1) for name in SMALL_CNN}, 0, 0)
    state = {f"net.{name}": value for name, value in ScalableCNN().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "scalable.ckpt")


BAD_INPUTS = {
    # values out of range
    "fit --model.estimator.stencil.mu 0": r"mu must be a positive finite number such as 1e-3, got 0\.0",
    "fit --model.estimator.stencil.mu -1": r"mu must be a positive finite number such as 1e-3, got -1\.0",
    "fit --model.estimator.stencil.mu .nan": "mu must be a positive finite number such as 1e-3, got nan",
    "fit --model.estimator.samples 0": "samples must be at least 1, got 0",
    "fit --model.estimator.samples two": "samples: expected a whole number, got 'two'",
    "fit --model.optimizer.lr -1": r"lr must be a finite number of at least 0, got -1\.0",
    "fit --model.optimizer.lr zero": "lr: expected a number, got 'zero'",
    "fit --model.optimizer Adam --model.optimizer.lr fast": "lr: expected a number, got 'fast'",
    "fit --model.optimizer.betas [1.0,0.9]": r"betas\[0\] must be in \[0, 1\), got 1\.0",
    "fit --data.batch_size 0": "batch_size=0 must be a whole number of at least 1",
    "fit --data.val_size 5000": "val_size=5000 must be below the number of training images, 1433",
    # names
    "fit --model.estimator ZerothOrdr": r"'ZerothOrdr' \(did you mean ZerothOrder\?\); there are .*Backprop, .*",
    "fit --model.optimizer Adm": r"unknown class 'Adm' \(did you mean Adam\?\); there are .*AdaMM.*SignSGD.*",
    "fit --model.estimator.directions Spher": r"'Spher' \(did you mean Sphere\?\); there are .*Gaussian.*Rademacher.*",
    "fit --model.net SmalCNN": r"'SmalCNN' \(did you mean SmallCNN\?\); there are .*ScalableCNN, SmallCNN, SmallVGG.*",
    "fit --data MNST": r"'MNST' \(did you mean MNIST\?\); there are .*CIFAR10Images, Digits, FashionMNIST, MNIST.*",
    "fit --model.estimtor Backprop": r"unknown .*--model.estimtor.* \(did you mean --model.estimator\?\)",
    "fit --model.estimator.smaples 3": r"unknown option 'smaples' \(did you mean samples\?\)",
    "fit --data.root x": r"unknown option 'root' here \(did you mean data\.root of .*Images, FashionMNIST, MNIST\?\)",
    "fit --model.estimator.lr 3": r"unknown option 'lr' here \(did you mean model\.optimizer\.lr\?\)",
    "fit --model.estimator.mu 3": r"'mu' here \(did you mean model\.estimator\.stencil\.mu of .*\?\)",
    "fit --model.optimizer.learning_rate 1": r"'learning_rate' here \(did you mean model\.optimizer\.lr\?\)",
    "fit --model.estimator.q 1": r"'q' here \(did you mean model\.estimator\.samples of .*\?\)",
    "fit --trainer.epochs 1": r"unknown argument --trainer\.epochs 1 \(did you mean --trainer\.max_epochs\?\)",
    "fit --epochs 1": r"unknown argument --epochs 1 \(did you mean --trainer\.max_epochs\?\)",
    "fti": r"unknown command 'fti' \(did you mean fit\?\); there are fit, .*, study, report, replay, export, configs",
    "stduy -c study/smoke": r"unknown command 'stduy' \(did you mean study\?\).*",
    "": "a command is missing; there are fit, validate, test, predict, tune, study, .*",
    # configurations
    "fit -c unknown_key.yaml": r"unknown key 'model.estimtor' \(did you mean model.estimator\?\)",
    "fit -c unknown_option.yaml": r"unknown option 'smaples' \(did you mean samples\?\)",
    "fit -c nowhere.yaml": r"'nowhere\.yaml' is neither a file nor a configuration .*; see zo-lightning configs",
    "fit -c minst": r"'minst' is neither .* \(did you mean mnist\?\).*",
    "fit --config=backprp": r"'backprp' is neither .* \(did you mean estimator/backprop\?\).*",
    "study -c smoke": r"'smoke' is neither .* \(did you mean study/smoke\?\).*",
    "fit -c broken.yaml": r".*broken\.yaml.*",  # of several files, which one?
    "fit -c prose.yaml": r".*prose\.yaml.*",
    "fit -c section.yaml": r"section\.yaml: trainer must be options by name, got 3",
    "fit -c class_number.yaml": r"yaml: model\.estimator\.class_path must be the name of a class, got 3",
    "fit -c init_args.yaml": r"yaml: model\.estimator\.init_args must be options by name, got 0\.5",
    "fit -c beside.yaml": r"samples is unknown beside class_path: options of the class stand in init_args",
    "fit -c clas_path.yaml": r"clas_path is unknown beside init_args \(did you mean class_path\?\)",
    "fit -c key_number.yaml": r"yaml: model: names of options are text, got 1",
    "fit -c union.yaml": r"yaml: data: expected LightningDataModule or null, got '0\.5'",
    "fit -c callable.yaml": r"model\.optimizer: expected the name of a class, or class_path and init_args, got '3'",
    "fit -c no_module.yaml": r"model\.optimizer: cannot import 'a\.b\.C': No module named 'a'",
    f"fit --model.net {'x' * 3000}": r"unknown class 'x+\.\.\.'; there are .*",
    "fit -c cycle.yaml": r"cycle\.yaml: nested too deep, or an alias \(\*name\) stands within what it names",
    "fit -c aliases.yaml": r"aliases\.yaml: its aliases \(\*name\) stand for more than 100,000 values",
    "fit -c utf16.yaml": r"utf16\.yaml: not text in UTF-8: byte 0 is 0xff",
    "fit -c latin1.yaml": r"latin1\.yaml: not text in UTF-8: byte 6 is 0xe9",
    "fit -c digits.yaml": r"digits\.yaml: Exceeds the limit .* value has 6000 digits",
    "fit -c deep.yaml": r"deep\.yaml: nested too deep, or .*",
    "fit -c date.yaml": r"date\.yaml: month must be in 1\.\.12",
    "fit -c code.yaml": r"code\.yaml: not YAML: could not determine a constructor for the tag .*os\.system.*",
    "fit --seed_everything 99999999999": "seed_everything: 99999999999 is not in bounds, .*",
    "study -c aliases.yaml": r"aliases\.yaml: its aliases \(\*name\) stand for more than 100,000 values",
    # callbacks
    "fit --trainer.callbacks WeightSnapshts": r"unknown class 'WeightSnapshts' \(did you mean WeightSnapshots\?\).*",
    "fit -c callback_option.yaml": r"callback_option\.yaml: unknown option 'kep' \(did you mean keep\?\)",
    "fit --trainer.callbacks WeightSnapshots --trainer.callbacks.keep 0": "keep must be at least 1, got 0",
    "fit --reference nowhere": "reference 'nowhere': no callback compares with it; add -c callbacks/observe",
    "fit --trainer.callbacks WeightSimilarity --reference nowhere": "reference: run 'nowhere' does not exist",
    "fit --trainer.callbacks FilterProjection --reference other": r".* net\.conv1\.weight .* and \(1,\) in .*",
    # data
    "fit --data MNIST --data.root nowhere --data.download false": "root 'nowhere' does not exist; .*download to true",
    "fit --data MNIST --data.root file": "root 'file' is a file; MNIST needs a folder",
    "fit --data MNIST --data.root truncated": "'truncated/MNIST/raw/train-images-idx3-ubyte' is truncated: .*",
    "fit --data MNIST --data.root labels": "MNIST training set: label 11 is outside the classes 0 to 9",
    # a net and data
    "fit --model.net.in_channels 3": r"SmallCNN does not suit Digits, whose images are \(1, 28, 28\): .*channels",
    "fit --model.net.num_classes 7": r"SmallCNN does not suit Digits: its output is \(2, 7\), not 10 numbers .*",
    # checkpoints
    "test --ckpt_path nowhere.ckpt": "ckpt_path 'nowhere.ckpt' does not exist",
    "test --ckpt_path prose.ckpt": "ckpt_path 'prose.ckpt' is damaged or not a checkpoint",
    "test --ckpt_path bare.ckpt": "ckpt_path 'bare.ckpt' holds no Lightning checkpoint: it has no state_dict",
    "test --ckpt_path scalable.ckpt": r"of another architecture: net.conv2.weight .* \(3, 3, 3, 3\) in the checkpoint",
    "fit --ckpt_path scalable.ckpt": r"of another architecture: net.conv2.weight .* \(3, 3, 3, 3\) in the checkpoint",
}


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(("words", "message"), BAD_INPUTS.items(), ids=[words or "nothing" for words in BAD_INPUTS])
def test_bad_input_is_one_clear_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    before = set(tmp_path.rglob("*"))
    assert cli(words) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert re.fullmatch(f"zo-lightning: error: .*{message}.*", lines[-1])
    assert len(lines) <= 3
    assert "Traceback" not in printed.err and "usage:" not in printed.err
    assert set(tmp_path.rglob("*")) == before
