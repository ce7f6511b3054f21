"""Fine-tune a language model for sentiment: by forward passes only and by backpropagation, all, few or added weights.

    python -m examples.language_model.pretrain --root data --out small_gpt2
    python -m examples.language_model --root data --model small_gpt2

``--model`` takes any causal language model of ``transformers``, a folder or a name of the Hugging Face hub. Each
training has a process of its own, and leaves a row in docs/examples/language_model.csv. ``--rates 0.3 1 3`` trains with
multiples of the learning rates instead, prints the accuracy on held-out training sentences, and records nothing.
"""

import argparse
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
from pytorch_lightning import Trainer, seed_everything

import zo_lightning as zo
from examples.language_model.prompts import LitPrompt, Reviews
from examples.results import Cost, Result, read, record, table

RESULTS = Path("docs/examples/language_model.csv")
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


def draw(results: list[Result], file: Path) -> None:
    """A line for each method, from the accuracy before to those after training, a point for each seed."""
    names = list(dict.fromkeys(result.method for result in results))
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(names) + 1), dpi=150, layout="constrained")
    for result in results:
        row, exact = names.index(result.method), "backpropagation" in result.method
        color = "tab:orange" if exact else "tab:blue"
        axes.plot([result.before, result.after], [row, row], color=color, alpha=0.3, linewidth=3)
        axes.plot(result.after, row, "s" if exact else "o", color=color, markersize=8)
        axes.plot(result.before, row, "|", color="black", markersize=14)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on test sentences; bars: before fine-tuning; 3 seeds")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file)


def main() -> None:
    """Train by all methods that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds rt_polarity")
    parser.add_argument("--model", default="small_gpt2", help="folder of a checkpoint, or name of the hub")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument(
        "--rates", nargs="+", type=float, help="multiples of the learning rates: judge on held-out data"
    )
    parser.add_argument("--smoke", action="store_true", help="two methods, one seed, a few steps; nothing is recorded")
    options = parser.parse_args()
    methods, seeds, steps = options.methods, options.seeds, None
    if options.smoke:
        methods, seeds, steps = methods[:1] + methods[3:4], seeds[:1], 100
    made = []
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["examples.language_model.__main__"])  # imports once what all of them need
    for seed in seeds:
        for name in methods:
            for rate in options.rates or [1.0]:
                task = name, seed, options.model, options.root, steps, rate, "val" if options.rates else "test"
                if options.rates:
                    result = train(*task)
                else:  # a process of its own, whose peak of memory is that of this training
                    with processes.Pool(1) as pool:
                        result = pool.apply(train, task)
                made.append(result)
                print(*result, flush=True)
                if not (options.rates or options.smoke):
                    record(RESULTS, result)
    if options.smoke:
        print(table(made))
    elif not options.rates:
        print(table(read(RESULTS)))
        draw(read(RESULTS), RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
