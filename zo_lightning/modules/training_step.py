"""The loss of a LightningModule, safe to ask again: one pass of a training step counts, the others leave no trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from zo_lightning.distributed import finite_everywhere
from zo_lightning.objective import Objective


def logs_now(module: Any) -> bool:
    """Whether Lightning passes the metrics of the present training step on to the loggers."""
    trainer: Any = module.trainer
    every = trainer.log_every_n_steps
    return every > 0 and (trainer.fit_loop.total_batch_idx + 1) % every == 0


class TrainingStep(Objective):
    """The loss of a LightningModule's ``training_step``: its first forward pass counts, further ones are silent."""

    def __init__(self, training_step: Callable[[], Any], module: LightningModule) -> None:
        super().__init__(self._loss, module)
        self.training_step = training_step
        self.output: Any = None
        self._touched: list[Metric] | None = None  # by the first forward pass

    def _loss(self) -> Tensor:
        output = self._run()
        return output["loss"] if isinstance(output, Mapping) else output

    def per_example(self) -> Tensor:
        """Ask for the losses of the examples, which a training step returns beside their mean."""
        output = self._run()
        return output.get("losses", output["loss"]) if isinstance(output, Mapping) else output

    def _run(self) -> Any:
        if self._touched is not None:
            with _silent(self.module, self._touched):
                output = self.training_step()
        else:
            metrics = [metric for metric in self.module.modules() if isinstance(metric, Metric)]
            counts = [metric._update_count for metric in metrics]
            output = self.output = self.training_step()
            wrapped = {id(inner) for m in metrics if isinstance(m, WrapperMetric) for inner in m.modules()}
            self._touched = [
                metric
                for metric, count in zip(metrics, counts, strict=True)
                if metric._update_count != count or id(metric) in wrapped  # a wrapper does not count
            ]
        return output

    def differentiable(self) -> Tensor:
        """Ask for the loss with its graph; one that is not finite on another process is not finite here."""
        with finite_everywhere(self.module.device, self.module.global_step):  # type: ignore[arg-type]
            return super().differentiable()

    def backpropagate(self, loss: Tensor) -> None:
        """Let Lightning backpropagate."""
        self.module.manual_backward(loss)  # type: ignore[operator]

    def replace_loss(self, loss: Tensor) -> None:
        """Put the estimator's loss in the place of the first forward pass's, in the form ``training_step`` chose."""
        self.output = {**self.output, "loss": loss} if isinstance(self.output, Mapping) else loss


def _no_log(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _silent(module: nn.Module, metrics: list[Metric]) -> Iterator[None]:
    """Let ``self.log`` do nothing, ``metrics`` forget what they see, and the module what changes its own attributes.

    Those are public ones that are numbers, strings or containers: a list of outputs, a counter, a running mean.
    """
    states = [{name: _copy(value) for name, value in vars(metric).items()} for metric in metrics]
    attributes = vars(module)
    before = {name: value for name, value in attributes.items() if not name.startswith("_")}
    contents = [(value, value.copy()) for value in before.values() if type(value) in (list, dict, set)]
    attributes.update(log=_no_log, log_dict=_no_log)
    try:
        yield
    finally:
        for name in [name for name in attributes if not name.startswith("_") and name not in before]:
            del attributes[name]
        attributes.update(before)
        for container, content in contents:
            container.clear()
            container.extend(content) if type(container) is list else container.update(content)
        for metric, state in zip(metrics, states, strict=True):
            vars(metric).update(state)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value.copy() if type(value) is list else value
