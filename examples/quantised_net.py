"""A net that backpropagation cannot train: weights of 8 bits, activations that are signs.

python -m examples.quantised_net --root data --search    # MNIST: six settings of each method on held-out images
python -m examples.quantised_net --root data             # the table and the figure, with the settings below
python -m examples.quantised_net --smoke                 # scikit-learn's digits, half a minute
"""

import argparse
import logging
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from pytorch_lightning import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from examples.results import Cost, Result, read, record, table
from zo_lightning.data import MNIST, Digits

STEP = 1 / 256  # from one weight that 8 bits can hold to the next
COLOURS = {"ZerothOrder": "#0072B2", "PerExample": "#D55E00"}  # Okabe and Ito's


class QuantisedNet(nn.Module):
    """784-128-10: a pass sees weights rounded to 256 levels, and the hidden layer says -1 or 1.

    Args:
        straight_through: what passes gradients on as if it were not quantised: "nothing", "weights" or "all".
    """

    def __init__(self, straight_through: str) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(784, 128), nn.Linear(128, 10)
        self.straight_through = straight_through

    def forward(self, images: Tensor) -> Tensor:
        z = F.linear(images.flatten(1), self.int8(self.hidden.weight), self.int8(self.hidden.bias))
        signs = torch.where(z < 0, -1.0, 1.0)
        if self.straight_through == "all":
            signs = passing(signs, z.clamp(-1, 1))
        return F.linear(signs, self.int8(self.output.weight), self.int8(self.output.bias)) / 128**0.5

    def int8(self, weight: Tensor) -> Tensor:
        rounded = (weight / STEP).round().clamp(-128, 127) * STEP
        return rounded if self.straight_through == "nothing" else passing(rounded, weight)


def passing(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard.detach() + (soft - soft.detach())


class Method(NamedTuple):
    """What trains the net, by which steps, and what a search varies: ``mu``, or the learning rate where none is."""

    estimator: zo.GradientEstimator
    optimizer: Any
    lr: float
    straight_through: str
    batch_size: int
    steps: int
    tried: tuple[float, ...]

    def trial(self, value: float) -> "Method":
        if self.estimator.mu is None:
            return self._replace(lr=value)
        return self._replace(estimator=self.estimator.with_mu(value))


ADAM = partial(torch.optim.Adam, betas=(0.9, 0.99))
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
METHODS = {
    "backpropagation": Method(zo.Backprop(), ADAM, 3e-3, "nothing", 128, 100, ()),
    "backpropagation, straight through weights": Method(zo.Backprop(), ADAM, 3e-3, "weights", 128, 2800, RATES),
    "backpropagation, straight through all": Method(zo.Backprop(), ADAM, 3e-3, "all", 128, 2800, RATES),
    "PerExample": Method(
        zo.PerExample(zo.CentralDifference(0.5)), ADAM, 5e-3, "weights", 128, 1400, (0.003, 0.03, 0.1, 0.3, 1, 3)
    ),
    "ZerothOrder": Method(
        zo.ZerothOrder(stencil=zo.ForwardDifference(4 * STEP), samples=16, evaluation=zo.Batched()),
        partial(zo.NormalizedSGD, betas=(0.9, 0.99), weight_decay=0.1),
        1e-2,
        "nothing",
        32,
        2700,
        tuple(STEP * 4.0**k for k in (-2, -1, 0, 1, 2, 3)),
    ),
}


class Job(NamedTuple):
    """One training."""

    name: str
    seed: int
    root: Path | None  # of MNIST; None: digits
    share: float  # of the method's steps
    trial: float | None = None


def train(job: Job) -> Result:
    """Train once and test; in a search, 5,000 images that are held out of the training set stand for the test set."""
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seed_everything(job.seed, verbose=False)
    method, searches = METHODS[job.name], job.trial is not None
    method = method.trial(job.trial) if job.trial is not None else method
    steps = max(1, int(method.steps * job.share))
    held_out = 5000 if searches else 0
    data = MNIST(method.batch_size, held_out, root=str(job.root)) if job.root else Digits(method.batch_size, 0)
    model = zo.Classifier(
        QuantisedNet(method.straight_through),
        method.estimator,
        partial(method.optimizer, lr=method.lr),
        partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=steps),
        lr_interval="step",
    )
    quiet: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "model_summary", "progress_bar")}
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, check_val_every_n_epoch=10**6, **quiet
    )

    def accuracy() -> float:
        evaluate = trainer.validate if searches else trainer.test
        return next(v for k, v in evaluate(model, data, verbose=False)[0].items() if k.endswith("acc"))

    before = accuracy()
    with Cost() as cost:
        trainer.fit(model, data)
    problem = ("MNIST" if job.root else "digits") + ", int8 weights, signs" + (", search" if searches else "")
    label, metric = job.name, "test accuracy"
    if job.trial is not None:
        label, metric = f"{job.name}: {job.trial:.4g}", "held-out accuracy"
    return Result(problem, label, job.seed, metric, before, accuracy(), model.flops / 1e9, cost.peak_mb, cost.seconds)


def draw(results: list[Result], tried: list[Result], file: Path) -> None:
    """Accuracy against cost, and against ``mu`` in the search."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for marker, name in zip("xsDo^", METHODS, strict=True):
        rows = [r for r in results if r.method == name]
        colour = COLOURS.get(name, "black")
        left.plot([r.gflops for r in rows], [r.after for r in rows], marker, ms=8, label=name, color=colour, alpha=0.8)
    left.set(xscale="log", xlabel="training, 10⁹ operations", ylabel="accuracy", title="test images, each seed")
    left.legend(fontsize=10, loc="center left")
    for name, colour in COLOURS.items():
        rows = [r for r in tried if r.method.startswith(name)]
        mus = [float(r.method.split(": ")[1]) for r in rows]
        right.plot(mus, [r.after for r in rows], "o-" if name == "PerExample" else "^-", label=name, color=colour)
    right.axvline(STEP, color="grey", ls=":", label="rounding step of the weights")
    right.set(xscale="log", xlabel="μ", title="held-out images, short runs")
    right.legend(fontsize=10)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Train everything, a process each, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--search", action="store_true", help="try settings, a ninth of the steps, seed 0")
    parser.add_argument("--smoke", action="store_true", help="digits, a twentieth of the steps, one seed")
    parser.add_argument("--out", type=Path, default=Path("docs/examples"), help="folder of table and figure")
    args = parser.parse_args()
    results, tried = args.out / "quantised_net.csv", args.out / "search" / "quantised_net.csv"
    if args.search:
        jobs = [Job(name, 0, args.root, 1 / 9, value) for name in args.methods for value in METHODS[name].tried]
    elif args.smoke:
        jobs = [Job(name, 0, None, 1 / 20) for name in args.methods]
    else:
        jobs = [Job(name, seed, args.root, 1.0) for name in args.methods for seed in args.seeds]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for result in map(train, jobs) if args.search or args.smoke else pool.imap(train, jobs):
            record(tried if args.search else results, result)
            print(result, flush=True)
    if results.exists():
        print(table(read(results)))
        draw(read(results), read(tried) if tried.exists() else [], args.out / "quantised_net.png")


if __name__ == "__main__":
    main()
