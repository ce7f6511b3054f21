"""Ways to spend the queries of a black box: accuracy on held-out images of MNIST at equal cost, d = 1,400.

    python benchmarks/black_box.py --root data [--only signs orthogonal] [--budget 4690]

Every way estimates the gradient of the loss of 32 images, has the same number of forward passes, and is followed by the
same update rule, ``NormalizedSGD`` with a linear decay, which takes away the size of an estimate: what is compared is
where the estimates point. Signs, centred signs and normal numbers are in the library (``Rademacher``, ``Centred``,
``Gaussian``); the others did not do better here (docs/black_box_results.md has the table). Beside the accuracies stand
the floating-point operations of a training, queries and what the way itself multiplies, and its seconds.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from zo_lightning import CentredRanks, NormalizedSGD, ScalableCNN
from zo_lightning.costs import FlopMeter
from zo_lightning.data import MNIST

BATCH = 32
HELD_OUT = 5000


class BlackBox:
    """The loss of a net on batches of images, at displaced weights; it counts the queries.

    Attributes:
        d: the number of weights.
        mu: the finite-difference step.
        momentum: running mean of the estimates so far, [d].
        last: the value of the query before, for estimates by residuals; None before the first.
        passes: queries so far.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.net = ScalableCNN(1 / 9)
        self.weights = parameters_to_vector(self.net.parameters()).detach()
        vector_to_parameters(self.weights, self.net.parameters())  # they are views of it from now on
        self.d, self.mu, self.passes = len(self.weights), 1e-3, 0
        self.last: float | None = None
        self.momentum = torch.zeros(self.d)
        self._images, self._labels = images, labels

    def next_batch(self) -> None:
        """Take other images."""
        chosen = torch.randint(len(self._images), (BATCH,), generator=self.random)
        self.x, self.y = self._images[chosen].float().div(255), self._labels[chosen]

    def __call__(self, displacement: Tensor | None = None) -> float:
        """The loss at the weights plus a displacement [d]."""
        self.passes += 1
        if displacement is None:
            return F.cross_entropy(self.net(self.x), self.y).item()
        before = self.weights.clone()
        self.weights.add_(displacement)
        value = F.cross_entropy(self.net(self.x), self.y).item()
        self.weights.copy_(before)
        return value

    def slopes(self, directions: Tensor) -> Tensor:
        """Forward differences along the rows of a matrix [q, d]."""
        here = self()
        return torch.tensor([(self(self.mu * u) - here) / self.mu for u in directions])

    def signs(self, q: int) -> Tensor:
        """Random signs [q, d]."""
        return torch.randint(2, (q, self.d), generator=self.random).float() * 2 - 1

    def centre(self, directions: Tensor) -> Tensor:
        """Subtract the means of the rows of all matrices and kernels."""
        parts = directions.split([p.numel() for p in self.net.parameters()], 1)
        rows = [part.unflatten(1, (len(p), -1)) for part, p in zip(parts, self.net.parameters(), strict=True)]
        return torch.cat([(r - r.mean(2, keepdim=True) * (r.shape[2] > 1)).flatten(1) for r in rows], 1)

    def normal(self, q: int) -> Tensor:
        """Normal directions [q, d]."""
        return torch.randn(q, self.d, generator=self.random)


def signs(f: BlackBox, q: int) -> Tensor:
    """Random signs (SPSA, Spall 1992)."""
    u = f.signs(q)
    return f.slopes(u) @ u


def centred(f: BlackBox, q: int) -> Tensor:
    """Random signs less the mean of each row of weights (``Centred``)."""
    u = f.centre(f.signs(q))
    return f.slopes(u) @ u


def one_tensor(f: BlackBox, q: int) -> Tensor:
    """Signs for one tensor of the net, another one each step, large ones more often (block coordinates)."""
    sizes = torch.tensor([p.numel() for p in f.net.parameters()])
    chosen = torch.multinomial(sizes.sqrt(), 1, generator=f.random)
    u = f.signs(q) * torch.repeat_interleave(torch.arange(len(sizes)) == chosen, sizes)
    return f.slopes(u) @ u


