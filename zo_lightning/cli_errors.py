"""What a user reads when the command line or a configuration is wrong."""

import copy
import inspect
import re

import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import Callback, LightningModule

from zo_lightning import nets
from zo_lightning.data import CIFAR10, MNIST, CIFAR10Images, Digits, FashionMNIST, InMemoryDataModule  # noqa: F401  (subclasses)
from zo_lightning.directions import Directions
from zo_lightning.estimators import GradientEstimator
from zo_lightning.evaluation import Evaluation
from zo_lightning.optim import AdaMM, NormalizedSGD, SignSGD  # noqa: F401  (subclasses)
from zo_lightning.stencils import Stencil
from zo_lightning.user_errors import ELSEWHERE_CALLED, UserError, nearest, nearest_option

BASES: dict[str, type] = {
    "estimator": GradientEstimator,
    "directions": Directions,
    "stencil": Stencil,
    "evaluation": Evaluation,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
    "data": InMemoryDataModule,
    "model": LightningModule,
    "callbacks": Callback,
}


_PLACES = {
    "data": "data",
    "optimizer": "model.optimizer",
    "stencil": "model.estimator.stencil",
    "directions": "model.estimator.directions",
    "estimator": "model.estimator",
    "lr_scheduler": "model.lr_scheduler",
    "callbacks": "trainer.callbacks",
}
"""Where a component stands in a configuration."""


_TYPES = {"float": "a number", "int": "a whole number", "bool": "true or false"}


def explain_parsing(message: str, parser: ArgumentParser) -> str:
    """Put a parser's message into one or two lines, with the names that would have been valid."""
    key = _find(r'Parser key "([^"]+)"', message)
    subtypes, value = _find(r"Subtypes: \[(.*)\]$", message), _find(r"Given value: (.*)", message)
    if match := re.match(r"<class '(int|float|bool)'>", subtypes):
        return f"{key}: expected {_TYPES[match[1]]}, got '{value}'"  # a number, or a tensor of one
    if name := _find(r"Expected a dot import path string: (\S+)", message):
        return _unknown_class(key, name)
    if name := _find(r"Problem with given class_path '([^']+)'", message):
        reason = _find(r"Problem with given class_path '[^']+':\s*\n\s*(.+)$", message)
        return f"{key}: cannot import '{name}': {reason or message.splitlines()[-1].strip()}"
    if key and (missing := _find(r"arguments are required: (.*)", message)):
        name = _find(r"class_path='[^']*?(\w+)'", message)
        return f"{key}: {name or 'it'} needs {missing}"
    if name := _find(r"^Option '([^']+)' is not accepted|NestedArg\(key='([^']+)'", message):
        called = ELSEWHERE_CALLED.get(name, name)
        return f"unknown option '{name}'{_elsewhere(called) or nearest(name, _component_options())}"
    if reason := _find(r"^\s*- (unknown option .*)$", message):  # of one class in a list, already explained
        return reason
    if name := _find(r"does not accept option '([^']+)'", message):
        return _unknown_key(name, parser)
    if name := _find(r"[Uu]nrecognized arguments: (.*)", message):
        options = [option for option in parser._option_string_actions if option.startswith("--")]
        return f"unknown argument {name}{nearest_option(name.split()[0].split('=')[0], options)}"
    if match := re.search(r"callable class: (No module named .*?)\. Got value: .*class_path='([^']+)'", message):
        return f"{key}: cannot import '{match[2]}': {match[1]}"
    if match := re.search(r"Expected '([^']+)' to be a subclass of (?:Union\[)?([\w, ]+)", message):
        return f"{key}: '{match[1]}' is no {' or '.join(match[2].split(', '))}"
    if name := _find(
        r"Expected an import path or a subclass spec, but got (.*?)\. Got|Not a valid subclass of .*Got value: (.*)",
        message,
    ):
        return f"{key}: expected the name of a class, or class_path and init_args, got '{name}'"
    if subtypes:
        return f"{key}: expected {_kinds(subtypes)}, got '{value}'"
    if match := re.search(r"Expected an? <class '(\w+)'>\. Got value: (.*)", message):
        return f"{key}: expected {_TYPES.get(match[1], match[1])}, got '{match[2]}'"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Expected a path but")]  # a class could stand in a file
    return re.sub(r'^Parser key "([^"]+)"', r"\1", " ".join(lines[:2]))


