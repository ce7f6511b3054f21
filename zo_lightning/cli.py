"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with short class names and one embedded default."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from zo_lightning.allocator import keep_freed_memory
from zo_lightning.callbacks.exact_resume import ExactResume, saved_state
from zo_lightning.callbacks.gradient_free import GradientFree
from zo_lightning.callbacks.last_checkpoint import LastCheckpoint, telling_exit_code
from zo_lightning.callbacks.predictions import WritePredictions
from zo_lightning.callbacks.progress_bar import ProgressBar
from zo_lightning.callbacks.trajectory_log import TrajectoryLog
from zo_lightning.callbacks.weight_similarity import check_reference
from zo_lightning.checkpoint_io import with_atomic_checkpoints
from zo_lightning.checkpoints import check_complete, check_optimizer, check_weights, read_checkpoint
from zo_lightning.cli_errors import check_net, innermost
from zo_lightning.cli_parser import Parser, SaveConfig, as_users_expect, defaults, num_classes
from zo_lightning.curves import continue_curves
from zo_lightning.data import InMemoryDataModule
from zo_lightning.distributed import ProcessLost, WeightsDiverged, tells_of_loss
from zo_lightning.estimators import GradientEstimator
from zo_lightning.modules import Classifier, EstimatedGradient, TrainingDiverged
from zo_lightning.modules.configured import configured
from zo_lightning.modules.driver import driver_of
from zo_lightning.modules.memory import Memory, may_be_lean
from zo_lightning.presets import with_paths
from zo_lightning.runs import find_checkpoint, named_folders, own_folder, settle_in
from zo_lightning.study.folder import FINISHED
from zo_lightning.user_errors import UserError
from zo_lightning.words import ENVIRONMENT, OTHERS, check_no_classifier, names_model

_OTHERS = "There are also " + ", ".join(f"`{name}` ({what})" for name, what in OTHERS.items()) + "."


class CLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` of a ``Classifier``, or of the LightningModule that is named.

    ``--model their_package.LitNet --estimator PerExample`` trains a module as it is, by the callback ``GradientFree``;
    ``--optimizer`` and ``--lr_scheduler`` replace what its ``configure_optimizers`` returns. Whatever can be known to
    be wrong is found before anything is written.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        environment = {"default_env": True, "env_prefix": ENVIRONMENT}
        by_subcommand = {name: dict(environment) for name in self.subcommands()}
        self.words = words = with_paths(sys.argv[1:] if args is None else args)
        self.foreign = names_model(words)
        if self.foreign:
            check_no_classifier(words)
        super().__init__(
            LightningModule if self.foreign else Classifier,
            None if self.foreign else LightningDataModule,  # which a foreign module may have in itself
            subclass_mode_model=self.foreign,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=42,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={
                "description": f"Train by forward passes or by backpropagation. {_OTHERS}",
                **environment,
                **by_subcommand,
            },
            args=words,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has, checkpoints and a progress bar, and the link from the data's classes to the model."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(TrajectoryLog, "trajectory_log")
        parser.add_lightning_class_args(ProgressBar, "progress_bar")
        parser.set_defaults(defaults(self.foreign))
        parser.add_argument(
            "--reference",
            type=str | None,
            default=None,
            help="Folder of another run, for all callbacks that compare with one and were not given their own.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Checkpoint whose weights alone are taken over: optimizer, schedule and epochs begin anew.",
        )
        if not self.foreign:
            parser.link_arguments("data", "model.num_classes", compute_fn=num_classes, apply_on="instantiate")
            return
        parser.add_argument(
            "--estimator",
            type=GradientEstimator | None,
            default=None,
            help="Trains the model in place of backpropagation (null: ZerothOrder, or the model's own).",
        )
        parser.add_argument(
            "--optimizer", type=OptimizerCallable | None, default=None, help="In place of the model's own (null)."
        )
        parser.add_argument(
            "--lr_scheduler", type=LRSchedulerCallable | None, default=None, help="Of that optimizer (null: none)."
        )
        parser.add_argument(
            "--lr_interval", type=Literal["epoch", "step"], default="epoch", help="When that scheduler steps."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and read the checkpoint where one is named."""
        try:
            with as_users_expect():
                self.config = parser.parse_args(self.words)  # Lightning would warn of a process with words of its own
        except OverflowError as error:
            raise UserError(f"a number is too large: {error}") from error
        options = self.config.get(self.config.get("subcommand"), {})
        if options.get("ckpt_path") is not None and options.get("init_from") is not None:
            raise UserError("ckpt_path continues a run and init_from begins one: give one of them")
        if options.get("weights_only") is False:
            raise UserError("weights_only false would run code that a checkpoint can hold: leave it out")
        if options.get("checkpoint.save_last"):
            raise UserError("checkpoint.save_last: last.ckpt is written anyway, see last_checkpoint: leave it out")
        self.checkpoint = read_checkpoint("ckpt_path", options.get("ckpt_path"))
        self.weights = read_checkpoint("init_from", options.get("init_from"))

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's own settings over those that were given."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except (ValueError, OverflowError) as error:
            raise UserError(f"seed_everything: {error}") from error

    def instantiate_classes(self) -> None:
        """Make all components; a value that one of them refuses is the user's."""
        try:
            super().instantiate_classes()
            if not self.foreign:  # others may need their trainer
                self.model.configure_optimizers()
        except (ValueError, TypeError, OverflowError, MisconfigurationException) as error:
            raise UserError(innermost(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Leave out checkpoints and the progress bar where the trainer's switches say so."""
        options = self._get(self.config_init, "trainer", default={})
        off = {
            "checkpoint": "enable_checkpointing",
            "last_checkpoint": "enable_checkpointing",
            "trajectory_log": "enable_checkpointing",
            "progress_bar": "enable_progress_bar",
        }
        wanted = [key for key in off if options.get(off[key]) is not False and not options.get("barebones")]
        own = {key: self._get(self.config_init, key) for key in wanted}
        given = options.get("callbacks")
        given = given if isinstance(given, list) else [] if given is None else [given]
        first = [own.pop("last_checkpoint", ExactResume())] if self.subcommand == "fit" else []
        if any(isinstance(one, ExactResume) for one in given) or options.get("barebones"):
            first = []
        own.pop("last_checkpoint", None)
        if self.subcommand != "fit":
            own.pop("trajectory_log", None)
        callbacks = list(own.values())
        if self.subcommand == "predict":
            callbacks.append(WritePredictions())
        if self.foreign:
            callbacks += self._drive_foreign(given)
        options = {**options, "callbacks": [*first, *given], "plugins": with_atomic_checkpoints(options)}
        every, last = options.get("check_val_every_n_epoch"), options.get("max_epochs")
        if every and last and 0 < last < every:  # a run too short for one validation
            options = {**options, "check_val_every_n_epoch": 1}
        trainer = self._instantiate_trainer({**options, **kwargs}, callbacks)
        if (reference := self._get(self.config, "reference")) is not None and self.subcommand == "fit":
            _set_reference(trainer, reference)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Load the data, and compare checkpoint and reference with the model, while nothing has been written."""
        self._find_checkpoint()
        if isinstance(self.datamodule, InMemoryDataModule):
            try:
                self.datamodule.prepare_data()
                self.datamodule.setup()
            except (ValueError, OSError) as error:
                raise UserError(innermost(error)) from error
            if not self.foreign:
                check_net(self.model.net, self.datamodule)
        for callback in _callbacks(self.trainer):
            if self.subcommand == "fit" and getattr(callback, "reference", None) is not None:
                try:
                    check_reference(callback.reference, dict(self.model.named_parameters()))
                except MisconfigurationException as error:
                    raise UserError(str(error)) from error
        if self.weights is not None:
            check_weights("init_from", self._get(self.config, "init_from"), self.weights, self.model)
            self.model.load_state_dict(self.weights["state_dict"])
        if self.checkpoint is not None:
            path = self._get(self.config, "ckpt_path")
            check_weights("ckpt_path", path, self.checkpoint, self.model)
            if self.subcommand == "fit":
                check_complete(path, self.checkpoint)
                if not self.foreign:
                    check_optimizer(path, self.checkpoint, self.model.configure_optimizers())
        elif self.subcommand != "fit" and self.weights is None and self._get(self.config, "ckpt_path") is None:
            print(f"zo-lightning: note: {self.subcommand} without --ckpt_path sees untrained weights", file=sys.stderr)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if not self.trainer._checkpoint_connector._loaded_checkpoint:  # all of it is in its place
                raise
            path = self._get(self.config_init, "ckpt_path")
            raise UserError(f"ckpt_path '{path}' does not fit this run: {type(error).__name__}: {error}") from error

    def fit(self, **kwargs: Any) -> None:
        """Train, in a folder of the run's own; called by LightningCLI in place of ``Trainer.fit``."""
        trainer = self.trainer
        if trainer.strategy.root_device.type == "cpu" and not self._saves_memory():
            keep_freed_memory()
        with own_folder(trainer):
            if self.checkpoint is not None and trainer.is_global_zero:
                marks = saved_state(self.checkpoint).get("curves", [])
                continue_curves(trainer.loggers, marks, Path(kwargs["ckpt_path"]).resolve().parent.parent)
            self.checkpoint = self.checkpoint and {"global_step": self.checkpoint.get("global_step", 0)}  # frees memory
            with telling_exit_code(trainer):
                trainer.fit(**{**kwargs, "weights_only": True})

    def _saves_memory(self) -> bool:
        owners = (self.model, *_callbacks(self.trainer))
        asked: list[Memory] = [one.memory for one in owners if isinstance(one, EstimatedGradient | GradientFree)]
        return may_be_lean(asked[0] if asked else "full", self.model)

    def _find_checkpoint(self) -> None:
        """Read the checkpoint that ``last`` or ``best`` stands for, and choose the run's folder."""
        for folder in named_folders(self.trainer):
            if (folder / FINISHED).exists():
                raise UserError(
                    f"'{folder}' holds a finished run of a study, which this would overwrite: "
                    "write elsewhere with --trainer.logger true"
                )
        path = word = self._get(self.config, "ckpt_path")
        if word in ("last", "best"):
            path = str(find_checkpoint(self.trainer, word, to_train=self.subcommand == "fit"))
            for config in (self.config, self.config_init):
                config[str(self.subcommand)]["ckpt_path"] = path
            self.checkpoint = read_checkpoint("ckpt_path", path)
        if self.subcommand == "fit":
            settle_in(self.trainer, None if self.checkpoint is None else Path(path), is_last=word == "last")

    def _drive_foreign(self, given: list[Any]) -> list[Callback]:
        """Put the optimizer in its place; return the callback that trains a module without an estimator of its own."""
        optimizer, scheduler, interval, estimator = (
            self._get(self.config_init, name) for name in ("optimizer", "lr_scheduler", "lr_interval", "estimator")
        )
        if scheduler is not None and optimizer is None:
            raise UserError("lr_scheduler needs an optimizer to schedule: give one too")
        if optimizer is not None:
            model: Any = self.model
            model.configure_optimizers = lambda: configured(model, optimizer, scheduler, interval)
        if isinstance(self.model, EstimatedGradient):
            if estimator is not None:
                name = type(self.model).__name__
                raise UserError(f"{name} has an estimator of its own: give --model.estimator in place of --estimator")
            return []
        driven = self.subcommand != "fit" or any(isinstance(one, GradientFree) for one in given)
        return [] if driven else [GradientFree(estimator)]

    def after_fit(self) -> None:
        """Say what came out, and where to look at it."""
        folder = self.trainer.log_dir  # a collective: asked on every rank
        if not self.trainer.is_global_zero or getattr(self.trainer, "fast_dev_run", False) or self.trainer.interrupted:
            return
        metrics = self.trainer.callback_metrics
        resumed_at = self.checkpoint.get("global_step", 0) if self.checkpoint else 0
        named = {"val/acc": "Validation accuracy", "val/loss": "Validation loss"}
        reached = next((f"{name} {metrics[tag]:.4f}" for tag, name in named.items() if tag in metrics), "Trained:")
        driver = driver_of(self.trainer, self.model)
        if self.trainer.global_step > resumed_at and driver is not None:
            print(f"\n{reached} after {self.trainer.global_step:,} steps,", end=" ")
            print(f"{driver.forward_passes:,} forward passes of a batch.")
        if self.trainer.logger is not None and folder is not None:
            print(f"The run is in {Path(folder)}; to see its curves: tensorboard --logdir {Path(folder).parent}")


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of a run that ended so, with a message to print; None where it is a fault of the program."""
    if isinstance(error, SIGTERMException):
        return int(error.code or 143)
    failed = isinstance(error, TrainingDiverged | WeightsDiverged | ProcessLost | MisconfigurationException)
    return 1 if failed or (isinstance(error, RuntimeError) and tells_of_loss(error)) else None


class FitAlone(CLI):
    """``fit`` without the other subcommands, whose parsers take longer to make than a small net to train."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """One."""
        return {"fit": CLI.subcommands()["fit"]}


def fit(words: Sequence[str]) -> Trainer:
    """Run ``fit`` with these words and return its trainer; what goes wrong is raised."""
    return FitAlone(["fit", *words]).trainer


class Prepared(FitAlone):
    """What ``fit`` would train with these words, made and checked, and not trained."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(["fit", *words])

    @property
    def options(self) -> dict[str, Any]:
        """All options of ``fit``, as plain containers."""
        return yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_none=False))

    def fit(self, **kwargs: Any) -> None:
        """Train nothing."""

    def after_fit(self) -> None:
        """Say nothing."""


def _set_reference(trainer: Trainer, reference: str) -> None:
    """Give a run to the callbacks that can compare with one and have none."""
    comparing = [callback for callback in _callbacks(trainer) if hasattr(callback, "reference")]
    if not comparing:
        raise UserError(f"reference '{reference}': no callback compares with it; add -c callbacks/observe")
    for callback in comparing:
        callback.reference = callback.reference or reference


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined]
