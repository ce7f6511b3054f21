"""The words of a command line: its commands and options, seen to exist before anything heavy is imported."""

import ast
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from zo_lightning.user_errors import UserError, nearest, nearest_option
from zo_lightning.yaml_files import read_text

ENVIRONMENT = "ZO_LIGHTNING"

OF_LIGHTNING = {
    "fit": "train, by forward passes or by backpropagation",
    "validate": "evaluate a checkpoint on the validation set",
    "test": "evaluate a checkpoint on the test set",
    "predict": "write what a checkpoint predicts",
}
OTHERS = {
    "tune": "find mu and the learning rate for what fit would train, by measuring both",
    "study": "train a grid of methods, tasks and seeds, and go on where it was stopped",
    "report": "figures, tables and one page from a study's runs",
    "replay": "rebuild the weights of any step of a run from its log, without data or forward passes",
    "export": "write a run's start and log as one file, to send to a colleague",
    "configs": "list the configurations of the package, or copy them",
}
COMMANDS = {**OF_LIGHTNING, **OTHERS}
"""All commands, and what they do."""

_ANYWHERE = ("config", "data", "help", "init_from", "model", "print_config", "reference", "seed_everything")
_OF_OTHERS_MODELS = ("estimator", "lr_interval", "lr_scheduler", "optimizer")
_FROM_PYTHON = ("model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule")
_TRAINER = ("pytorch_lightning", "trainer/trainer.py", "Trainer")
SECTIONS = {
    "trainer": _TRAINER,
    "checkpoint": ("pytorch_lightning", "callbacks/model_checkpoint.py", "ModelCheckpoint"),
    "last_checkpoint": ("zo_lightning", "callbacks/last_checkpoint.py", "LastCheckpoint"),
    "trajectory_log": ("zo_lightning", "callbacks/trajectory_log.py", "TrajectoryLog"),
    "progress_bar": ("zo_lightning", "callbacks/progress_bar.py", "ProgressBar"),
}
"""The options of a section are the parameters of a class: its package, file and name."""
_CLASSIFIER = ("zo_lightning", "modules/classifier.py", "Classifier")


def check_command(words: Sequence[str]) -> None:
    """Raise UserError where a command line begins with no command, and no option."""
    if words and (words[0].startswith("-") or words[0] in COMMANDS):
        return
    problem = f"unknown command '{words[0]}'{nearest(words[0], COMMANDS)}" if words else "a command is missing"
    raise UserError(f"{problem}; there are {', '.join(COMMANDS)}")


def check_options(words: Sequence[str]) -> None:
    """Raise UserError for an option that ``fit`` and its like do not have, or a configuration with another section.

    Of an option's name the first two parts are looked at: what follows depends on the classes that are named, which
    only the parser knows.
    """
    foreign = names_model(words)
    try:
        known = options(words[0], foreign)
    except (OSError, ValueError):  # a Lightning whose files lie elsewhere: the parser will tell
        return
    tops = {name.partition(".")[0] for name in known}
    for place, word in enumerate(words):
        name = word.partition("=")[0].removesuffix("+")
        if not name.startswith("--") or name == "--":
            continue
        top, *inner = name[2:].split(".")
        checked = inner and (top in SECTIONS or (top == "model" and not foreign))
        if top in tops and not (checked and f"{top}.{inner[0]}" not in known and inner[0] != "help"):
            continue
        value = " ".join(words[place + 1 : place + 2])
        shown = word if "=" in word or value.startswith("--") else f"{word} {value}".rstrip()
        raise UserError(f"unknown argument {shown}{nearest_option(name, [f'--{one}' for one in sorted(known)])}")
    for path in filter(lambda path: Path(path).is_file(), _files(words)):
        for key in _keys(yaml.safe_load(read_text(Path(path)))):
            top, _, inner = key.partition(".")
            checked = inner and (top in SECTIONS or (top == "model" and not foreign))
            if top not in tops or (checked and key not in known):
                raise UserError(f"{path}: unknown key '{key}'{nearest(key, sorted(known))}")


def options(command: str, foreign: bool = False) -> set[str]:
    """The options of ``fit`` and its like, the first two parts of their names."""
    found = {*_ANYWHERE, *SECTIONS, *_parameters(*_TRAINER, method=command)} - {*_FROM_PYTHON} | {"model"}
    found |= {f"{top}.{name}" for top, source in SECTIONS.items() for name in _parameters(*source)}
    return found | ({*_OF_OTHERS_MODELS} if foreign else {f"model.{name}" for name in _parameters(*_CLASSIFIER)})


@cache
def _parameters(package: str, file: str, name: str, method: str = "__init__") -> tuple[str, ...]:
    """The parameters of a method, read from its source: to import it takes seconds."""
    found = find_spec(package)
    [folder] = (found and found.submodule_search_locations) or [""]
    tree = ast.parse(Path(folder, file).read_text(encoding="utf-8"))
    [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return tuple(one.arg for one in (*node.args.args[1:], *node.args.kwonlyargs))
    return ()


def names_model(words: Sequence[str]) -> bool:
    """Whether a command line says which LightningModule to train, itself or in a configuration."""
    named = ("--model", "--model.class_path", "--model.help")
    variables = (f"{ENVIRONMENT}_{command.upper()}__MODEL" for command in words[:1])
    return (
        any(word.partition("=")[0] in named for word in words)
        or any(name in os.environ for name in variables)
        or any(map(_names_model, _files(words)))
    )


def check_no_classifier(words: Sequence[str]) -> None:
    """Raise UserError where one file has settings of the Classifier and another, or an option, names a model."""
    for path in _files(words):
        model = _model_of(path)
        if isinstance(model, dict) and "class_path" not in model and {"net", "estimator", "optimizer"} & set(model):
            raise UserError(
                f"{path} sets the Classifier's {', '.join(model)}, and another model is named: give that one's "
                "settings, and --estimator, --optimizer and --lr_scheduler beside it"
            )


def _files(words: Sequence[str]) -> Iterator[str]:
    for word, then in zip_longest(words, words[1:], fillvalue=""):
        name, _, value = word.partition("=")
        if name in ("-c", "--config"):
            yield value or then


def _keys(config: Any) -> Iterator[str]:
    """The keys of a configuration's first two levels, dotted."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield str(key)
        yield from (f"{key}.{inner}" for inner in value) if isinstance(value, dict) else ()


def _names_model(path: str) -> bool:
    model = _model_of(path)
    return isinstance(model, str) or (isinstance(model, dict) and "class_path" in model)


def _model_of(path: str) -> Any:
    if not Path(path).is_file():  # a pipe can be read once only, and that is the parser's
        return None
    try:
        return yaml.safe_load(read_text(Path(path))).get("model")
    except (UserError, AttributeError):  # the parser says what is wrong
        return None
