"""Hardware in the loop, in simulation: a chip whose weights are not what was written, and whose sums are clipped.

python -m examples.noisy_hardware --search    # six settings of each method, on images held out of the training set
python -m examples.noisy_hardware             # the table and the figure, with the settings found
python -m examples.noisy_hardware --smoke     # a fifth of the reads, one seed
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

import zo_lightning as zo
from examples.results import Cost, Result, read, table, train_all
from zo_lightning.costs import count_flops

SHAPES = ((32, 64), (10, 32))  # of the weights
LIMIT = 2.0  # a sum of currents is clipped at ±2, and read in steps of 1/4
READS = 8500  # that a method has, of 32 images
Batches = Iterator[tuple[Tensor, Tensor]]


class Device:
    """A crossbar chip, to be replaced by a real one: weights are written into its cells, and its outputs are read."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.gain = [torch.exp(0.5 * torch.randn(shape, generator=self.random)) for shape in SHAPES]  # of each cell
        self.fading = [0.1 * torch.rand(shape, generator=self.random) for shape in SHAPES]
        self.shift = [0.2 * torch.randn(shape[0], generator=self.random) for shape in SHAPES]  # of each column's reader
        self.reads = 0

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """What one read of a batch gives for each layer; the last are the logits."""
        self.reads += 1
        outputs = []
        for weight, gain, fading, shift in zip(weights, self.gain, self.fading, self.shift, strict=True):
            noise = 1 + 0.1 * torch.randn(weight.shape, generator=self.random)
            cells = weight.clamp(-1, 1) * gain * noise * (1 + self.reads / 1000) ** -fading
            outputs.append((F.linear(x, cells, shift).clamp(-LIMIT, LIMIT) * 4).round() / 4)
            x = outputs[-1].relu()
        return outputs


def left_alone(device: Device, weights: list[Tensor], batches: Batches, reads: int, seed: int) -> None:
    """The device ages as with the other methods."""
    device.reads += reads


def ideal_gradient(
    device: Device, weights: list[Tensor], batches: Batches, reads: int, seed: int, lr: float, clipping: bool
) -> None:
    """Backpropagation through the ideal model, at the values that the device gives for each layer."""

    def measured(output: Tensor, ideal: Tensor) -> Tensor:
        passes = output.abs() < LIMIT if clipping else 1
        return output + passes * (ideal - ideal.detach())

    def step(x: Tensor, y: Tensor) -> None:
        hidden, logits = device(weights, x)
        hidden = measured(hidden, F.linear(x, weights[0])).relu()
        optimizer.zero_grad()
        F.cross_entropy(measured(logits, F.linear(hidden, weights[1])), y).backward()
        optimizer.step()

    optimizer = torch.optim.Adam(weights, lr)
    repeat(step, optimizer, weights, batches, reads)


