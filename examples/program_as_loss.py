"""A program as the loss: a net learns to read digits from sums that a program makes of its answers.

    python -m examples.program_as_loss

Slips carry two handwritten digits. Forty digits have labels; of four hundred slips the sum alone is known. The share of
right sums is the loss, a number without a gradient. Each method has four settings to choose from, by held-out slips.
"""

from copy import deepcopy
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from examples.loops import by_backprop, by_value
from examples.results import Cost, Result
from examples.runs import main


def right_sums(outputs: Tensor, sums: Tensor) -> float:
    read = outputs.argmax(1).view(-1, 2).tolist()
    right = [a + b == total for (a, b), total in zip(read, sums.tolist(), strict=True)]
    return sum(right) / len(right)


def sums_themselves(net: nn.Sequential, x: Tensor, y: Tensor, setting: int) -> float:
    lr, mu = ((0.03, 0.1), (0.03, 0.3), (0.1, 0.1), (0.1, 0.3))[setting]
    return by_value(net, lambda: 1 - right_sums(net(x), y), lr, mu, steps=600)


def rewritten(net: nn.Sequential, x: Tensor, y: Tensor, setting: int) -> float:
    """The program anew, with probabilities in place of numbers."""

    def loss() -> Tensor:
        p, q = net(x).softmax(1).view(-1, 2, 10).unbind(1)
        sums = torch.stack([F.pad(p * q[:, k : k + 1], (k, 9 - k)) for k in range(10)]).sum(0)
        return F.nll_loss(sums.clamp_min(1e-9).log(), y)

    return by_backprop(net, loss, (0.001, 0.003, 0.01, 0.03)[setting])


def slips(seed: int) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A net that forty labels have trained; digits, and the sum of each two: three parts."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(1796, generator=torch.Generator().manual_seed(seed))
    x, y = images[order].float() / 16, labels[order]
    net = nn.Sequential(nn.Linear(64, 10))
    by_backprop(net, lambda: F.cross_entropy(net(x[:40]), y[:40]), 0.01)  # forty digits have labels
    data = [(x[part], y[part].view(-1, 2).sum(1)) for part in (slice(40, 840), slice(840, 1040), slice(1040, None))]
    return net, data


def train(method: str, seed: int, root: Path, smoke: bool) -> list[Result]:
    """Train with each setting, choose by held-out training data, and look at the test data once."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    begin, (training, held_out, test) = slips(seed)
    tried, peak = [], 0.0
    for setting in range(1 if smoke else 4):
        net = deepcopy(begin)
        with Cost() as cost:
            gflops = WAYS[method](net, *training, setting)
        peak = max(peak, cost.peak_mb)
        score = right_sums(net(held_out[0]), held_out[1])
        tried.append((score, net, gflops, cost.seconds))
    _, chosen, gflops, seconds = max(tried, key=lambda one: one[0])
    before, after = (right_sums(net(test[0]), test[1]) for net in (begin, chosen))
    return [Result("slips with two digits", method, seed, "right sums", before, after, gflops, peak, seconds)]


WAYS = {"the program rewritten": rewritten, "right sums themselves": sums_themselves}

if __name__ == "__main__":
    main("program_as_loss", __doc__, train, tuple(WAYS), "themselves")
