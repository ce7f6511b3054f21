"""Training by those who evaluate the losses elsewhere: ask for candidates, tell their losses."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from zo_lightning.distributed import world_size
from zo_lightning.estimators import ZerothOrder
from zo_lightning.estimators.base import resolve_seed
from zo_lightning.evaluation import Told, points
from zo_lightning.objective import NonFiniteLoss, check_loss
from zo_lightning.parameters import Parameters, as_module, kept, mapped
from zo_lightning.perturbed.weights import Value, Weights


class AskTell:
    """Zeroth order turned inside out: it hands out the points of a step, and takes their losses when they are there.

    Nothing is called back, so that a farm of simulators, a queue of jobs or a person may evaluate all candidates of a
    step at once (the interface of Nevergrad, CMA and evosax). The weights are those of ``estimator.backward`` and
    ``optimizer.step()``, bit for bit, and stay as they are until ``tell``.

    Args:
        parameters: to be trained: a module, or tensors that require a gradient, alone, in lists or in dictionaries.
        estimator: chooses the candidates; its ``evaluation`` is not used.
        optimizer: of the parameters.

    Attributes:
        step: steps told so far; equal seeds and steps give equal candidates.

    Raises:
        TypeError: the estimator is no ``ZerothOrder``: others need more than losses.
        ValueError: there are several processes.
    """

    def __init__(self, parameters: Parameters, estimator: ZerothOrder, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(estimator, ZerothOrder):
            raise TypeError(f"AskTell needs a ZerothOrder, which asks for losses alone, got {type(estimator).__name__}")
        if world_size() > 1:
            raise ValueError("AskTell is for one process, which may tell losses that others have evaluated")
        self.parameters = kept(parameters)
        self.module = as_module(self.parameters)
        self.optimizer = optimizer
        self.estimator = replace(estimator, seed=resolve_seed(estimator.seed))
        self.step = 0
        self._state = self.estimator.init(self.module)

    def __len__(self) -> int:
        """Candidates of a step."""
        offsets = self.estimator.stencil.offsets
        return self.estimator.samples * sum(offset != 0.0 for offset in offsets) + (0.0 in offsets)

    @torch.no_grad()
    def ask(self) -> list[Any]:
        """The candidates of this step, each like the parameters, in memory of its own; asked again, the same ones.

        Those of a module are dictionaries for ``torch.func.functional_call``.
        """
        weights, estimator = Weights.of(self.module), self.estimator
        position = {id(p): k for k, p in enumerate(weights)}
        drawn = estimator.draw(weights, self.step, self._state, False, range(estimator.samples))

        def candidate(at: Value) -> Any:
            return mapped(
                lambda _, p: (at(position[id(p)]) if id(p) in position else p).detach().clone(), self.parameters
            )

        return [candidate(at) for _, at in points(weights, drawn, estimator.stencil, self._state)]

    def tell(self, losses: Sequence[Any]) -> float:
        """Take the losses of the candidates, in their order, and let the optimizer make its step.

        Returns:
            The loss at the present weights (central differences: the mean of all).

        Raises:
            NonFiniteLoss: one is NaN or infinite. The weights stay, and the next ``ask`` has other candidates.
            ValueError: there are more or fewer than candidates, or one is no number; the same ones can be told again.
        """
        if len(losses) != len(self):
            raise ValueError(f"tell needs {len(self)} losses, one for each candidate of ask, got {len(losses)}")
        try:
            told = Told([check_loss(loss) for loss in losses])
        except NonFiniteLoss:
            self.step += 1
            raise
        loss = replace(self.estimator, evaluation=told).backward(_unasked, self.module, self.step, self._state)
        self.optimizer.step()
        self.module.zero_grad()
        self.step += 1
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """The weights, and everything that decides how they go on, as plain containers and tensors."""
        weights = Weights.of(self.module)
        return {
            "step": self.step,
            "seed": self.estimator.seed,
            "weights": {name: p.detach().clone() for name, p in zip(weights.names, weights, strict=True)},
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "state": self._state.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called, also between ``ask`` and ``tell``.

        Raises:
            ValueError: it is that of other weights.
        """
        weights = Weights.of(self.module)
        saved = {name: tuple(value.shape) for name, value in state["weights"].items()}
        present = {name: tuple(p.shape) for name, p in zip(weights.names, weights, strict=True)}
        if saved != present:
            raise ValueError(f"the state is that of the weights {saved}, and these are {present}")
        for name, p in zip(weights.names, weights, strict=True):
            p.copy_(state["weights"][name])
        self.step = state["step"]
        self.estimator = replace(self.estimator, seed=state["seed"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._state.load_state_dict(state["state"])


def _unasked() -> float:
    raise AssertionError("the losses have been told")