def zeroth_order(
    device: Device, weights: list[Tensor], batches: Batches, reads: int, seed: int, lr: float, mu: float
) -> None:
    """A step writes 17 candidates, one after the other, and their losses are all that it reads."""

    def step(x: Tensor, y: Tensor) -> None:
        search.tell([F.cross_entropy(device(candidate, x)[-1], y) for candidate in search.ask()])

    optimizer = zo.NormalizedSGD(weights, lr)
    estimator = zo.ZerothOrder(stencil=zo.ForwardDifference(mu), samples=16, seed=seed)
    search = zo.AskTell(weights, estimator, optimizer)
    repeat(step, optimizer, weights, batches, reads // len(search))


def repeat(
    step: Callable[[Tensor, Tensor], None],
    optimizer: torch.optim.Optimizer,
    weights: list[Tensor],
    batches: Batches,
    steps: int,
) -> None:
    """Steps with a learning rate that decays to 0, and weights that cells can hold."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        step(*next(batches))
        schedule.step()
        for weight in weights:
            weight.data.clamp_(-1, 1)


def ideal_weights(batches: Batches, seed: int) -> list[Tensor]:
    """Of the ideal model, by backpropagation; noise on them makes them robust, as is usual for such chips."""
    torch.manual_seed(seed)
    weights = [(torch.randn(shape) / shape[1] ** 0.5).requires_grad_() for shape in SHAPES]

    def step(x: Tensor, y: Tensor) -> None:
        first, second = (weight * (1 + 0.3 * torch.randn_like(weight)) for weight in weights)
        optimizer.zero_grad()
        F.cross_entropy(F.linear(F.linear(x, first).relu(), second), y).backward()
        optimizer.step()

    optimizer = torch.optim.Adam(weights, 1e-2)
    repeat(step, optimizer, weights, batches, 1500)
    return weights


def digits(held_out: bool, seed: int) -> tuple[Batches, Tensor, Tensor]:
    """Batches for training, and images and labels for testing: in a search, of the training set."""
    x, y = load_digits(return_X_y=True)
    for _ in range(1 + held_out):
        x, test_x, y, test_y = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    images, labels = torch.tensor(x / 16).float(), torch.tensor(y)
    random = torch.Generator().manual_seed(seed)
    chosen = iter(lambda: torch.randint(len(images), (32,), generator=random), None)
    return ((images[k], labels[k]) for k in chosen), torch.tensor(test_x / 16).float(), torch.tensor(test_y)


METHODS: dict[str, Callable[..., None]] = {
    "left alone": left_alone,
    "backpropagation, ideal gradient": partial(ideal_gradient, clipping=False, lr=1e-4),
    "the same, clipping known": partial(ideal_gradient, clipping=True, lr=1e-3),
    "ZerothOrder": partial(zeroth_order, lr=1e-2, mu=0.1),
}
RATES = [{"lr": lr} for lr in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)]
TRIED = dict.fromkeys(METHODS, RATES) | {
    "left alone": [],
    "ZerothOrder": [{"lr": lr, "mu": mu} for lr in (1e-2, 2e-2) for mu in (0.03, 0.1, 0.3)],
}


class Job(NamedTuple):
    """A method on a device of its own; with settings in place of the method's in a search."""

    method: str
    seed: int
    reads: int
    settings: dict[str, float]


def train(job: Job) -> Result:
    """Train the ideal model, write its weights into a new device, adapt them, and test them there before and after."""
    torch.set_num_threads(1)
    batches, x, y = digits(bool(job.settings), job.seed)
    device, weights = Device(job.seed), ideal_weights(batches, job.seed)

    def accuracy() -> float:
        reads = device.reads
        right = [(device(weights, x)[-1].argmax(1) == y).float().mean().item() for _ in range(10)]
        device.reads = reads  # tests do not age it
        return sum(right) / len(right)

    adapt = partial(METHODS[job.method], batches=batches, seed=job.seed, **job.settings)
    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    gflops = count_flops(lambda: adapt(Device(0), copies, reads=17)) / 17 * job.reads / 1e9
    before = accuracy()
    with Cost() as cost:
        adapt(device, weights, reads=job.reads)
    name = ", ".join([job.method, *(f"{key}={value:g}" for key, value in job.settings.items())])
    metric = "accuracy on the chip" + (", held out" if job.settings else "")
    return Result("noisy chip, digits", name, job.seed, metric, before, accuracy(), gflops, cost.peak_mb, cost.seconds)


def draw(results: list[Result], file: Path) -> None:
    """A line from before to after for each device."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for row, name in enumerate(METHODS):
        for k, result in enumerate(result for result in results if result.method == name):
            place = row + 0.15 * (k - 1)
            axes.plot([result.before, result.after], [place, place], color="grey", zorder=1)
            axes.scatter(result.before, place, color="white", edgecolor="black", label="before" if row + k == 0 else "")
            axes.scatter(result.after, place, color="#0072B2", label="after" if row + k == 0 else "")
    axes.set_yticks(range(len(METHODS)), list(METHODS))
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy on the chip", xlim=(0, 1))
    axes.legend(loc="lower left")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Train on all devices, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/examples"), help="folder of table and figure")
    args = parser.parse_args()
    if args.search:
        jobs = [Job(name, 0, READS, tried) for name in METHODS for tried in TRIED[name]]
        return train_all(train, jobs, args.out / "search" / "noisy_hardware.csv", apart=False)
    seeds, reads = ([42], READS // 5) if args.smoke else (args.seeds, READS)
    jobs = [Job(name, seed, reads, {}) for name in METHODS for seed in seeds]
    train_all(train, jobs, args.out / "noisy_hardware.csv", apart=not args.smoke)
    results = read(args.out / "noisy_hardware.csv")
    print(table(results))
    draw(results, args.out / "noisy_hardware.png")


if __name__ == "__main__":
    main()
