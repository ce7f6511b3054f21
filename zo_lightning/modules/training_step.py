"""The loss of a LightningModule, safe to ask again: one pass of a training step counts, the others leave no trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from zo_lightning.distributed import finite_everywhere
from zo_lightning.modules.attributes import Attributes, keeping, tensors_kept
from zo_lightning.objective import Objective


def logs_now(module: Any) -> bool:
    """Whether Lightning passes the metrics of the present training step on to the loggers."""
    trainer: Any = module.trainer
    every = trainer.log_every_n_steps
    return every > 0 and (trainer.fit_loop.total_batch_idx + 1) % every == 0


class NoLoss(Exception):
    """A training step returned None: Lightning's way to leave a batch out."""


class NeedsGraph(Exception):
    """A training step differentiates something by itself, and was asked without a graph."""


class TrainingStep(Objective):
    """The loss of a LightningModule's ``training_step``: its first forward pass counts, further ones leave no trace.

    Every pass begins where the step began: with the batch, the metrics and the modules' public attributes as they were.
    Afterwards they are as the first pass left them.

    Args:
        training_step: asked for the loss.
        module: whose it is.
        args: of the training step: the batch and its index, as far as it takes them.
        kwargs: of the training step.

    Attributes:
        with_graph: whether passes of an estimator record a graph, for a step that differentiates by its inputs.
    """

    with_graph = False

    def __init__(
        self, training_step: Callable[..., Any], module: LightningModule, /, *args: Any, **kwargs: Any
    ) -> None:
        self._keeping, self._metrics = keeping(module)
        super().__init__(self._loss, module, inputs=[*_tensors((args, kwargs)), *tensors_kept(self._keeping)])
        self.training_step, self.args, self.kwargs = training_step, args, kwargs
        self.output: Any = None
        self._start: Attributes | None = None

    def _loss(self) -> Tensor:
        output = self._run()
        return output["loss"] if isinstance(output, Mapping) else output

    def per_example(self) -> Tensor:
        """Ask for the losses of the examples, which a training step returns beside their mean."""
        output = self._run()
        return output.get("losses", output["loss"]) if isinstance(output, Mapping) else output

    def _run(self) -> Any:
        if self._start is not None:
            after = self._start
            if self._start.differs():
                after = Attributes(self._keeping, self._start.changed())
                self._start.restore()
            try:
                with _silent(self.module):
                    return self._ask()
            finally:
                after.restore()
        self._start = Attributes(self._keeping, self._metrics)
        try:
            self.output = self._ask()
        except BaseException:
            self._start.restore()
            self._start = None
            raise
        return self.output

    def _ask(self) -> Any:
        kwargs = {name: _own(value) for name, value in self.kwargs.items()}
        try:
            with torch.enable_grad() if self.with_graph else nullcontext():
                output = self.training_step(*map(_own, self.args), **kwargs)
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
            raise NeedsGraph from error
        if output is None:
            raise NoLoss
        return output

    def differentiable(self) -> Tensor:
        """Ask for the loss with its graph; one that is not finite on another process is not finite here."""
        with finite_everywhere(self.module.device, self.module.global_step):  # type: ignore[arg-type]
            return super().differentiable()

    def forward(self) -> None:
        """Run the step once with its graph, for backpropagation."""
        with self.differentiated():
            self.differentiable()
        self.forward_passes += 3

    @property
    def leaves_traces(self) -> bool:
        """Whether the first pass left more than its losses: in metrics, attributes, buffers, or beside its output."""
        beside = isinstance(self.output, Mapping) and not {"loss", "losses"}.issuperset(self.output)
        return beside or self.moves_state or (self._start is not None and self._start.differs())

    def with_loss(self, loss: Tensor) -> Any:
        """What the first forward pass returned, in the form that ``training_step`` chose, with another loss."""
        return {**self.output, "loss": loss} if isinstance(self.output, Mapping) else loss


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Let ``self.log`` do nothing."""
    attributes = vars(module)
    before = {name: attributes[name] for name in ("log", "log_dict") if name in attributes}
    attributes.update(log=_no_log, log_dict=_no_log)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del attributes[name]
        attributes.update(before)


def _own(value: Any) -> Any:
    """A batch whose lists and dictionaries a training step may change; its tensors are the same."""
    if type(value) is list:
        return [_own(one) for one in value]
    if type(value) is dict:
        return {key: _own(one) for key, one in value.items()}
    return tuple(map(_own, value)) if type(value) is tuple else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _no_log(*_: Any, **__: Any) -> None:
    pass
