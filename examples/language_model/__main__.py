"""Fine-tune a language model for sentiment: by forward passes only and by backpropagation, all, few or added weights.

    python -m examples.language_model.pretrain --root data --out small_gpt2
    python -m examples.language_model --root data --model small_gpt2

``--model`` takes any causal language model of ``transformers``, a folder or a name of the Hugging Face hub. Each
training has a process of its own, and leaves a row in docs/examples/language_model.csv. ``--rates 0.3 1 3`` trains with
multiples of the learning rates instead, prints the accuracy on held-out training sentences, and records nothing.
"""

import argparse
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt

from examples.language_model.methods import METHODS, train
from examples.results import Result, read, record, table

RESULTS = Path("docs/examples/language_model.csv")


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
        methods, seeds, steps = methods[:1] + methods[3:4], seeds[:1], 200
    made = []
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["examples.language_model.methods"])  # imports once what all of them need
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
