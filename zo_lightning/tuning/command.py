"""The subcommand ``tune``."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zo_lightning.runs import own_folder
from zo_lightning.tuning.overlay import as_yaml, overlay
from zo_lightning.tuning.suggestion import Suggestion
from zo_lightning.tuning.tuner import tune
from zo_lightning.user_errors import UserError

YAML, PICTURE = "tune.yaml", "tune.png"


def tune_command(words: list[str], prepare: Callable[[Sequence[str]], Any]) -> int:
    """Run the command line of ``tune``; return its exit code.

    Args:
        words: those of ``fit``.
        prepare: makes all that ``fit`` would train with these words, as the attributes ``model``, ``datamodule``,
            ``trainer`` and ``options``.

    Raises:
        UserError: the words name a run to go on with, or are not those of ``fit``.
    """
    try:
        made = prepare(words)
        if made.options.get("ckpt_path") is not None:
            raise UserError("ckpt_path: tune looks for where a run begins; --init_from begins one with given weights")
        shows = None if made.trainer.progress_bar_callback is not None else False
        suggestion = tune(made.model, made.datamodule, made.trainer, progress=shows)
    except KeyboardInterrupt:
        print("\nzo-lightning: tune was stopped: nothing is written", file=sys.stderr)
        return 130
    changed, by_hand = overlay(suggestion, made.options)
    _report(suggestion, made.trainer, words, changed, [*suggestion.warnings, *by_hand])
    return 0


def _report(suggestion: Suggestion, trainer: Any, words: list[str], changed: Any, doubts: list[str]) -> None:
    folder = None
    text = as_yaml(changed, _comment(suggestion))
    if trainer.logger is not None:
        with own_folder(trainer):
            folder = Path(trainer.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / YAML).write_text(text, encoding="utf-8")
            suggestion.plot().savefig(folder / PICTURE, dpi=150)
    print(text, end="")
    for doubt in doubts:
        print(f"zo-lightning: warning: {doubt}", file=sys.stderr)
    if folder is not None:
        print(f"\nTo train with them, and to see how they were found ({folder / PICTURE}):")
        print(f"  zo-lightning fit {shlex.join([*words, '-c', str(folder / YAML)])}")


def _comment(suggestion: Suggestion) -> str:
    longest = [trial for trial in suggestion.trials if trial.steps == max(one.steps for one in suggestion.trials)]
    best = min(longest, key=lambda trial: trial.loss)
    lines = [
        f"Found in {suggestion.forward_passes:,} forward passes of a batch. On training batches held out, the loss",
        f"falls from {suggestion.start:.3f} to {best.loss:.3f} in {best.steps} batches at lr {best.lr:.2g}",
    ]
    if suggestion.batches_in_run is not None:
        lines[-1] += f"; for the run's {suggestion.batches_in_run:,} batches {suggestion.lr:.2g} is taken"
    lines[-1] += "."
    if suggestion.scan is not None and suggestion.mu is not None:
        errors = dict(zip(suggestion.scan.grid, suggestion.scan.errors, strict=True))
        if suggestion.mu in errors:
            lines.append(f"Slopes have a relative error of {errors[suggestion.mu]:.1%} at this mu.")
    return "\n".join(lines)
