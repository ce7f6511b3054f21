"""What a LightningModule's trainer must be like where an estimator runs on several processes."""

from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from zo_lightning.distributed import loss_of_process, tells_of_loss
from zo_lightning.estimators import Backprop, GradientEstimator


def splits_data(estimator: GradientEstimator) -> bool:
    """Whether each process needs a batch of its own: it does unless they split the directions of one batch."""
    return getattr(getattr(estimator, "distributed", None), "split", "data") != "directions"


def of_all_ranks(examples: int) -> dict[str, Any]:
    """Arguments of ``self.log`` for the mean over the examples of all ranks.

    The size is no int: Lightning averages sizes over ranks in their own type, which would round them down.
    """
    return {"batch_size": float(examples), "sync_dist": True}


def check_processes(trainer: Any, estimator: GradientEstimator) -> None:
    """Raise MisconfigurationException where the processes of a trainer would not keep equal weights."""
    if trainer.world_size == 1 or isinstance(estimator, Backprop):
        return
    name = type(estimator).__name__
    if not hasattr(estimator, "distributed"):
        raise MisconfigurationException(
            f"{name} gives each process a gradient of its own, and has no way to share it (it has no 'distributed'): "
            "use devices=1, or ZerothOrder, ForwardGradient or PerExample"
        )
    if not isinstance(trainer.strategy, DDPStrategy):
        raise MisconfigurationException(
            f"{name} needs all weights in every process, which {type(trainer.strategy).__name__} does not promise: "
            "use strategy='ddp'"
        )


def check_samplers(trainer: Any, estimator: GradientEstimator) -> None:
    """Raise MisconfigurationException where processes that split directions would see different batches."""
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    if trainer.world_size > 1 and not splits_data(estimator) and isinstance(sampler, DistributedSampler):
        raise MisconfigurationException(
            "split='directions' needs the same batch in every process, and a DistributedSampler splits them: "
            "use Trainer(use_distributed_sampler=False) and a loader of equal order, or split='data'"
        )


def keep_gradients(trainer: Any) -> None:
    """Tell DDP not to average gradients that estimators give alike to all processes, from what they share themselves.

    Every training step, and the pass after it, still begins with rank zero's buffers, as in automatic optimization: DDP
    stops broadcasting them where it has no gradients to reduce.
    """

    def broadcasts_next(model: nn.Module, *_: Any) -> None:
        model.require_forward_param_sync = model.module.training  # type: ignore[assignment,union-attr]

    if isinstance(model := trainer.strategy.model, DistributedDataParallel):
        model.require_backward_grad_sync = False
        model.register_forward_hook(broadcasts_next)


def explain_loss(trainer: Any) -> None:
    """Let the error of a run with several processes say so where one of them is gone."""
    if trainer.world_size > 1 and not any(isinstance(one, _ExplainsLoss) for one in trainer.callbacks):
        trainer.callbacks.append(_ExplainsLoss())


class _ExplainsLoss(Callback):
    """Says what the errors of Lightning's and DistributedDataParallel's own collectives mean."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put it before what the error says."""
        if tells_of_loss(exception):
            exception.args = (loss_of_process(exception, trainer.global_step),)
