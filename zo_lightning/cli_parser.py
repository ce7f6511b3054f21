"""How the command line reads options and files: a class that is switched starts anew, errors are the user's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from jsonargparse import Namespace, _typehints
from jsonargparse._util import import_object
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback

from zo_lightning.cli_errors import explain_parsing
from zo_lightning.help_page import DEFAULT
from zo_lightning.user_errors import UserError
from zo_lightning.yaml_files import read_text

_SECTIONS = {"model", "trainer", "checkpoint", "last_checkpoint", "trajectory_log", "progress_bar"}


class Parser(LightningArgumentParser):
    """A parser that raises ``UserError`` where others print their usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what argparse would print."""
        raise UserError(explain_parsing(message, self)) from ex

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration; of several, an error names the one."""
        if Path(cfg_path).is_file():
            check_sections(yaml.safe_load(read_text(Path(cfg_path))), Path(cfg_path))
        try:
            return super().parse_path(cfg_path, *args, **kwargs)
        except UserError as error:
            raise UserError(f"{cfg_path}: {error}") from error


def check_sections(config: Any, path: Path) -> None:
    """Raise UserError where a section is a number or a list, which the parser would pass over."""
    for name in _SECTIONS & (config.keys() if isinstance(config, dict) else set()):
        if isinstance(config[name], bool | int | float | list):
            raise UserError(f"{path}: {name} must be options by name, got {config[name]!r}")


class SaveConfig(SaveConfigCallback):
    """Saves the configuration beside the run's curves, and nowhere where no logger makes such a folder.

    Checkpoints hold the model's part, so that ``load_from_checkpoint`` needs nothing but the file.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save without ``ckpt_path`` and ``init_from``: they say where this run came from, not what it is.

        An evaluation in the folder of a run leaves that run's configuration as it is.
        """
        folder = trainer.log_dir  # a collective: asked on every rank
        if trainer.logger is None or (stage != "fit" and Path(folder or ".", self.config_filename).exists()):
            return
        self.config = self.config.clone()
        for origin in ("ckpt_path", "init_from"):
            self.config.pop(origin, None)
        super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what the model was made of, where it has not done so itself."""
        model = yaml.safe_load(self.parser.dump(self.config, skip_none=False))["model"]
        if "class_path" in model:
            model = {"_class_path": model["class_path"], **model.get("init_args", {})}
        else:
            model["num_classes"] = num_classes(getattr(trainer, "datamodule", None))
        model["_instantiator"] = "pytorch_lightning.cli.instantiate_module"
        checkpoint.setdefault(pl_module.CHECKPOINT_HYPER_PARAMS_KEY, model)


def num_classes(data: LightningDataModule | None) -> int:
    """How many classes the data have; 10 where they do not say."""
    return getattr(data, "num_classes", 10)


def defaults(foreign: bool) -> dict[str, Any]:
    """The embedded default, by option; jsonargparse's own default files cannot replace the default of a callable.

    A foreign module has a net, data and metrics of its own, of which the default knows nothing.
    """
    options: dict[str, Any] = {}
    for section, values in yaml.safe_load(DEFAULT.read_text(encoding="utf-8")).items():
        if foreign and section in ("model", "data", "checkpoint"):
            continue
        if isinstance(values, dict) and "class_path" not in values:
            options |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            options[section] = values
    return options


@contextmanager
def as_users_expect() -> Iterator[None]:
    """While parsing: a class that replaces another inherits none of its options, and every scheduler has a short name.

    jsonargparse keeps options that the new class happens to accept too: ``PerExample`` would take the samples and the
    mu that were meant for ``ZerothOrder``. It has no setting for that, nor for a name that two classes have.
    """
    resolve = _typehints.resolve_class_path_by_name

    def resolve_schedules(cls: Any, name: str) -> str:
        return _SCHEDULES.get(name.removeprefix("torch.optim.lr_scheduler."), "") or resolve(cls, name)

    with (
        patch.object(_typehints, "discard_init_args_on_class_path_change", _discard),
        patch.object(_typehints, "resolve_class_path_by_name", resolve_schedules),
    ):
        yield


# Schedulers that torch's classes of the same name cannot make from an optimizer alone, and nothing else.
_SCHEDULES = {
    "ReduceLROnPlateau": "pytorch_lightning.cli.ReduceLROnPlateau",
    "SequentialLR": "zo_lightning.optim.schedules.SequentialLR",
    "ChainedScheduler": "zo_lightning.optim.schedules.ChainedScheduler",
}


def _discard(parser_or_action: Any, before: Any, after: Any) -> None:
    if not before or not before.get("init_args") or before["class_path"] == after["class_path"]:
        return
    if _same(before["class_path"], after["class_path"]):
        return
    before["init_args"] = Namespace() if isinstance(before["init_args"], Namespace) else {}


def _same(a: str, b: str) -> bool:
    try:
        return import_object(a) is import_object(b)
    except (ImportError, AttributeError, ValueError):
        return False
