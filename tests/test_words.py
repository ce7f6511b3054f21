"""A command line is seen to be wrong before anything heavy is imported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from zo_lightning.cli import CLI
from zo_lightning.presets import find, names
from zo_lightning.user_errors import UserError
from zo_lightning.words import COMMANDS, OF_LIGHTNING, check_options

ROOT = Path(__file__).resolve().parents[1]

PROBE = """if True:
    import sys
    from zo_lightning.__main__ import main
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code
    heavy = {"torch", "pytorch_lightning", "pandas", "numpy", "matplotlib", "jsonargparse"} & set(sys.modules)
    print("code", code, sorted(heavy))
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("fit --help", 0),
        ("test -h", 0),
        ("study --help", 0),
        ("report --help", 0),
        ("replay --help", 0),
        ("export --help", 0),
        ("configs", 0),
        ("configs minst", 2),
        ("", 2),
        ("fti", 2),
        ("fit --modle x", 2),
        ("fit -c mnist --trainer.epochs 3", 2),
        ("fit -c minst", 2),
        ("study --job 3 -c study/smoke", 2),
        ("study -c smoke", 2),
        ("report", 2),
        ("replay run --too 3", 2),
    ],
)
def test_words_alone_import_nothing_heavy(tmp_path: Path, words: str, code: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words.split()],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == f"code {code} []", done.stderr
    assert done.stderr.count("\n") == (1 if code else 0)


class _Made(Exception):
    """The parsers are made, and nothing is parsed."""


class _OnlyParsers(CLI):
    made: ClassVar[dict[str, Any]] = {}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        type(self).made = self._subcommand_parsers
        raise _Made


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "another"])
def test_names_are_those_of_the_parser(foreign: bool) -> None:
    """None that exists is refused; the other way round the parser has the last word."""
    words = ["fit", "--model", "pytorch_lightning.demos.boring_classes.BoringModel"] if foreign else ["fit"]
    with pytest.raises(_Made):
        _OnlyParsers(words)
    assert set(_OnlyParsers.made) == set(OF_LIGHTNING) < set(COMMANDS)
    for command, parser in _OnlyParsers.made.items():
        for option in parser._option_string_actions:
            if option.startswith("--"):
                check_options([command, *(["--model", "LitNet"] if foreign else []), option])


@pytest.mark.parametrize(
    "words",
    [
        "fit --trainer.callbacks+ WeightSnapshots --trainer.callbacks.keep 2",
        "fit --trainer.logger.help CSVLogger",
        "fit --model.estimator.init_args.samples=3",
        "fit --model their.LitNet --model.anything 3 --estimator PerExample --optimizer.lr 3",
        "fit --data.anything 3 --print_config=skip_null",
        "fit --model.optimizer.lr -1",
        "predict --return_predictions false --ckpt_path last",
        "validate --verbose false",
        "fit --help.all",
    ],
)
def test_what_is_right_passes(words: str) -> None:
    check_options(words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fit --modle x --seed_everything 1", r"unknown argument --modle x \(did you mean --model\?\)"),
        ("fit --model.nett=x", r"unknown argument --model\.nett=x \(did you mean --model\.net\?\)"),
        ("fit --checkpoint.monitr x", r"unknown argument --checkpoint\.monitr x \(did you mean .*\.monitor\?\)"),
        ("fit --verbos --model.net x", r"unknown argument --verbos"),
        ("fit --epochs 3", r"unknown argument --epochs 3 \(did you mean --trainer\.max_epochs\?\)"),
        ("fit --estimator Backprop", r"unknown argument --estimator Backprop \(did you mean --model\.estimator\?\)"),
    ],
)
def test_what_is_wrong_is_named(words: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_options(words.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {net: SmallCNN}", r"unknown key 'modle' \(did you mean model\?\)"),
        ("trainer: {max_epoch: 3}", r"unknown key 'trainer\.max_epoch' \(did you mean trainer\.max_epochs\?\)"),
        ("model: {estimtor: Backprop}", r"unknown key 'model\.estimtor' \(did you mean model\.estimator\?\)"),
    ],
)
def test_a_key_of_a_configuration_is_named_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"{text}\nseed_everything: 3\n")
    with pytest.raises(UserError, match=rf"mine\.yaml: {message}$"):
        check_options(["fit", "-c", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize("command", OF_LIGHTNING)
def test_all_configurations_that_come_with_the_package_pass(command: str) -> None:
    for name in names():
        if not name.startswith("study/"):
            check_options([command, "-c", str(find(name))])


def test_a_pipe_is_left_to_the_parser(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    check_options(["fit", "-c", str(pipe)])  # would wait for ever if it were read


def test_a_configuration_comes_from_a_pipe(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f"{sys.executable} -m zo_lightning fit -c <(echo 'trainer: {{max_epochs: 7}}') --print_config"
    done = subprocess.run(
        ["bash", "-c", line], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "max_epochs: 7" in done.stdout, done.stderr