def history(f: BlackBox, q: int) -> Tensor:
    """Centred signs; the slopes that the momentum does not foretell correct it (as in RESZO, arXiv 2507.04223)."""
    u = f.centre(f.signs(q))
    return f.momentum + (f.slopes(u) - u @ f.momentum) @ u / q


def softmax(f: BlackBox, q: int) -> Tensor:
    """Pairs of centred signs at a finite radius, weighed by a softmax of their losses (in the manner of PolyStep)."""
    u = f.centre(f.signs(q // 2))
    u = torch.cat([u, -u])
    losses = torch.tensor([f(f.mu * one) for one in u])
    return -torch.softmax(-losses / losses.std().clamp_min(1e-12), 0) @ u


def normal(f: BlackBox, q: int) -> Tensor:
    """Normal numbers."""
    u = f.normal(q)
    return f.slopes(u) @ u


def orthogonal(f: BlackBox, q: int) -> Tensor:
    """Orthogonal directions (Choromanski et al. 2018)."""
    u = torch.linalg.qr(f.normal(q).T).Q.T * math.sqrt(f.d)
    return f.slopes(u) @ u


def projection(f: BlackBox, q: int) -> Tensor:
    """The projection of the gradient on normal directions, V (Vᵀ V)⁻¹ s."""
    u = f.normal(q)
    return torch.linalg.solve(u @ u.T, f.slopes(u)) @ u


def standardised(f: BlackBox, q: int) -> Tensor:
    """Signs, slopes over their standard deviation (ARS, Mania, Guy & Recht 2018)."""
    u = f.signs(q)
    slopes = f.slopes(u)
    return slopes @ u / slopes.std().clamp_min(1e-12)


def ranks(f: BlackBox, q: int) -> Tensor:
    """Signs, and the ranks of the losses in the place of the losses (Salimans et al. 2017)."""
    u = f.signs(q)
    shaped = CentredRanks().shaped([(0.0, slope) for slope in f.slopes(u).tolist()])
    return torch.tensor([moved - here for here, moved in shaped]) @ u


def guided(f: BlackBox, q: int, share: float) -> Tensor:
    """Normal directions with a share of their variance along the momentum (Guided ES, Maheswaranathan et al. 2019)."""
    u = f.normal(q) * math.sqrt(1 - share)
    size = f.momentum.norm()
    if size:
        along = torch.randn(q, 1, generator=f.random) * math.sqrt(share * f.d)
        u += along * f.momentum / size
    return f.slopes(u) @ u


def momentum_first(f: BlackBox, q: int) -> Tensor:
    """The slope along the momentum, and signs for the rest of the gradient."""
    u = f.signs(q)
    size = f.momentum.norm()
    if not size:
        return f.slopes(u) @ u / q
    m = f.momentum / size
    u[0] = m * math.sqrt(f.d)
    slopes = f.slopes(u)
    known = slopes[0] / math.sqrt(f.d) * m
    return known + (slopes[1:] - u[1:] @ known) @ u[1:] / (q - 1)


def residual(f: BlackBox, q: int, kept: int) -> Tensor:
    """One query a step, less the one before (Zhang et al. 2022); a batch is kept for some steps."""
    if f.passes % kept == 0:
        f.next_batch()
    u = torch.randint(2, (f.d,), generator=f.random).float() * 2 - 1
    value = f(f.mu * u)
    before, f.last = value if f.last is None else f.last, value
    return (value - before) / f.mu * u


def automatic_mu(f: BlackBox, q: int) -> Tensor:
    """Signs, μ = 2 √(ε / |f″|) from the loss's float noise and its curvature (Moré & Wild 2012), every 100 steps."""
    if f.passes % (100 * (q + 1)) == 0:
        u, far = f.normal(1)[0], 1e-2
        here, there, back = f(), f(far * u), f(-far * u)
        curvature = abs(there - 2 * here + back) / far**2
        f.mu = min(max(2 * math.sqrt(torch.finfo().eps * max(here, 1e-3) / max(curvature, 1e-6)), 1e-5), 1e-2)
        f.passes -= 3  # so that the count keeps its rhythm; 3 in 100 steps are not what decides
    return signs(f, q)


class Outcome(NamedTuple):
    """Held-out accuracy, and what it cost."""

    accuracy: float
    flops: float
    seconds: float


class Way(NamedTuple):
    """An estimate, its number of directions, whether each step has a new batch, and whether it asks for its loss."""

    estimate: Callable[[BlackBox, int], Tensor]
    q: int = 8
    renews: bool = True
    asks_here: bool = True

    @property
    def queries(self) -> int:
        """Of a step."""
        return self.q + self.asks_here


WAYS = {
    "signs": Way(signs),
    "centred": Way(centred),
    "one-tensor": Way(one_tensor),
    "history": Way(history),
    "softmax": Way(softmax, 16, asks_here=False),
    "normal": Way(normal),
    "orthogonal": Way(orthogonal),
    "projection": Way(projection),
    "standardised": Way(standardised),
    "ranks": Way(ranks),
    "guided-0.1": Way(partial(guided, share=0.1)),
    "guided-0.5": Way(partial(guided, share=0.5)),
    "momentum-first": Way(momentum_first),
    "residual": Way(partial(residual, kept=1), 1, renews=False, asks_here=False),
    "residual-kept-9": Way(partial(residual, kept=9), 1, renews=False, asks_here=False),
    "automatic-mu": Way(automatic_mu),
    "signs-128": Way(signs, 128),
    "normal-128": Way(normal, 128),
    "orthogonal-128": Way(orthogonal, 128),
    "projection-128": Way(projection, 128),
}


@torch.no_grad()
def train(way: Way, seed: int, budget: int, lr: float, images: Tensor, labels: Tensor) -> Outcome:
    """Spend a budget of forward passes of 128 images."""
    f = BlackBox(images[:-HELD_OUT], labels[:-HELD_OUT], seed)
    steps = budget * 128 // BATCH // way.queries
    optimizer = NormalizedSGD([f.weights], lr, weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    meter, began = FlopMeter(), time.perf_counter()
    for _ in range(steps):
        if way.renews:
            f.next_batch()
        with meter.step(f.net, None):
            f.weights.grad = way.estimate(f, way.q)
        f.momentum.lerp_(f.weights.grad, 0.1)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    found = f.net(images[-HELD_OUT:].float().div(255)).argmax(1)
    return Outcome((found == labels[-HELD_OUT:]).float().mean().item(), meter.total, seconds)


def main() -> None:
    """Print a table in Markdown, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--budget", type=int, default=4690, help="in forward passes of 128 images")
    parser.add_argument("--lr", nargs="+", type=float, default=[6e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--root", type=Path, default=Path("data"), help="of MNIST")
    options = parser.parse_args()
    images, labels = MNIST(root=str(options.root), download=False).load(train=True)
    print(
        "| way | lr | "
        + " | ".join(map(str, options.seeds))
        + " | mean | TFLOP | seconds |\n|---|---|"
        + "---|" * len(options.seeds)
        + "---|---|---|"
    )
    for name in tqdm(options.only, disable=not sys.stderr.isatty()):
        for lr in options.lr:
            outcomes = [train(WAYS[name], seed, options.budget, lr, images, labels) for seed in options.seeds]
            found, flops, seconds = ([one[i] for one in outcomes] for i in range(3))
            spread = f" ± {stdev(found):.3f}" if len(found) > 1 else ""
            row = " | ".join(f"{one:.3f}" for one in found)
            cost = f"{mean(flops) / 1e12:.3f} | {mean(seconds):.0f}"
            print(f"| {name}, {WAYS[name].q} | {lr:g} | {row} | {mean(found):.3f}{spread} | {cost} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
