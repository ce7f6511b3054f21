"""Where callbacks write to: every logger of the trainer, or files in the run's folder where it has none that can."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

_said: set[str] = set()


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run: that of its first logger, or the trainer's root where there is none."""
    if trainer.logger is None:
        return Path(trainer.default_root_dir)
    folder = getattr(trainer.logger, "log_dir", None)
    if folder is not None:
        return Path(folder)
    root = trainer.logger.save_dir or trainer.default_root_dir
    return Path(root, str(trainer.logger.name), str(trainer.logger.version))


def tensorboards(trainer: Trainer) -> list[Any]:
    """The TensorBoard writers among the loggers, told by what they can do, as Lightning has two packages."""
    writers = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [writer for writer in writers if hasattr(writer, "add_embedding")]


def log_scalars(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Draw numbers in all loggers, at ``trainer.global_step``. What is not finite is left out: no chart can show it.

    Where there is no logger, they are appended to ``scalars.csv`` (step, tag, value) in the run's folder.
    """
    finite = {tag: float(value) for tag, value in values.items() if math.isfinite(value)}
    if not finite or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        logger.log_metrics(finite, step=trainer.global_step)
    if not trainer.loggers and not _is_trial(trainer):
        file = run_folder(trainer) / "scalars.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows((trainer.global_step, tag, value) for tag, value in finite.items())


def log_image(trainer: Trainer, tag: str, image: Tensor) -> None:
    """Show an image in every logger that can: TensorBoard, or one with a ``log_image`` of its own (Weights & Biases).

    Where none can, it becomes ``images/<tag>/step=<step>.png`` in the run's folder, which is said once.

    Args:
        trainer: whose loggers are asked.
        tag: its name, with ``/`` between the parts.
        image: [C, H, W] with C = 1 or 3, uint8, or floating point in [0, 1].
    """
    if not trainer.is_global_zero:
        return
    step = trainer.global_step
    pixels = image if image.dtype == torch.uint8 else image.clamp(0, 1).mul(255).round().to(torch.uint8)
    array = np.ascontiguousarray(pixels.cpu().permute(1, 2, 0).expand(-1, -1, 3).numpy())
    shown = False
    for writer in tensorboards(trainer):
        writer.add_image(tag, array, step, dataformats="HWC")
        shown = True
    for logger in trainer.loggers:
        if callable(show := getattr(logger, "log_image", None)):
            show(key=tag, images=[Image.fromarray(array)], step=step)
            shown = True
    if not shown and not _is_trial(trainer):
        file = run_folder(trainer) / "images" / tag / f"step={step:09d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)
        say_once(f"no logger of this run shows images: they are written to {run_folder(trainer) / 'images'}")


def log_figure(trainer: Trainer, tag: str, figure: Any) -> None:
    """Show a matplotlib ``Figure`` as an image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    if trainer.is_global_zero:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        log_image(trainer, tag, pixels.permute(2, 0, 1))


def log_histogram(trainer: Trainer, tag: str, values: Tensor) -> None:
    """Draw a histogram in TensorBoard, of the values that are finite; other loggers have none in common."""
    if not trainer.is_global_zero:
        return
    for writer in tensorboards(trainer):
        values = values.detach().float().cpu().flatten()
        values = values[values.isfinite()]
        if len(values):
            writer.add_histogram(tag, values, trainer.global_step)


def say_once(message: str) -> None:
    """Warn on rank zero; equal messages of one process once."""
    if message not in _said:
        _said.add(message)
        rank_zero_warn(message)


def _is_trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))
