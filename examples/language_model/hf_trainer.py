"""The same in the ``Trainer`` of ``transformers``: one method of it is overridden."""

from typing import Any

import torch
from transformers import Trainer

import zo_lightning as zo


class ZOTrainer(Trainer):
    """A ``Trainer`` whose gradient comes from forward passes only; all else is as it was.

    Optimizer, schedule, clipping, accumulation, logging and checkpoints are those of ``TrainingArguments``. Directions
    follow from the global step, so that a resumed run repeats the uninterrupted one; the batches of a step share them.
    """

    estimator: zo.GradientEstimator = zo.ZerothOrder()

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Fill ``.grad`` by the estimator, in place of ``loss.backward()``."""
        model.train()
        inputs = self._prepare_inputs(inputs)

        def loss() -> Any:
            mean: Any = self.compute_loss(model, inputs)
            return mean / self.current_gradient_accumulation_steps

        return self.estimator.backward(loss, model, self.state.global_step)
