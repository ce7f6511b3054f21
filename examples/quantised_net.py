"""A net that backpropagation cannot train: weights of 8 bits, activations that are signs.

python -m examples.quantised_net --root data    # MNIST
python -m examples.quantised_net --smoke        # scikit-learn's digits, 40 steps, one seed
"""

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from pytorch_lightning import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from examples.results import Cost, Result, read, table, train_all
from zo_lightning.data import MNIST, Digits

STEP = 1 / 256  # from one weight that 8 bits can hold to the next
COLOURS = {"ZerothOrder": "#0072B2", "PerExample": "#D55E00"}  # Okabe and Ito's


class QuantisedNet(nn.Module):
    """784-128-10: a pass sees weights rounded to 256 levels, and the hidden layer says -1 or 1.

    Args:
        straight_through: what hands gradients on as if it were not quantised: "nothing", "weights" or "all".
    """

    def __init__(self, straight_through: str) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(784, 128), nn.Linear(128, 10)
        self.straight_through = straight_through

    def forward(self, images: Tensor) -> Tensor:
        z = F.linear(images.flatten(1), self.int8(self.hidden.weight), self.int8(self.hidden.bias))
        signs = torch.where(z < 0, -1.0, 1.0)
        if self.straight_through == "all":
            signs = handing_on(signs, z.clamp(-1, 1))
        return F.linear(signs, self.int8(self.output.weight), self.int8(self.output.bias)) / 128**0.5

    def int8(self, weight: Tensor) -> Tensor:
        rounded = (weight / STEP).round().clamp(-128, 127) * STEP
        return rounded if self.straight_through == "nothing" else handing_on(rounded, weight)


def handing_on(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard.detach() + (soft - soft.detach())


class Method(NamedTuple):
    """What trains the net, and for how long."""

    estimator: zo.GradientEstimator
    optimizer: Any
    lr: float
    straight_through: str
    batch_size: int
    steps: int


ADAM = partial(torch.optim.Adam, betas=(0.9, 0.99))
ZO_SGD = partial(zo.NormalizedSGD, betas=(0.9, 0.99), weight_decay=0.1)
BLACK_BOX = zo.ZerothOrder(stencil=zo.ForwardDifference(4 * STEP), samples=16, evaluation=zo.Batched())
METHODS = {
    "backpropagation": Method(zo.Backprop(), ADAM, 1e-2, "nothing", 128, 100),
    "backpropagation, straight through weights": Method(zo.Backprop(), ADAM, 1e-2, "weights", 128, 1400),
    "backpropagation, straight through all": Method(zo.Backprop(), ADAM, 2e-2, "all", 128, 1400),
    "PerExample": Method(zo.PerExample(zo.CentralDifference(1.0)), ADAM, 2e-2, "weights", 128, 900),
    "ZerothOrder": Method(BLACK_BOX, ZO_SGD, 1e-2, "nothing", 32, 1200),
}


class Job(NamedTuple):
    """One training; a search has settings of its own, and is tested on 5,000 images held out of the training set."""

    method: str
    seed: int
    root: Path | None = None  # of MNIST; None: digits
    steps: int = 0  # other than the method's
    settings: dict[str, float] = {}


def train(job: Job) -> Result:
    """Train once, and test before and after."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seed_everything(job.seed, verbose=False)
    method, settings = METHODS[job.method], job.settings
    estimator = method.estimator.with_mu(settings["mu"]) if "mu" in settings else method.estimator
    optimizer = partial(method.optimizer, lr=settings.get("lr", method.lr))
    steps = job.steps or method.steps
    decay = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=steps)
    held_out = 5000 if settings else 0  # with 0, validation is on the test set
    data = MNIST(method.batch_size, held_out, root=str(job.root)) if job.root else Digits(method.batch_size, held_out)
    model = zo.Classifier(QuantisedNet(method.straight_through), estimator, optimizer, decay, lr_interval="step")
    quiet: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "model_summary", "progress_bar")}
    quiet |= {"logger": False, "check_val_every_n_epoch": 10**6}  # and no validation meanwhile
    trainer = Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, **quiet)
    before = trainer.validate(model, data, verbose=False)[0]["val/acc"]
    with Cost() as cost:
        trainer.fit(model, data)
    after = trainer.validate(model, data, verbose=False)[0]["val/acc"]
    problem = f"{'MNIST' if job.root else 'digits'}, int8 and signs"
    name = ", ".join([job.method, *(f"{key}={value:.4g}" for key, value in settings.items())])
    metric = "held-out accuracy" if settings else "test accuracy"
    return Result(problem, name, job.seed, metric, before, after, model.flops / 1e9, cost.peak_mb, cost.seconds)


def draw(results: list[Result], tried: list[Result], file: Path) -> None:
    """Accuracy against cost, and in the search against ``mu``."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.4), layout="constrained", sharey=True)
    for marker, name in zip("xsDo^", METHODS, strict=True):
        rows = [row for row in results if row.method == name]
        style = {"color": COLOURS.get(name, "black"), "label": name.replace(", ", ",\n"), "alpha": 0.8}
        left.plot([row.gflops for row in rows], [row.after for row in rows], marker, ms=9, **style)
    left.set(xscale="log", xlabel="10⁹ floating-point operations", ylabel="accuracy", title="test, three seeds")
    left.legend(loc="center left")
    for name, colour in COLOURS.items():
        rows = [row for row in tried if row.method.startswith(f"{name}, mu=") and "lr" not in row.method]
        mus = [float(row.method.split("=")[1]) for row in rows]
        right.plot(mus, [row.after for row in rows], "o-" if name == "PerExample" else "^-", label=name, color=colour)
    right.axvline(STEP, color="grey", ls=":", label="rounding step of weights")
    right.set(xscale="log", xlabel="μ", title="held out, short runs")
    right.legend(loc="upper left")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Train everything, a process each, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/examples"))
    args = parser.parse_args()
    jobs = [Job(name, seed, args.root) for name in METHODS for seed in args.seeds]
    jobs = [Job(name, 42, steps=40) for name in METHODS] if args.smoke else jobs
    file, tried = (args.out / folder / "quantised_net.csv" for folder in ("", "search"))
    print(table(train_all(train, jobs, file, apart=not args.smoke)))
    draw(read(file), read(tried) if tried.exists() else [], args.out / "quantised_net.png")


if __name__ == "__main__":
    main()
