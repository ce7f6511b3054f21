"""The same in the ``Trainer`` of ``transformers``: one method of it is overridden."""

from typing import Any

import torch
from transformers import Trainer

import zo_lightning as zo


class ZOTrainer(Trainer):
    """A ``Trainer`` whose gradient comes from forward passes only; all else is as it was.

    Optimizer, schedule, clipping, logging and checkpoints are those of ``TrainingArguments``. A resumed run repeats the
    uninterrupted one, since directions follow from the global step. Every batch is an optimizer step:
    ``gradient_accumulation_steps`` stays 1.
    """

    estimator: zo.GradientEstimator = zo.ZerothOrder()

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Fill ``.grad`` by the estimator, in place of ``loss.backward()``."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        return self.estimator.backward(lambda: self.compute_loss(model, inputs), model, self.state.global_step)
