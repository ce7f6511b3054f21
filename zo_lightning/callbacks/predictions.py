"""What a model predicts, in a file."""

import csv
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from zo_lightning.callbacks.reporting import run_folder


class WritePredictions(BasePredictionWriter):
    """Writes what ``predict`` returned into the run's folder, and says where.

    Tensors of one number an example, [B], or of a few, [B, k], become ``predictions.csv`` with a row for each example in
    the order of the data; anything else becomes ``predictions.pt``, a list with what each batch gave. Of several
    processes each writes its own part, ``predictions_<rank>``.
    """

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all of them."""
        rank = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        if all(isinstance(one, Tensor) and one.ndim in (1, 2) and len(one) for one in predictions) and predictions:
            file = folder / f"predictions{rank}.csv"
            table = torch.cat([one.detach().cpu().reshape(len(one), -1) for one in predictions])
            with file.open("w", newline="", encoding="utf-8") as stream:
                rows = csv.writer(stream)
                rows.writerow(
                    ["prediction"] if table.shape[1] == 1 else [f"prediction_{k}" for k in range(table.shape[1])]
                )
                rows.writerows(table.tolist())
        else:
            file = folder / f"predictions{rank}.pt"
            torch.save(list(predictions), file)
        print(f"The predictions are in {file}")
