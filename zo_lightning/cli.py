"""The command line: LightningCLI with short class names, one embedded default and errors of one or two lines."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from zo_lightning.callbacks.weight_similarity import check_reference
from zo_lightning.cli_errors import UserError, explain_parsing, innermost
from zo_lightning.data import InMemoryDataModule
from zo_lightning.distributed import ProcessLost, WeightsDiverged
from zo_lightning.measures import mismatch
from zo_lightning.modules import Classifier, TrainingDiverged
from zo_lightning.study.command import COMMANDS, report, study
from zo_lightning.study.folder import FINISHED

DEFAULT = Path(__file__).with_name("default.yaml")


class Parser(LightningArgumentParser):
    """A parser that raises ``UserError`` where others print their usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what argparse would print."""
        raise UserError(explain_parsing(message, self)) from ex

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration; of several, an error names the one."""
        try:
            return super().parse_path(cfg_path, *args, **kwargs)
        except UserError as error:
            raise UserError(f"{cfg_path}: {error}") from error


class SaveConfig(SaveConfigCallback):
    """Saves the configuration beside the run's curves, and nowhere where no logger makes such a folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save without ``ckpt_path``: it says where this run came from, not what it is."""
        if trainer.logger is None:
            return
        self.config = self.config.clone()
        self.config.pop("ckpt_path", None)
        super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` of a ``Classifier`` on any LightningDataModule.

    Whatever can be known to be wrong is found before anything is written.
    """

    def __init__(self, args: ArgsType = None) -> None:
        environment = {"default_env": True, "env_prefix": "ZO_LIGHTNING"}
        by_subcommand = {name: dict(environment) for name in self.subcommands()}
        super().__init__(
            Classifier,
            LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=42,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={
                "description": f"Train by forward passes or by backpropagation. {_others()}",
                **environment,
                **by_subcommand,
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a checkpoint and a progress bar that every run has, and the link from the data's classes to the model."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(TQDMProgressBar, "progress_bar")
        parser.set_defaults(_defaults())
        parser.add_argument(
            "--reference",
            type=str | None,
            default=None,
            help="Folder of another run, for all callbacks that compare with one and were not given their own.",
        )
        parser.link_arguments("data", "model.num_classes", compute_fn=_num_classes, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and read the checkpoint where one is named."""
        super().parse_arguments(parser, args)
        options = self.config.get(self.config.get("subcommand"), {})
        self.checkpoint = _read_checkpoint(options.get("ckpt_path"))

    def instantiate_classes(self) -> None:
        """Make all components; a value that one of them refuses is the user's."""
        try:
            super().instantiate_classes()
            self.model.configure_optimizers()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UserError(innermost(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Leave out the checkpoint and the progress bar where the trainer's switches say so."""
        options = self._get(self.config_init, "trainer", default={})
        keys = self._parser(self.subcommand).callback_keys
        off = {"checkpoint": "enable_checkpointing", "progress_bar": "enable_progress_bar"}
        wanted = [key for key in keys if options.get(off[key]) is not False and not options.get("barebones")]
        callbacks = [self._get(self.config_init, key) for key in wanted]
        trainer = self._instantiate_trainer({**options, **kwargs}, callbacks)
        if (reference := self._get(self.config, "reference")) is not None and self.subcommand == "fit":
            _set_reference(trainer, reference)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Load the data, and compare checkpoint and reference with the model, while nothing has been written."""
        _spare_finished(self.trainer)
        if isinstance(self.datamodule, InMemoryDataModule):
            try:
                self.datamodule.prepare_data()
                self.datamodule.setup()
            except (ValueError, OSError) as error:
                raise UserError(innermost(error)) from error
        for callback in _callbacks(self.trainer):
            if self.subcommand == "fit" and getattr(callback, "reference", None) is not None:
                try:
                    check_reference(callback.reference, dict(self.model.named_parameters()))
                except MisconfigurationException as error:
                    raise UserError(str(error)) from error
        if self.checkpoint is not None:
            _compare(self.checkpoint, self.model.state_dict(), str(self._get(self.config, "ckpt_path")))
        elif self.subcommand != "fit" and self._get(self.config, "ckpt_path") is None:
            print(f"zo-lightning: note: {self.subcommand} without --ckpt_path sees untrained weights", file=sys.stderr)

    def after_fit(self) -> None:
        """Say what came out, and where to look at it."""
        folder = self.trainer.log_dir  # a collective: asked on every rank
        if not self.trainer.is_global_zero or getattr(self.trainer, "fast_dev_run", False) or self.trainer.interrupted:
            return
        metrics = self.trainer.callback_metrics
        resumed_at = self.checkpoint.get("global_step", 0) if self.checkpoint else 0
        if "val/acc" in metrics and self.trainer.global_step > resumed_at:
            print(f"\nValidation accuracy {metrics['val/acc']:.4f}", end=" ")
            print(f"after {self.trainer.global_step:,} steps, {self.model.forward_passes:,} forward passes of a batch.")
        if self.trainer.logger is not None and folder is not None:
            print(f"The run is in {Path(folder)}; to see its curves: tensorboard --logdir {Path(folder).parent}")


def main(args: list[str] | None = None) -> int:
    """Run a command line; return its exit code: 0, 1 where a run failed, 2 where it was not begun."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_advertisement)
    words = sys.argv[1:] if args is None else args
    try:
        if words[:1] == ["study"]:
            return study(words[1:], fit)
        if words[:1] == ["report"]:
            return report(words[1:], fit)
        CLI(args)
    except UserError as error:
        return _fail(error, 2)
    except (TrainingDiverged, WeightsDiverged, ProcessLost, MisconfigurationException) as error:
        return _fail(error, 1)
    return 0


def fit(words: Sequence[str]) -> Trainer:
    """Run ``fit`` with these words and return its trainer; what goes wrong is raised."""
    return CLI(["fit", *words]).trainer


def _fail(error: Exception, code: int) -> int:
    print(f"zo-lightning: error: {error}", file=sys.stderr)
    return code


def _others() -> str:
    return "There are also " + " and ".join(f"`{name}` ({what})" for name, what in COMMANDS.items()) + "."


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _defaults() -> dict[str, Any]:
    """The embedded default, by option; jsonargparse's own default files cannot replace the default of a callable."""
    options: dict[str, Any] = {}
    for section, values in yaml.safe_load(DEFAULT.read_text(encoding="utf-8")).items():
        if isinstance(values, dict) and "class_path" not in values:
            options |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            options[section] = values
    return options


def _num_classes(data: LightningDataModule) -> int:
    return getattr(data, "num_classes", 10)


def _set_reference(trainer: Trainer, reference: str) -> None:
    """Give a run to the callbacks that can compare with one and have none."""
    comparing = [callback for callback in _callbacks(trainer) if hasattr(callback, "reference")]
    if not comparing:
        raise UserError(f"reference '{reference}': no callback compares with it; add -c configs/callbacks/observe.yaml")
    for callback in comparing:
        callback.reference = callback.reference or reference


def _spare_finished(trainer: Trainer) -> None:
    """Raise UserError where a trainer would write into a study's finished run: its configuration names its folder."""
    if trainer.log_dir is not None and Path(trainer.log_dir, FINISHED).exists():
        raise UserError(
            f"'{Path(trainer.log_dir)}' holds a finished run of a study, which this would overwrite: "
            "write elsewhere with --trainer.logger true"
        )


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _read_checkpoint(path: Any) -> dict[str, Any] | None:
    """The checkpoint in a file, or None where none is named or Lightning finds it by itself (``last``, ``best``)."""
    if path is None or str(path) in ("best", "last", "hpc"):
        return None
    if not Path(path).is_file():
        raise UserError(f"ckpt_path '{path}' does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for what is no checkpoint
        raise UserError(f"ckpt_path '{path}' is damaged or not a checkpoint") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"ckpt_path '{path}' holds no Lightning checkpoint: it has no state_dict")
    return checkpoint


def _compare(checkpoint: dict[str, Any], state: dict[str, torch.Tensor], path: str) -> None:
    """Raise UserError naming the first weight in which a checkpoint and a model differ."""
    if difference := mismatch(state, checkpoint["state_dict"], ("the model", "the checkpoint")):
        raise UserError(f"ckpt_path '{path}' is of another architecture: {difference}")
