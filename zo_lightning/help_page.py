"""What ``--help`` prints: the options of every day, on one screen, before anything heavy is imported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from zo_lightning.words import COMMANDS, OF_LIGHTNING

DEFAULT = Path(__file__).with_name("default.yaml")
ALL = "--help.all"
_ASKS = ("-h", "--help")

_EXAMPLES = {
    "": (
        "fit                                     # the default: scikit-learn's digits, by ZO-AdaMM",
        "fit -c mnist -c estimator/backprop --data.root data",
        "study -c study/smoke",
    ),
    "fit": (
        "fit --model.estimator Backprop",
        "fit -c mnist -c estimator/forward_only --data.root data",
        "fit --model their_package.LitNet --estimator PerExample",
        "fit --ckpt_path last --trainer.max_epochs 300",
    ),
}
_OF_A_RUN = "-c lightning_logs/version_0/config.yaml --ckpt_path last"

Rows = Sequence[tuple[str, str]]
_MODEL: Rows = (
    ("-c, --config CONFIG", "a file, or a name of `zo-lightning configs`; later ones and options override"),
    ("--model.net CLASS", "SmallCNN, ScalableCNN, SmallVGG, ResNet20, or any nn.Module: my_package.MyNet"),
    ("--data CLASS", "Digits, MNIST, FashionMNIST, CIFAR10, CIFAR10Images, or any DataModule"),
    ("--data.root FOLDER", "where the data lie, or are downloaded to (not for Digits)"),
    ("--data.batch_size N", "examples of a step"),
)
_TRAINING: Rows = (
    ("--model.estimator CLASS", "Backprop, ZerothOrder, PerExample, ForwardGradient, DirectFeedbackAlignment"),
    ("--model.estimator.samples N", "directions of a step"),
    ("--model.estimator.directions CLASS", "Sphere, Gaussian, Rademacher, Centred, Coordinate or LowRank"),
    ("--model.estimator.stencil.mu X", "how far a point is moved along a direction"),
    ("--model.optimizer CLASS", "AdaMM, NormalizedSGD, SignSGD, or any of torch.optim: Adam, SGD"),
    ("--model.optimizer.lr X", "learning rate"),
    ("--model.lr_scheduler CLASS", "any of torch.optim.lr_scheduler, or null"),
    ("--model.memory WORD", "auto, full, or lean: the memory of inference"),
    ("--model CLASS", "a LightningModule as it is, in place of all these; beside it go"),
    ("--estimator, --optimizer, --lr_scheduler", "what trains that one"),
    ("--trainer.max_epochs N", "epochs"),
    ("--trainer.max_steps N", "or optimizer steps"),
    ("--trainer.limit_train_batches N", "batches of an epoch; a number below 1.0 is a share"),
    ("--trainer.check_val_every_n_epoch N", "epochs from one validation to the next"),
    ("--trainer.gradient_clip_val X", "clips the estimate"),
)
_MACHINE: Rows = (
    ("--seed_everything N", "decides initialisation, batches, dropout and directions"),
    ("--trainer.accelerator WORD", "auto, cpu, gpu, mps"),
    ("--trainer.devices N", "how many of them"),
    ("--trainer.precision WORD", "32-true, 16-mixed, bf16-mixed"),
)
_OUTPUT: Rows = (
    ("--trainer.logger CLASS", "CSVLogger, WandbLogger, ...; false: none"),
    ("--trainer.callbacks+ CLASS", "adds one, such as GradientAlignment; -c callbacks/observe adds ours"),
    ("--trainer.log_every_n_steps N", "steps from one point of a curve to the next"),
    ("--trainer.enable_progress_bar BOOL", "a bar in a terminal, lines elsewhere"),
    ("--checkpoint.monitor TAG", "the metric of best.ckpt"),
)
_START: Rows = (
    ("--ckpt_path FILE", "the checkpoint; last: of the newest run; best"),
    ("--init_from FILE", "weights alone"),
)
_COMPARE: Rows = (("--reference RUN", "a run to compare weights with, for -c callbacks/observe"),)


def asked(words: Sequence[str]) -> bool:
    """Whether a command line asks for the page of ``fit`` and its like, or for that of all commands."""
    return any(word in _ASKS for word in words) and (words[0] in _ASKS or words[0] in OF_LIGHTNING)


def page(words: Sequence[str]) -> str:
    """The page that a command line asks for."""
    command = words[0] if words[0] in OF_LIGHTNING else ""
    usage = f"{command} [-c CONFIG] [--OPTION VALUE]" if command else "COMMAND ..."
    what = COMMANDS[command] if command else "train any Lightning model by forward passes, or by backpropagation"
    lines = [f"usage: zo-lightning {usage}", "", f"{what[0].upper()}{what[1:]}.", ""]
    examples = _EXAMPLES.get(command) or (f"{command} {_OF_A_RUN}",)
    lines += [f"  zo-lightning {example}" for example in examples]
    for title, rows in _parts(command).items():
        lines += ["", f"{title}:", *(_line(option, text) for option, text in rows)]
    return "\n".join(lines)


def _parts(command: str) -> dict[str, Rows]:
    if not command:
        more = (("zo-lightning COMMAND --help", "its options"), ("zo-lightning --version", "the version"))
        return {"commands": tuple(COMMANDS.items()), "more": more}
    more = (
        (f"zo-lightning {command} {ALL}", "all options, with their environment variables"),
        (f"zo-lightning {command} --model.estimator.help ZerothOrder", "those of one class"),
        (f"zo-lightning {command} ... --print_config", "the configuration that results, to be kept and edited"),
        ("ZO_LIGHTNING_FIT__TRAINER__MAX_EPOCHS=3", "an option as an environment variable"),
    )
    if command != "fit":
        return {"options": (*_MODEL, *_MACHINE, *_START), "more": more}
    parts = {"model and data": _MODEL, "training": _TRAINING, "machine": _MACHINE}
    return {**parts, "start and output": (*_START, *_OUTPUT, *_COMPARE), "more": more}


def _line(option: str, text: str) -> str:
    value = _default(option.partition(" ")[0].removeprefix("--").removesuffix("+"))
    shown = "" if value is None else f" [{value}]"
    return f"  {option:<35}  {text}{shown}"


def _default(option: str) -> Any:
    """What the embedded default says of an option: a number, or the name of a class."""
    value: Any = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
    for name in option.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get("init_args", value) if "class_path" in value else value
        value = value.get(name)
    if isinstance(value, dict):
        return value["class_path"].rpartition(".")[2] if "class_path" in value else None
    return value
