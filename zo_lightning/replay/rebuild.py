"""The weights of any step of a run, from its start and the log of its steps: no data, no forward pass."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zo_lightning.distributed import fingerprint
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights
from zo_lightning.replay.start import CannotReplay, Start, as_settings
from zo_lightning.step_log import Check, Record, Settings, Step, read_steps

FOLDER, STEPS = "trajectory", "steps.log"


@dataclass(frozen=True)
class Rebuilt:
    """The weights of a run at one step.

    Attributes:
        step: optimizer steps done.
        tensors: the module's weights and buffers by name; those that no optimizer moves, as they were at the start.
        checked: the last step at which the weights were compared with a hash of the run's own, or None.
    """

    step: int
    tensors: dict[str, Tensor]
    checked: int | None


def trajectory_folder(run: Path) -> Path:
    """The folder of a run's start and log: ``<run>/trajectory``, or the folder itself.

    Raises:
        CannotReplay: there is neither.
    """
    for folder in (run / FOLDER, run):
        if (folder / STEPS).is_file():
            return folder
    raise CannotReplay(f"'{run}' has no {FOLDER}/{STEPS}: train with the callback TrajectoryLog")


def rebuild(run: Path, to: int | None = None, progress: Callable[[int], object] = lambda step: None) -> Rebuilt:
    """Rebuild the weights that a run had after ``to`` optimizer steps, bit for bit.

    Args:
        run: its folder.
        to: the step; None for the last one logged.
        progress: called with each step that is done.

    Raises:
        CannotReplay: there is no log, it is damaged before that step, or the weights do not have the hash that the run
            logged: something else than the optimizer has written into them.
        OSError: a file cannot be read.
    """
    folder = trajectory_folder(run)
    try:
        return replay_steps(Start.read(folder), read_steps(folder / STEPS), to, progress)
    except CannotReplay:
        raise
    except ValueError as error:
        raise CannotReplay(str(error)) from error


def replay_steps(
    start: Start,
    records: Iterable[Record],
    to: int | None = None,
    progress: Callable[[int], object] = lambda step: None,
) -> Rebuilt:
    """Rebuild weights from a start and records, as ``rebuild`` does from files."""
    if to is not None and to < 0:
        raise CannotReplay(f"a step is a number from 0 on, got {to}")
    weights, state, done, checked = start.weights(), State(), 0, None
    optimizer = start.make_optimizer(weights)
    for record in records:
        if isinstance(record, Check):
            if record.step == done and record.digest != fingerprint(weights):
                raise CannotReplay(
                    f"after step {done} the weights are not those of the run: something else than its optimizer wrote "
                    "into them (averaging, pruning, a hook), or another machine rounds differently"
                )
            checked = done if record.step == done else checked
            continue
        if isinstance(record, Settings):
            for group, changed in zip(optimizer.param_groups, record.groups, strict=True):
                group.update(as_settings(changed))
            continue
        if done == to:
            break
        _add(start, weights, record, state)
        if record.stepped:
            _step(start, optimizer, record)
            done = record.step + 1
            progress(done)
    if to is not None and done != to:
        raise CannotReplay(f"the log ends after step {done}: there is no step {to}")
    moved = {name: p.detach() for name, p in zip(weights.names, weights, strict=True)}
    return Rebuilt(done, _all_names(start, moved), checked)


@torch.no_grad()
def _add(start: Start, weights: Weights, record: Step, state: State) -> None:
    if record.skipped:
        return
    for p, gradient in start.estimator.replay(weights, record.step, record.loss, record.slopes, state).gradients:
        gradient = gradient if record.scale == 1 else gradient * record.scale
        p.grad = gradient if p.grad is None else p.grad.add_(gradient)


def _step(start: Start, optimizer: torch.optim.Optimizer, record: Step) -> None:
    if len(record.rates) != len(optimizer.param_groups):
        raise CannotReplay(
            f"step {record.step} has {len(record.rates)} learning rates for {len(optimizer.param_groups)}"
        )
    for group, rate in zip(optimizer.param_groups, record.rates, strict=True):
        group["lr"] = rate
    if start.clip is not None:
        limit, algorithm = start.clip
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(params, limit)
        else:
            torch.nn.utils.clip_grad_norm_(params, limit)
    optimizer.step()
    optimizer.zero_grad()


def _all_names(start: Start, moved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the moved weights into all tensors of the start; where a weight is tied, under each of its names."""
    tensors = dict(start.tensors)
    for name, alias in start.aliases.items():
        tensors[name] = moved[alias]
    return tensors