def check_net(net: torch.nn.Module, data: InMemoryDataModule) -> None:
    """See that a net, or rather a copy of it, takes the images of its data, and knows as many classes.

    Two images tell; a net that refuses them is given a whole batch, which some are made for.

    Raises:
        UserError: it does not.
    """
    try:
        tried = copy.deepcopy(net).eval()
    except Exception:  # of something that cannot be copied: training will tell
        return
    images, _ = next(iter(data.test_dataloader()))
    what, refusal, scores = f"{type(net).__name__} does not suit {type(data).__name__}", None, None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for batch in (images[:2], images):
            try:
                scores, refusal = tried(batch), None
                break
            except Exception as error:  # anything that a net can raise
                refusal = error
    if refusal is not None:
        reason = f"{type(refusal).__name__}: {next(iter(str(refusal).splitlines()), '')}"
        raise UserError(f"model.net: {what}, whose images are {tuple(images.shape[1:])}: {reason}")
    shape = getattr(scores, "shape", (len(images), data.num_classes))
    if len(shape) != 2 or shape[1] < data.num_classes:
        raise UserError(
            f"model.net: {what}: its output is {tuple(shape)}, not {data.num_classes} numbers for each image"
        )


def _kinds(subtypes: str) -> str:
    """The types of a union in a parser's message, to read."""
    found = re.findall(
        r"Literal\[([^\]]*)\]|<class '(?:[\w.]*\.)?(\w+)'>|Callable\[.*?\], (?:[\w.]+\[)?([\w.]+)", subtypes
    )
    names = [a or {"NoneType": "null", "Iterable": "a list"}.get(b) or b or c.rpartition(".")[2] for a, b, c in found]
    return " or ".join(dict.fromkeys(names)) or subtypes


def innermost(error: BaseException) -> str:
    """The message of a refused value, without the layers that a parser has put around it."""
    reasons = re.findall(r"^\s*- (?!Expected)(.*)$", str(error), re.MULTILINE)
    return reasons[0] if reasons else str(error)


def _unknown_class(key: str, name: str) -> str:
    kind = key.rpartition(".")[2]
    names = _class_names(kind)
    listed = f"; there are {', '.join(names)}" if 0 < len(names) <= 24 else ""
    also = "" if kind in ("estimator", "directions", "stencil", "evaluation") else ", or give a dotted import path"
    return f"{key}: unknown class '{name}'{nearest(name, names)}{listed}{also}"


def _unknown_key(name: str, parser: ArgumentParser) -> str:
    """Name the shortest beginning of a dotted key that does not exist, and the one that looks most like it."""
    known = {key for one in _with_subparsers(parser) for action in one._actions for key in _beginnings(action.dest)}
    unknown = next((key for key in _beginnings(name) if key not in known), name)
    return f"unknown key '{unknown}'{nearest(unknown, known)}"


def _with_subparsers(parser: ArgumentParser) -> list[ArgumentParser]:
    subparsers = [
        sub for action in parser._actions if isinstance(action.choices, dict) for sub in action.choices.values()
    ]
    return [parser, *subparsers]


def _beginnings(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def _class_names(kind: str) -> list[str]:
    ready_made = [nets.ResNet20, nets.ScalableCNN, nets.SmallCNN, nets.SmallVGG]
    classes = ready_made if kind == "net" else _subclasses(BASES[kind]) if kind in BASES else []
    if kind in ("model", "data"):
        classes = [cls for cls in classes if cls.__module__.startswith("zo_lightning.")]
    return sorted({cls.__name__ for cls in classes})


def _subclasses(base: type) -> list[type]:
    public = [cls for cls in base.__subclasses__() if not cls.__name__.startswith("_")]
    return [cls for cls in public if not inspect.isabstract(cls)] + [sub for cls in public for sub in _subclasses(cls)]


def _elsewhere(name: str) -> str:
    """Where an option of this name does exist."""
    for kind, place in _PLACES.items():
        having = {
            c.__name__ for c in _subclasses(BASES[kind]) if _is_ours(c) and name in inspect.signature(c).parameters
        }
        if having:
            whose = f" of {', '.join(sorted(having))}" if len(having) <= 4 else ""
            return f" here (did you mean {place}.{name}{whose}?)"
    return ""


def _component_options() -> set[str]:
    classes = [cls for base in (*BASES.values(), torch.nn.Module) for cls in _subclasses(base)]
    return {name for cls in classes if _is_ours(cls) for name in inspect.signature(cls).parameters}


def _is_ours(cls: type) -> bool:
    """Ours, the user's, or an optimizer: not the hundreds of others."""
    home = cls.__module__
    return home.startswith("torch.optim.") or not home.startswith(("torch", "pytorch_lightning", "lightning"))


def _find(pattern: str, message: str) -> str:
    match = re.search(pattern, message, re.MULTILINE)
    return next(group for group in match.groups() if group) if match else ""
