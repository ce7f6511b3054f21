"""Ours: an adapter in front of the model, trained by losses alone, and a map behind it, by backpropagation."""

import random
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from examples.somebody_elses_model.listings import Listing
from examples.somebody_elses_model.theirs import LABELS, probabilities, types_of
from zo_lightning.costs import count_flops

COLUMNS, REACH = 96, 2  # where text may begin; characters before it that are looked at


def kind(byte: int) -> str:
    c = chr(byte)
    if byte > 126 or (byte < 32 and c != "\t"):
        return ""
    return "0" if c.isdigit() else "a" if c.islower() else "A" if c.isupper() else c


KINDS = sorted({kind(byte) for byte in range(256)})
KIND = np.array([KINDS.index(kind(byte)) for byte in range(256)])


def characters(listings: list[Listing]) -> Tensor:
    """The kinds of the first characters of all lines, [lines, REACH + COLUMNS]; 0 for none."""
    lines = [line for _, first, last in listings for line in first + last]
    rows = [b"\0" * REACH + line[:COLUMNS].ljust(COLUMNS, b"\0") for line in lines]
    return torch.from_numpy(KIND[np.frombuffer(b"".join(rows), np.uint8).reshape(len(lines), -1)])


class TextBegins(nn.Module):
    """Where the text of a line begins: the column of the highest score, by the two characters before it."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv1d(len(KINDS), 1, REACH, bias=False)
        self.late, self.whole = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.score.weight)  # with equal scores, every line begins at its first column

    def forward(self, kinds: Tensor) -> Tensor:
        scores = self.score(F.one_hot(kinds[:, :-1], len(KINDS)).float().transpose(1, 2))[:, 0]
        scores = scores + self.late * torch.linspace(0, 1, COLUMNS) + self.whole * (torch.arange(COLUMNS) == 0)
        return scores.masked_fill(kinds[:, REACH:] == 0, -torch.inf).argmax(1)


def train_adapter(
    files: list[Listing], seed: int, steps: int, size: int = 12, lr: float = 0.1, mu: float = 0.5
) -> nn.Module:
    adapter, draw = TextBegins(), random.Random(seed)
    optimizer = zo.NormalizedSGD(adapter.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    estimator = zo.ZerothOrder(stencil=zo.ForwardDifference(mu), samples=8, seed=seed)
    for step in range(steps):
        batch = draw.sample(files, size)
        box = zo.BlackBox(partial(losses, batch), batched=True)
        estimator.backward(box.after(partial(adapter, characters(batch))), adapter, step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return adapter


def losses(batch: list[Listing], cuts: list[np.ndarray]) -> np.ndarray:
    """The cross-entropy at each point of a step, by one call of the runtime for all."""
    p = probabilities(batch * len(cuts), np.concatenate(cuts)).reshape(len(cuts), len(batch), -1)
    return -np.log(p[:, range(len(batch)), types_of(batch)].clip(1e-4)).mean(1)


def train_map(p: np.ndarray, right: list[int]) -> tuple[nn.Linear, float]:
    """From all log-probabilities to better ones, first to the same, by backpropagation; and its cost in GFLOP."""
    linear, x = nn.Linear(len(LABELS), len(LABELS)), torch.from_numpy(p).clamp_min(1e-6).log()
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=3e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(linear(x), torch.tensor(right)).backward()
        optimizer.step()

    gflops = [count_flops(step) / 1e9 for _ in range(100)]
    return linear, sum(gflops)
