"""Somebody else's model: an adapter in front of Magika, a frozen classifier of file types in ONNX Runtime.

    python -m examples.somebody_elses_model

Magika (Google; its model of 3 MB is in the package ``magika``) tells 214 types of files by their bytes. Here it gets
listings: files with what a tool has put before each line, as ``git blame``, a log, a mail and ``cat -n`` do. The files
are those of one's own Python environment. The runtime's answers are all that training sees of the model.
"""

import json
import random
from functools import cache, partial
from math import nan
from pathlib import Path

import magika
import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zo_lightning as zo
from examples.listings import Listing, installed, listings
from examples.results import Cost, Result
from examples.runs import main
from zo_lightning.costs import count_flops

KNOWN = {"py": "python", "json": "json", "js": "javascript", "md": "markdown", "css": "css", "csv": "csv"}
NEW = {"rst": "rst", "c": "c", "toml": "toml", "f90": "fortran", "cmake": "cmake", "xml": "xml"}  # for the test alone
COLUMNS, REACH = 96, 4  # where text may begin; characters that are looked at
FOLDER = Path(magika.__file__).parent / "models" / "standard_v3_3"
LABELS = json.loads((FOLDER / "config.min.json").read_text())["target_labels_space"]
GFLOP = 2e-9 * (2048 * 257 * 64 + 508 * 512 * 256 * 5 + 512 * 214)  # of a file: the products in the model's graph


# Theirs: bytes in, probabilities out.
def probabilities(listings: list[Listing], cuts: np.ndarray) -> np.ndarray:
    """What the model says, [files, 214], of listings whose lines are cut at columns, in Magika's own form of input."""
    tokens, cut = np.full((len(listings), 2048), 256, np.int32), iter(cuts.tolist())
    for row, (_, first, last) in zip(tokens, listings, strict=True):
        begin = b"\n".join([line[next(cut) :] for line in first]).lstrip()[:1024]
        end = b"\n".join([line[next(cut) :] for line in last]).rstrip()[-1024:]
        row[: len(begin)], row[2048 - len(end) :] = list(begin), list(end)
    runs = [session().run(None, {"bytes": tokens[k : k + 16]}) for k in range(0, len(tokens), 16)]
    return np.concatenate([np.asarray(run[0]) for run in runs])


@cache
def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(FOLDER / "model.onnx", options)


# Ours: an adapter in front, and a map behind.
def kind(byte: int) -> str:
    c = chr(byte)
    if byte > 126 or (byte < 32 and c != "\t"):
        return ""
    return "0" if c.isdigit() else "a" if c.islower() else "A" if c.isupper() else c


KINDS = sorted({kind(byte) for byte in range(256)})
KIND = np.array([KINDS.index(kind(byte)) for byte in range(256)])


def characters(listings: list[Listing]) -> Tensor:
    """The kinds of the first characters of all lines, [lines, REACH - 1 + COLUMNS]; 0 for none."""
    lines = [line for _, first, last in listings for line in first + last]
    rows = [(b"\0" * (REACH - 1) + line[:COLUMNS]).ljust(REACH - 1 + COLUMNS, b"\0") for line in lines]
    return torch.from_numpy(KIND[np.frombuffer(b"".join(rows), np.uint8).reshape(len(lines), -1)])


class TextBegins(nn.Module):
    """Where the text of a line begins: the column of the highest score, by the character there and three before it."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv1d(len(KINDS), 1, REACH, bias=False)
        self.late, self.whole = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.score.weight)  # with equal scores, every line begins at its first column

    def forward(self, kinds: Tensor) -> Tensor:
        scores = self.score(F.one_hot(kinds, len(KINDS)).float().transpose(1, 2))[:, 0]
        scores = scores + self.late * torch.linspace(0, 1, COLUMNS) + self.whole * (torch.arange(COLUMNS) == 0)
        return scores.masked_fill(kinds[:, REACH - 1 :] == 0, -torch.inf).argmax(1)


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


# Both, on files that training has not seen.
def types_of(listings: list[Listing]) -> list[int]:
    return [LABELS.index(label) for label, _, _ in listings]


@torch.no_grad()
def answers(listings: list[Listing], adapter: nn.Module) -> np.ndarray:
    return probabilities(listings, adapter(characters(listings)).numpy())


@torch.no_grad()
def accuracy(listings: list[Listing], adapter: nn.Module, behind: nn.Module) -> float:
    logits = behind(torch.from_numpy(answers(listings, adapter)).clamp_min(1e-6).log())
    return float((logits.argmax(1) == torch.tensor(types_of(listings))).float().mean())


def train(method: str, seed: int, root: Path, smoke: bool) -> list[Result]:
    """Train in front of the model or behind it with the known types, and test with them and with others."""
    torch.set_num_threads(1)
    files, steps = installed({*KNOWN, *NEW}, 8 if smoke else 60, seed), 5 if smoke else 40
    known, adapter, gflops = listings(files, KNOWN, 0, seed), TextBegins(), 0.0
    tests = {"types in training": listings(files, KNOWN, 1, seed), "other types": listings(files, NEW, 1, seed)}
    begin = {name: accuracy(test, adapter, nn.Identity()) for name, test in tests.items()}

    def tested(method: str, behind: nn.Module, *costs: float) -> list[Result]:
        after = {name: accuracy(test, adapter, behind) for name, test in tests.items()}
        return [Result(name, method, seed, "accuracy", begin[name], after[name], *costs) for name in tests]

    if method == "files alone":
        tests = {
            name: listings(files, types, 1, seed, ("nothing",)) for name, types in zip(tests, (KNOWN, NEW), strict=True)
        }
        return tested(method, nn.Identity(), nan, nan, nan)
    if method == "map behind":
        with Cost() as cost:
            linear, gflops = train_map(answers(known, adapter), types_of(known))
        return tested(method, linear, gflops + len(known) * GFLOP, cost.peak_mb, cost.seconds)
    with Cost() as cost:
        adapter = train_adapter(known, seed, steps)
    gflops = 9 * steps * (12 * GFLOP + count_flops(lambda: adapter(characters(known[:12]))) / 1e9)
    results = tested(method, nn.Identity(), gflops, cost.peak_mb, cost.seconds)
    with Cost() as more:
        linear, spent = train_map(answers(known, adapter), types_of(known))
    costs = gflops + spent + len(known) * GFLOP, max(cost.peak_mb, more.peak_mb), cost.seconds + more.seconds
    return results + tested("adapter and map", linear, *costs)


if __name__ == "__main__":
    main("somebody_elses_model", __doc__, train, ("files alone", "map behind", "adapter in front"), "adapter")
