"""How TensorBoard arranges a run's curves, and what its table of runs can be sorted by."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from zo_lightning.modules.driver import driver_of
from zo_lightning.callbacks.reporting import tensorboards
from zo_lightning.estimators import Backprop

LAYOUT = {
    "Losses": {
        "training loss": ["Multiline", ["^train/loss$", "^train_loss$"]],
        "validation loss": ["Multiline", ["^val/loss$", "^val_loss$"]],
    },
    "Accuracy": {
        "validation accuracy": ["Multiline", ["^val/acc$", "^val_acc$"]],
        "training accuracy": ["Multiline", ["^train/acc$", "^train_acc$"]],
    },
    "At equal cost (x: million floating-point operations, or what Budget's axis is)": {
        "training loss": ["Multiline", [r"^vs_\w+/train/loss$"]],
        "validation accuracy": ["Multiline", [r"^vs_\w+/val/acc$"]],
    },
    "Alignment with the true gradient": {
        "cosine": ["Multiline", ["^vs_true_gradient/cosine/all$", "^vs_true_gradient/expected_cosine/all$"]],
        "signal to noise of the slope": ["Multiline", ["^vs_true_gradient/slope_snr$"]],
    },
    "Weights": {
        "cosine to the reference run": ["Multiline", ["^vs_reference/cosine/all$"]],
        "distance from the start": ["Multiline", ["^vs_start/l2/all$"]],
    },
}
"""Category -> chart -> the tags on it, as regular expressions. A chart shows all selected runs."""

COLUMNS = {
    "d": "weights (d)",
    "lr": "learning rate",
    "mu": "step (mu)",
    "random_directions": "directions",
    "samples": "directions per step",
    "task": "module, net",
}
"""How TensorBoard heads the columns of its table, where the name that it sorts them by is short."""

_OF_SOME = {"mu": 0.0, "random_directions": "", "samples": 0}
"""Columns that only some estimators fill, and a value of each kind: TensorBoard takes the columns from one run."""


class Dashboard(Callback):
    """Arranges TensorBoard's custom scalars page and fills its table of hyper-parameters.

    A chart of the custom scalars page shows all runs, so that first and zeroth order are on one. The table has a row
    per run: ``d`` (trainable weights), ``estimator``, ``lr``, ``mu``, ``optimizer``, ``random_directions`` (their
    distribution), ``samples``, ``seed`` and ``task`` (module and net), and the last values of ``metrics``; what an
    estimator does not have is left empty. Other loggers get the same hyper-parameters by ``log_hyperparams``.

    Args:
        metrics: tags of the table's metrics. Runs of one table should name the same: TensorBoard takes those of one.
    """

    def __init__(
        self, metrics: Sequence[str] = ("val/acc", "val/loss", "train/loss", "budget/flops", "budget/seconds")
    ) -> None:
        self.metrics = tuple(metrics)

    @property
    def state_key(self) -> str:
        """One dashboard per run."""
        return type(self).__qualname__

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout and the hyper-parameters."""
        if not trainer.is_global_zero:
            return
        writers = tensorboards(trainer)
        parameters = hyperparameters(trainer, pl_module)
        for writer in writers:
            writer.add_custom_scalars(LAYOUT)
            experiment, start, _ = _summaries(parameters, self.metrics)
            writer._get_file_writer().add_summary(experiment)
            writer._get_file_writer().add_summary(start)
        for logger in trainer.loggers:
            if getattr(logger, "experiment", None) not in writers:
                logger.log_hyperparams(parameters)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the run as finished."""
        if trainer.is_global_zero:
            for writer in tensorboards(trainer):
                writer._get_file_writer().add_summary(_summaries({}, self.metrics)[2])


def hyperparameters(trainer: Trainer, module: LightningModule) -> dict[str, str | float]:
    """What tells runs apart; without what the estimator does not have.

    TensorBoard sorts the names and shows the first five, hence these: d, estimator, lr, mu, optimizer.
    """
    driver = driver_of(trainer, module)
    estimator: Any = Backprop() if driver is None else driver.estimator
    optimizer: Any = trainer.optimizers[0] if trainer.optimizers else None
    directions = getattr(estimator, "directions", None)
    net = getattr(module, "net", None)
    found = {
        "d": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "estimator": type(estimator).__name__,
        "lr": optimizer.param_groups[0].get("lr", 0.0) if optimizer is not None else 0.0,
        "mu": None if driver is None else driver.mu_in_use,
        "optimizer": type(optimizer).__name__ if optimizer is not None else "",
        "random_directions": None if directions is None else type(directions).__name__,
        "samples": getattr(estimator, "samples", None),
        "seed": torch.initial_seed(),
        "task": type(module).__name__ if net is None else f"{type(module).__name__}, {type(net).__name__}",
    }
    return {name: value for name, value in found.items() if value is not None}


def _summaries(parameters: dict[str, Any], metrics: Sequence[str]) -> tuple[Any, Any, Any]:
    from tensorboard.plugins.hparams import plugin_data_pb2
    from torch.utils.tensorboard.summary import hparams  # slow to import

    _, start, end = hparams(parameters, dict.fromkeys(metrics, 0.0))
    experiment, _, _ = hparams({**_OF_SOME, **parameters}, dict.fromkeys(metrics, 0.0))
    plugin = experiment.value[0].metadata.plugin_data
    data = plugin_data_pb2.HParamsPluginData.FromString(plugin.content)  # type: ignore[attr-defined]
    for info in data.experiment.hparam_infos:
        info.display_name = COLUMNS.get(info.name, "")
    plugin.content = data.SerializeToString()
    return experiment, start, end
