"""Nets that others wrote, trained for some steps in plain PyTorch by each estimator that needs no backward pass."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.demos import Transformer
from pytorch_lightning.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from zo_lightning import GradientEstimator, PerExample, Rademacher, ZerothOrder

B, T, WORDS = 8, 6, 12
Problem = tuple[nn.Module, Callable[[], Tensor]]
"""A net, and the loss of each example of a batch."""


def boring() -> Problem:
    net = BoringModel()
    x = torch.randn(B, 32)
    return net, lambda: F.mse_loss(net(x), torch.ones(B, 2), reduction="none").mean(1)


def lightnings_transformer() -> Problem:
    net = Transformer(WORDS, ninp=16, nhid=16, dropout=0.0)
    words = torch.randint(WORDS, (B, T + 1))

    def losses() -> Tensor:
        log_likelihood = net(words[:, :-1], words[:, 1:])  # [B T, words]
        return F.nll_loss(log_likelihood, words[:, 1:].flatten(), reduction="none").view(B, T).mean(1)

    return net, losses


def resnet() -> Problem:
    net = resnet18(weights=None, num_classes=4)
    x, y = torch.randn(B, 3, 32, 32), torch.randint(4, (B,))
    return net, lambda: F.cross_entropy(net(x), y, reduction="none")


def bert() -> Problem:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(
        vocab_size=WORDS, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    net = transformers.BertForSequenceClassification(config)
    words, y = torch.randint(WORDS, (B, T)), torch.randint(3, (B,))
    return net, lambda: F.cross_entropy(net(input_ids=words).logits, y, reduction="none")


def gpt2() -> Problem:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=T, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0
    )
    net, words = transformers.GPT2LMHeadModel(config), torch.randint(WORDS, (B, T))

    def losses() -> Tensor:
        logits = net(input_ids=words).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), words[:, 1:], reduction="none").mean(1)

    return net, losses


PROBLEMS = {f.__name__: f for f in (boring, lightnings_transformer, resnet, bert, gpt2)}
problems = pytest.mark.parametrize("name", PROBLEMS)


def trained(name: str, estimator: GradientEstimator, rate: float, steps: int) -> list[float]:
    """The losses of some steps on one batch."""
    torch.manual_seed(0)
    net, losses = PROBLEMS[name]()
    optimizer, state = torch.optim.Adam(net.parameters(), rate), estimator.init(net)
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        history.append(float(estimator.backward(losses, net, step, state)))
        optimizer.step()
    return history


@pytest.mark.parametrize(
    ("name", "rate", "steps"),
    [
        ("boring", 1e-2, 20),
        ("lightnings_transformer", 1e-2, 80),
        ("resnet", 3e-3, 8),
        ("bert", 1e-2, 60),
        ("gpt2", 1e-2, 20),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loss_falls_by_noise_for_each_example(name: str, rate: float, steps: int) -> None:
    history = trained(name, PerExample(seed=0), rate, steps)
    assert sum(history[-3:]) < 0.95 * sum(history[:3])


@problems
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loss_falls_by_one_direction(name: str) -> None:
    """On the largest net two steps are taken, which the loss survives."""
    steps = 2 if name == "resnet" else 40
    history = trained(name, ZerothOrder(Rademacher(), seed=0, samples=1 if name == "resnet" else 4), 1e-3, steps)
    assert all(map(math.isfinite, history))
    assert name == "resnet" or sum(history[-5:]) < sum(history[:5])


@problems
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_weight_has_noise_for_each_example_and_feedback(name: str) -> None:
    torch.manual_seed(0)
    net, losses = PROBLEMS[name]()
    estimator = PerExample(seed=0)
    state = estimator.init(net)
    estimator.backward(losses, net, 0, state)
    assert not state.shared
    assert state.output is not None
    assert state.feedback.maps or [*state.layers] == [state.last]
