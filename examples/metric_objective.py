"""A metric as the objective: F1 of a rare class, good films among reviews of which nine in ten are bad.

    python -m examples.metric_objective --root data

A linear net over TF-IDF begins with weights that cross-entropy has trained; then F1 of the training data is the loss, a
number without a gradient. Each method has four settings to choose from, by F1 of held-out training data.
"""

from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from examples.loops import by_backprop, by_value
from examples.results import Cost, Result
from examples.runs import main


def f1(scores: Tensor, y: Tensor) -> float:
    return float(f1_score(y[:, 0].numpy(), scores[:, 0].detach().numpy() > 0))


def entropy(net: nn.Linear, x: Tensor, y: Tensor, setting: int, weight: float, tune: bool = False) -> float:
    penalty, weights = (1e-3, 1e-2, 3e-2, 1e-1)[setting], 1 + (weight - 1) * y
    gflops = by_backprop(
        net,
        lambda: F.binary_cross_entropy_with_logits(net(x), y.float(), weights) + penalty * net.weight.square().sum(),
        0.03,
    )
    if tune:
        tune_threshold(net, x, y)
    return gflops


def tune_threshold(net: nn.Linear, x: Tensor, y: Tensor) -> None:
    scores = net(x).detach()
    net.bias.data -= max(scores[:, 0].sort().values[::5], key=lambda threshold: f1(scores - threshold, y))


def soft_f1(net: nn.Linear, x: Tensor, y: Tensor, setting: int) -> float:
    def loss() -> Tensor:
        p = net(x).sigmoid()
        return 1 - 2 * (p * y).sum() / (p.sum() + y.sum())

    return by_backprop(net, loss, (0.003, 0.01, 0.03, 0.1)[setting])


def f1_itself(net: nn.Linear, x: Tensor, y: Tensor, setting: int) -> float:
    tune_threshold(net, x, y)  # where no score is near 0, F1 does not change
    size = float(net.weight.detach().abs().mean())
    lr, mu = ((0.03, 1), (0.1, 1), (0.03, 3), (0.1, 3))[setting]
    return by_value(net, lambda: 1 - f1(net(x), y), lr * size, mu * size, steps=150)


def reviews(root: Path, seed: int) -> tuple[nn.Linear, list[tuple[Tensor, Tensor]]]:
    """A net that cross-entropy has trained; sentences as numbers, and whether they are good: three parts."""
    bad, good = (
        np.array((root / "rt_polarity" / name).read_text(encoding="utf-8", errors="replace").splitlines(), object)
        for name in ("negative.txt", "positive.txt")
    )
    draw = np.random.default_rng(seed)
    text = np.concatenate([bad, draw.permutation(good)[: len(bad) // 9]])
    order, y = draw.permutation(len(text)), np.arange(len(text)) >= len(bad)
    words = TfidfVectorizer(min_df=2, sublinear_tf=True)
    numbers = make_pipeline(words, TruncatedSVD(min(300, len(bad) // 10), random_state=seed), StandardScaler())
    parts = np.split(order, [len(text) // 2, len(text) * 65 // 100])
    numbers.fit(text[parts[0]])
    data = [(torch.tensor(numbers.transform(text[p])).float(), torch.tensor(y[p, None]).long()) for p in parts]
    net = nn.Linear(data[0][0].shape[1], 1)
    entropy(net, *data[0], setting=1, weight=1)
    return net, data


def train(method: str, seed: int, root: Path, smoke: bool) -> list[Result]:
    """Train with each setting, choose by held-out training data, and look at the test data once."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    begin, (training, held_out, test) = reviews(root, seed)
    tried, peak = [], 0.0
    for setting in range(1 if smoke else 4):
        net = deepcopy(begin)
        with Cost() as cost:
            gflops = WAYS[method](net, *training, setting)
        peak = max(peak, cost.peak_mb)
        score = f1(net(held_out[0]), held_out[1])
        tried.append((score, net, gflops, cost.seconds))
    _, chosen, gflops, seconds = max(tried, key=lambda one: one[0])
    before, after = (f1(net(test[0]), test[1]) for net in (begin, chosen))
    return [Result("film reviews", method, seed, "F1", before, after, gflops, peak, seconds)]


WAYS = {
    "threshold tuned": partial(entropy, weight=1, tune=True),
    "class weights": partial(entropy, weight=9),
    "class weights, threshold tuned": partial(entropy, weight=9, tune=True),
    "soft F1": soft_f1,
    "F1 itself": f1_itself,
}

if __name__ == "__main__":
    main("metric_objective", __doc__, train, tuple(WAYS), "itself")
