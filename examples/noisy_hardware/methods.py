"""Ways to adapt weights to the chip that will use them."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from math import inf
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

import zo_lightning as zo
from examples.noisy_hardware.device import LIMIT, SHAPES, Device
from examples.results import Cost, Result
from zo_lightning.costs import count_flops

READS = 5100  # that a method has, of 32 images
Batches = Iterator[tuple[Tensor, Tensor]]


def zeroth_order(device: Device, weights: list[Tensor], batches: Batches, reads: int, lr: float, mu: float) -> None:
    """A step writes 17 candidates, one after the other, and their losses are all that it reads."""
    optimizer = zo.NormalizedSGD(weights, lr)
    search = zo.AskTell(weights, zo.ZerothOrder(stencil=zo.ForwardDifference(mu), samples=16), optimizer)

    def step(x: Tensor, y: Tensor) -> None:
        search.tell([F.cross_entropy(device(candidate, x)[-1], y) for candidate in search.ask()])

    repeat(step, optimizer, weights, batches, reads // len(search))


def ideal_gradient(
    device: Device,
    weights: list[Tensor],
    batches: Batches,
    reads: int,
    lr: float,
    limit: float = LIMIT,
    hidden_is_read: bool = True,
) -> None:
    """Backpropagation through the ideal model, at the values that the device gives; it may know of their limit."""
    optimizer = torch.optim.Adam(weights, lr)

    def at(output: Tensor, ideal: Tensor) -> Tensor:
        """The measured value with the gradient of the ideal one."""
        ideal = ideal * (output.abs() < limit)
        return output + (ideal - ideal.detach())

    def step(x: Tensor, y: Tensor) -> None:
        hidden, logits = device(weights, x)
        ideal = F.linear(x, weights[0])
        hidden = at(hidden, ideal) if hidden_is_read else ideal.clamp(-limit, limit)
        optimizer.zero_grad()
        F.cross_entropy(at(logits, F.linear(hidden.relu(), weights[1])), y).backward()
        optimizer.step()

    repeat(step, optimizer, weights, batches, reads)


def left_alone(device: Device, weights: list[Tensor], batches: Batches, reads: int) -> None:
    """The device ages as with the other methods."""
    device.reads += reads


def repeat(
    step: Callable[..., None], optimizer: torch.optim.Optimizer, weights: list[Tensor], batches: Batches, steps: int
) -> None:
    """Steps with a learning rate that decays to 0, and weights that cells can hold."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        step(*next(batches))
        schedule.step()
        for weight in weights:
            weight.data.clamp_(-1, 1)


def ideal_weights(batches: Batches) -> list[Tensor]:
    """Of the ideal model, by backpropagation; noise on them makes them robust, as is usual for such chips."""
    weights = [(torch.randn(shape) / shape[1] ** 0.5).requires_grad_() for shape in SHAPES]
    optimizer = torch.optim.Adam(weights, 1e-2)

    def step(x: Tensor, y: Tensor) -> None:
        first, second = (weight * (1 + 0.3 * torch.randn_like(weight)) for weight in weights)
        optimizer.zero_grad()
        F.cross_entropy(F.linear(F.linear(x, first).relu(), second), y).backward()
        optimizer.step()

    repeat(step, optimizer, weights, batches, 1500)
    return weights


def digits(held_out: bool) -> tuple[Batches, Tensor, Tensor]:
    """Batches for training, and images and labels for testing: in a search, of the training set."""
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.as_tensor(pixels).float() / 16, torch.as_tensor(classes)
    split = partial(train_test_split, test_size=360, random_state=0)
    train, test = split(range(len(labels)), stratify=labels)
    if held_out:
        train, test = split(train, stratify=labels[train])
    chosen = (torch.as_tensor(train)[torch.randint(len(train), (32,))] for _ in count())
    return ((images[k], labels[k]) for k in chosen), images[test], labels[test]


METHODS: dict[str, Callable[..., None]] = {
    "left alone": left_alone,
    "ideal gradient, clipping unknown": partial(ideal_gradient, limit=inf, lr=1e-5),
    "ideal gradient": partial(ideal_gradient, lr=1e-3),
    "ideal gradient, logits alone are read": partial(ideal_gradient, hidden_is_read=False, lr=1e-3),
    "ZerothOrder": partial(zeroth_order, lr=1e-2, mu=0.1),
}


class Job(NamedTuple):
    """A method on a device of its own; a search has settings of its own, and tests on a part of the training set."""

    method: str
    seed: int
    reads: int = READS
    settings: dict[str, float] = {}


def train(job: Job) -> Result:
    """Train the ideal model, write its weights into a new device, adapt them, and test them there before and after."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    batches, x, y = digits(held_out=bool(job.settings))
    weights, device = ideal_weights(batches), Device(job.seed)
    adapt = partial(METHODS[job.method], batches=batches, **job.settings)

    def accuracy() -> float:
        reads = device.reads
        right = [(device(weights, x)[-1].argmax(1) == y).float().mean().item() for _ in range(10)]
        device.reads = reads  # tests do not age it
        return sum(right) / len(right)

    before = accuracy()
    with Cost() as cost:
        adapt(device, weights, reads=job.reads)
    after = accuracy()
    gflops = count_flops(lambda: adapt(device, weights, reads=17)) / 17 * job.reads / 1e9
    name = ", ".join([job.method, *(f"{key}={value:g}" for key, value in job.settings.items())])
    metric = "held-out accuracy on the chip" if job.settings else "test accuracy on the chip"
    return Result("noisy chip, digits", name, job.seed, metric, before, after, gflops, cost.peak_mb, cost.seconds)
