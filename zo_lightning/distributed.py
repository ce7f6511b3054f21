"""Several processes: seeds are known to all, numbers are exchanged, directions are replayed."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from zo_lightning.counter import mix
from zo_lightning.objective import NonFiniteLoss

Probed = tuple[float, float]
"""The loss and the slope along a direction."""

_UNASKED = (0.0, 0.0)


class WeightsDiverged(RuntimeError):
    """The weights of two processes are no longer equal, or would not be after this step."""


class ProcessLost(RuntimeError):
    """A process of the group is gone, or did not answer in time."""


@dataclass(frozen=True)
class Distributed:
    """How the work of a step is split over the processes of ``torch.distributed``; without a group it is all done here.

    Every process holds all weights, and rebuilds the same ``ĝ = (1/q) Σᵢ cᵢ uᵢ``: directions are known from seed, step
    and index, and only losses and slopes travel, in one ``all_gather`` a step. Of N ranks, each sends 16 bytes per
    direction that it probes, and 16 that tell whether all agree (Salimans et al., *Evolution strategies as a scalable
    alternative*, 2017). ``PerExample`` has no slopes to exchange: it sums up gradients, as backpropagation does.

    Args:
        split: ``"data"``: each rank probes all directions on a batch of its own, and slopes are averaged over ranks, as
            ``DistributedDataParallel`` averages gradients. ``"directions"``: all ranks see the same batch, and rank r
            probes directions r, r + N, ...; the weights are those of one process, bit for bit. ``"both"``: rank r
            probes directions r, r + N, ... on a batch of its own, so that N ranks see N batches and each runs 1/N of
            the forward passes; every rank's batch has equal weight.
        check_every: steps after which a hash of the weights is compared over the ranks; seed and step always are.

    Raises:
        ValueError: ``split`` is none of these, ``check_every`` < 1, or, in a step, there are fewer directions than
            ranks that split them.
        WeightsDiverged: in a step, on all ranks.
        ProcessLost: in a step, where another rank has ended or is later than the group's timeout.
    """

    split: Literal["data", "directions", "both"] = "data"
    check_every: int = 1000

    def __post_init__(self) -> None:
        if self.split not in ("data", "directions", "both"):
            raise ValueError(f"split must be 'data', 'directions' or 'both', got {self.split!r}")
        if self.check_every < 1:
            raise ValueError(f"check_every must be at least 1, got {self.check_every}")

    @property
    def stream(self) -> tuple[int, ...]:
        """What tells this process's own random numbers from those of ranks that see another batch."""
        return (rank(),) if self.split != "directions" and world_size() > 1 else ()

    def own(self, samples: int) -> Sequence[int]:
        """The indices of the directions, of ``samples``, that this process probes."""
        if self.split == "data":
            return range(samples)
        if samples < world_size():
            raise ValueError(f"{world_size()} processes cannot split {samples} directions: take more samples")
        return _part(samples, rank())

    def exchange(
        self, probed: Sequence[Probed], samples: int, weights: Sequence[Tensor], seed: int, step: int
    ) -> list[Probed]:
        """The loss and the slope along every direction, equal on all ranks, from those that this one has ``probed``.

        Args:
            probed: along the directions of ``own``; not finite where a loss was not.
            samples: directions of the step.
            weights: of this process.
            seed: of the directions.
            step: the number of this training step.

        Raises:
            NonFiniteLoss: on all ranks, where one has a number that is not finite.
        """
        most = samples if self.split == "data" else -(-samples // world_size())
        padding = [_UNASKED] * (most - len(probed))
        sent = [number for pair in [*probed, *padding] for number in pair]
        received = self._agreed(sent, weights, seed, step)
        pairs = [list(zip(numbers[::2], numbers[1::2], strict=True)) for numbers in received]
        if self.split == "data":
            asked = zip(*pairs, strict=True)
            return [(_mean([loss for loss, _ in ranks]), _mean([slope for _, slope in ranks])) for ranks in asked]
        found = [pairs[index % world_size()][index // world_size()] for index in range(samples)]
        if self.split == "directions" or samples % world_size() == 0:
            return found
        # Ranks that probe one direction more than others must not count for more in the mean over all directions.
        fair = [samples / (world_size() * len(_part(samples, k))) for k in range(world_size())]
        return [(loss * fair[k % len(fair)], slope * fair[k % len(fair)]) for k, (loss, slope) in enumerate(found)]

    def reduce(self, means: Iterable[Tensor], samples: int, weights: Sequence[Tensor], seed: int, step: int) -> None:
        """Turn means over the samples of ``own`` into those over all samples of all ranks, in place.

        For estimators without slopes: each rank sends all numbers, as ``DistributedDataParallel`` does.
        """
        if world_size() == 1:
            return
        self._agreed([], weights, seed, step)
        share = len(self.own(samples)) / samples if self.split == "directions" else 1 / world_size()
        with _in_touch(step):
            for mean in means:
                real = torch.view_as_real(mean) if mean.is_complex() else mean
                total = real.mul(share).contiguous()
                dist.all_reduce(total)
                real.copy_(total)

    def _agreed(self, numbers: list[float], weights: Sequence[Tensor], seed: int, step: int) -> list[list[float]]:
        """The numbers of every rank, all finite, where the ranks are at one step with one seed and equal weights."""
        moment = float(mix(seed, step) >> 16)  # of 48 bits, which a float64 holds exactly
        digest = float(fingerprint(weights)) if step % self.check_every == 0 else 0.0
        received = gather([*numbers, digest, moment], weights[0].device, step)
        if others := _unlike([found.pop() for found in received]):
            raise WeightsDiverged(
                f"at step {step} of rank 0, rank {others} is at another step or has another seed: give the estimator a "
                "seed, and count steps alike on all ranks"
            )
        if others := _unlike([found.pop() for found in received]):
            raise WeightsDiverged(
                f"at step {step} the weights of rank {others} differ from those of rank 0: the processes began with "
                "different weights, or the step depends on something that they do not share"
            )
        for number in (number for found in received for number in found):
            if not math.isfinite(number):
                raise NonFiniteLoss(number)
        return received


def _part(samples: int, of: int) -> Sequence[int]:
    return range(samples)[of :: world_size()]


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _unlike(numbers: list[float]) -> str:
    """The ranks whose number is not that of rank 0."""
    return ", ".join(str(k) for k, number in enumerate(numbers) if number != numbers[0])


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process in the group; 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def closing_group() -> Iterator[None]:
    """Close a group of processes that is opened within, where all goes well.

    Left to the end of the interpreter, its threads may be torn down as they run, and abort the process.
    """
    there_before = dist.is_available() and dist.is_initialized()
    yield
    if not there_before and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def gather(numbers: Sequence[float], device: torch.device, step: int) -> list[list[float]]:
    """The numbers of every rank, in float64; as many on each.

    Raises:
        ProcessLost: one has ended, or is later than the group's timeout.
    """
    place = device if dist.get_backend() == "nccl" else torch.device("cpu")
    sent = torch.tensor(numbers, dtype=torch.float64, device=place)
    received = [torch.empty_like(sent) for _ in range(world_size())]
    with _in_touch(step):
        dist.all_gather(received, sent)
    return [one.tolist() for one in received]


@contextmanager
def _in_touch(step: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(loss_of_process(error, step)) from error


def tells_of_loss(error: BaseException) -> bool:
    """Whether an error is that of a collective without answer, in whichever library it was called."""
    of_torch = isinstance(error, dist.DistBackendError | dist.DistNetworkError) if dist.is_available() else False
    return of_torch or (isinstance(error, RuntimeError) and "gloo" in str(error) and not isinstance(error, ProcessLost))


def loss_of_process(error: BaseException, step: int) -> str:
    """What such an error means, and what to do."""
    return (
        f"rank {rank()} at step {step}: another process has ended or does not answer "
        f"({str(error).splitlines()[0]}). Resume from the last checkpoint, on any number of processes"
    )


def fingerprint(weights: Sequence[Tensor]) -> int:
    """A hash of the values of tensors, of 48 bits: a float64 holds it exactly."""
    digest = hashlib.blake2b(digest_size=6)
    for p in weights:
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big")


@contextmanager
def finite_everywhere(device: torch.device, step: int) -> Iterator[None]:
    """Let a ``NonFiniteLoss`` of one rank be one of all, before any of them waits for the others' gradients."""
    if world_size() == 1:
        yield
        return
    mine: NonFiniteLoss | None = None
    try:
        yield
    except NonFiniteLoss as error:
        mine = error
    values = [value for (value,) in gather([0.0 if mine is None else mine.value], device, step)]
    if mine is not None:
        raise mine
    for value in values:
        if not math.isfinite(value):
            raise NonFiniteLoss(value)
