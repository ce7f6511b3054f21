"""The help of every day: short, and true."""

import re
from typing import Any

import pytest
import yaml

from zo_lightning.__main__ import main
from zo_lightning.cli_errors import _class_names
from zo_lightning.words import COMMANDS, OF_LIGHTNING


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *OF_LIGHTNING])
def test_help_is_a_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, *filter(None, [command]), "--help").splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 128


def test_all_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "-h")
    assert re.findall(r"^  (\w+)  ", page, re.MULTILINE) == list(COMMANDS)


def options_of(page: str) -> dict[str, str]:
    """The options of a page, and the default that it shows."""
    lines = re.findall(r"^  (?:-c, )?--([\w.]+)\+? .*?(?: \[([^\]]+)\])?$", page, re.MULTILINE)
    return dict(lines)


VALUES = {
    "config": "mnist",
    "data.root": "data",
    "model.lr_scheduler": "null",
    "model.memory": "lean",
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.logger": "CSVLogger",
    "trainer.callbacks": "WeightSnapshots",
    "trainer.enable_progress_bar": "false",
    "checkpoint.monitor": "val/acc",
    "init_from": "file",
    "ckpt_path": "last",
    "reference": "run",
}
"""What is given to the options that have no default, and are no numbers."""
ELSEWHERE = ("model", "estimator", "init_from")  # with a module of another project; not beside ckpt_path


@pytest.mark.parametrize("command", OF_LIGHTNING)
def test_options_of_the_page_exist_and_have_these_defaults(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(shown(capsys, command, "--help"))
    assert {"config", "model.net", "data", "data.root", "data.batch_size", "seed_everything", "ckpt_path"} <= set(
        options
    )
    assert command != "fit" or {"model.estimator", "model.optimizer.lr", "trainer.max_epochs"} <= set(options)
    monkeypatch.setattr("zo_lightning.cli.read_checkpoint", lambda *_: None)
    words = [command, "--config", "mnist"]
    for name, default in options.items():
        if name not in (*ELSEWHERE, "config"):
            words += [f"--{name}", "MNIST" if name == "data" else default or VALUES.get(name, "1")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert not ended.value.code
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([command, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    for name, default in options.items():
        if default:
            assert default in (str(value := _value(config, name)), str(value).rpartition(".")[2]), name


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get("init_args", config)[part]
    return config.get("class_path") if isinstance(config, dict) else config


def test_a_page_is_asked_for_by_its_own_words_only() -> None:
    with pytest.raises(SystemExit) as ended:  # argparse's, of a command that is not Lightning's
        main(["study", "--help"])
    assert ended.value.code == 0


def test_classes_that_the_page_names_are_all_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "fit", "--help")
    for option, ours in {
        "model.estimator": _class_names("estimator"),
        "model.estimator.directions": _class_names("directions"),
        "model.net": _class_names("net"),
        "data": _class_names("data"),
        "model.optimizer": ["AdaMM", "NormalizedSGD", "SignSGD"],
    }.items():
        [text] = re.findall(rf"^  --{option} CLASS +(.*?)(?:,? or any .*)?(?: \[\w+\])?$", page, re.MULTILINE)
        assert sorted(re.split(r", | or ", text)) == ours, option
