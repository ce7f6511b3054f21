"""The methods that the example compares, and one training by one of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pytorch_lightning import Trainer, seed_everything

import zo_lightning as zo
from examples.language_model.prompts import LitPrompt, Reviews
from examples.results import Cost, Result

QUIET: Any = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}


class Method(NamedTuple):
    """How to train, and what: the weights by patterns of their names, or adapters of a rank."""

    estimator: zo.GradientEstimator
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    steps: int
    batch: int = 16
    memory: Literal["auto", "lean"] = "auto"
    trained: tuple[str, ...] = ("*",)
    lora: int = 0


MEZO = zo.ZerothOrder()
MANY = zo.ZerothOrder(stencil=zo.ForwardDifference(), evaluation=zo.Batched(), samples=16)
SGD, ADAM = torch.optim.SGD, torch.optim.AdamW
HEADS = ("*.attn.*",)
METHODS = {
    "all weights: MeZO, lean": Method(MEZO, SGD, 3e-4, 1500, memory="lean"),
    "all weights: 16 directions": Method(MANY, zo.NormalizedSGD, 6e-3, 60),
    "all weights: PerExample": Method(zo.PerExample(correction=0.1), ADAM, 3e-3, 520),
    "all weights: backpropagation": Method(zo.Backprop(), ADAM, 3e-3, 200),
    "LoRA: 16 directions": Method(MANY, zo.NormalizedSGD, 1.2e-2, 60, lora=4),
    "LoRA: backpropagation": Method(zo.Backprop(), ADAM, 1.2e-2, 200, lora=4),
    "attention: 16 directions": Method(MANY, zo.NormalizedSGD, 1.2e-2, 60, trained=HEADS),
    "attention: backpropagation": Method(zo.Backprop(), ADAM, 6e-3, 200, trained=HEADS),
}


def train(name: str, seed: int, model: str, root: str, steps: int | None, rate: float, part: str) -> Result:
    """In a process of its own: one training, and the accuracy before and after it on a part of the data."""
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    method = METHODS[name]
    data = Reviews(model, root, batch_size=method.batch)
    optimizer = partial(method.optimizer, lr=method.lr * rate)
    module = LitPrompt(model, trained=method.trained, lora=method.lora, optimizer=optimizer)
    driver = zo.GradientFree(method.estimator, memory=method.memory)
    trainer = Trainer(
        max_steps=steps or method.steps,
        max_epochs=-1,
        callbacks=[driver],
        enable_progress_bar=False,
        limit_val_batches=0,
        **QUIET,
    )
    judge = Trainer(enable_progress_bar=False, **QUIET)
    score = partial(judge.test if part == "test" else judge.validate, verbose=False)
    loader = data.test_dataloader() if part == "test" else data.val_dataloader()
    before = score(module, loader)[0][f"{part}/acc"]
    with Cost() as cost:
        trainer.fit(module, data)
    after = score(module, loader)[0][f"{part}/acc"]
    metric = "accuracy" if part == "test" else f"held-out accuracy, lr {method.lr * rate:g}"
    return Result(
        "sentiment by a prompt", name, seed, metric, before, after, driver.flops / 1e9, cost.peak_mb, cost.seconds
    )
