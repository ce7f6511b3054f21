"""What a short run is made of: batches drawn before, and callbacks that draw them and look at their losses."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from itertools import islice
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from zo_lightning.modules import TrainingDiverged
from zo_lightning.modules.delivery import without_gradient
from zo_lightning.modules.training_step import NeedsGraph, NoLoss, TrainingStep
from zo_lightning.objective import NonFiniteLoss

Look = Callable[[TrainingStep], float | None]
"""What is done with the loss of a batch, in place of a training step; the loss, or None."""


_LATEST = 5
"""Batches whose mean loss tells that a training diverges: that of one may be large by chance."""
_HOPELESS = 5
"""Times the loss at the start from which on a training is given up, about as in Lightning's ``lr_find``."""


class Batches:
    """Batches that were drawn before, as a loader."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class Collect(Callback):
    """Draws the first batches, and ends the run before it has trained on one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.batches: list[Any] = []
        self.in_epoch: float = math.inf

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them."""
        loader: Any = trainer.fit_loop._combined_loader
        self.in_epoch = trainer.num_training_batches
        self.batches = [batch for batch, *_ in islice(iter(loader), int(min(self.count, self.in_epoch)))]
        trainer.should_stop = True
        trainer.fit_loop.min_epochs = 0


class Turn(Callback):
    """Puts a look at the loss in the place of the training step, from a batch on.

    Attributes:
        ask: the module's own training step.
        arity: how many arguments that takes; None where Lightning sees it.
        seen: what the looks gave.
        trained: batches so far.
        looked: forward passes that the looks have asked for.
    """

    ask: Callable[..., Any]
    arity: int | None

    def __init__(self, look: Look, steps: int, told: Callable[[], Any], start: float) -> None:
        self.look, self.steps, self.told, self.start = look, steps, told, start
        self.seen: list[float] = []
        self.trained = self.looked = 0
        self._latest: deque[float] = deque(maxlen=_LATEST)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put it there: outside of what a ``GradientFree`` has put there before."""
        own = pl_module.training_step

        @wraps(own)  # Lightning reads its signature to know what to pass
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.told()
            if trainer.fit_loop.total_batch_idx < self.steps:
                output = own(*args, **kwargs)
                self.trained += 1
                if output is not None:
                    self._check(float(output["loss"] if isinstance(output, Mapping) else output))
                return output
            return self._looked(pl_module, args[: self.arity], kwargs)

        vars(pl_module)["training_step"] = training_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own back."""
        vars(pl_module).pop("training_step", None)

    def _check(self, loss: float) -> None:
        """Raise TrainingDiverged where the loss, which an estimator gives for displaced weights, has grown by far."""
        if self.trained == 1:
            self.start = max(self.start, abs(loss))
        self._latest.append(loss)
        if len(self._latest) == _LATEST and sum(self._latest) / _LATEST > _HOPELESS * self.start:
            raise TrainingDiverged

    def _looked(self, module: LightningModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        objective = TrainingStep(self.ask, module, *args, **kwargs)
        try:
            try:
                found = self.look(objective)
            except NeedsGraph:
                objective.with_graph = True
                found = self.look(objective)
        except NoLoss:
            return None
        except NonFiniteLoss as error:
            found = error.value
        finally:
            self.looked += objective.forward_passes
        if found is not None:
            self.seen.append(found)
        return objective.with_loss(without_gradient(0.0 if found is None else found, module))
