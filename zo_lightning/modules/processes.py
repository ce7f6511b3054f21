"""What a LightningModule's trainer must be like where an estimator runs on several processes."""

from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from zo_lightning.estimators import Backprop, GradientEstimator


def splits_data(estimator: GradientEstimator) -> bool:
    """Whether each process needs a batch of its own: it does unless they split the directions of one batch."""
    return getattr(getattr(estimator, "distributed", None), "split", "data") == "data"


def check_processes(trainer: Any, estimator: GradientEstimator) -> None:
    """Raise MisconfigurationException where the processes of a trainer would not keep equal weights."""
    if trainer.world_size == 1 or isinstance(estimator, Backprop):
        return
    name = type(estimator).__name__
    if not hasattr(estimator, "distributed"):
        raise MisconfigurationException(
            f"{name} gives each process a gradient of its own, as large as the weights, and has no way to share it: "
            "use devices=1, or ZerothOrder or ForwardGradient, which exchange slopes alone"
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
    """Tell DDP not to average gradients that estimators give alike to all processes, from slopes that they share."""
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = False
