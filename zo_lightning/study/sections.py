"""The questions of a report, in their order: what each says and which figures it shows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from zo_lightning.study import answers, figures
from zo_lightning.study.figures.panels import Sample
from zo_lightning.study.grid import slug
from zo_lightning.study.results import Results


@dataclass
class Drawing:
    """A figure of the page: how it is drawn, and its panels as addresses of images once it is."""

    name: str
    draw: Callable[[], Figure]
    caption: str
    key: bool = False
    panels: list[str] = field(default_factory=list)
    legend: list[Sample] = field(default_factory=list)
    reason: str = ""


@dataclass
class Section:
    """A question of the study, its answer in numbers, its figures, and a table where it has one."""

    anchor: str
    title: str
    answer: str
    figures: list[Drawing] = field(default_factory=list)
    table: pd.DataFrame | None = None


def sections_of(results: Results, similar: pd.DataFrame) -> list[Section]:
    """All questions that the runs' folders answer; ``similar`` is the table of ``weights.similarity``."""
    ref, seed = results.study.reference, results.cells[0].seed
    curve = partial(figures.learning_curves, results)
    cost = "flops" if results.table["flops"].notna().all() else "forward_passes"
    dotted = " Dotted: published, same epoch." if results.published is not None else ""
    over = f"Mean ± standard deviation over seeds.{dotted}"
    return [
        Section(
            "curves",
            "1. Learning curves",
            answers.accuracy(results),
            [
                Drawing("accuracy", lambda: curve("val_accuracy"), f"Validation accuracy per epoch. {over}", key=True),
                Drawing("train_loss", lambda: curve("train_loss"), f"Training loss per epoch. {over}"),
                Drawing("val_loss", lambda: curve("val_loss"), f"Validation loss per epoch. {over}"),
                Drawing(
                    "final_accuracy",
                    lambda: figures.final_accuracy(results),
                    "Validation accuracy after the last epoch against the number of weights. "
                    f"Bars: 95 % interval of the mean over seeds; dots: seeds.{dotted}",
                    key=True,
                ),
            ],
        ),
        Section(
            "ratios",
            "2. Ratios",
            f"All ratios are above 1 where {ref} is better. {over}",
            [
                Drawing(
                    "ratios", lambda: figures.loss_ratios(results), f"Each method against {ref}, one curve per size."
                )
            ],
        ),
        Section(
            "slowdown",
            "3. Does the O(√d) slowdown appear?",
            answers.slowdown(results),
            [
                Drawing("k", lambda: figures.slowdown(results), f"k = Loss / ({ref}'s loss · √d), one curve per size."),
                Drawing(
                    "exponent",
                    lambda: figures.slowdown_exponent(results),
                    "First: ratio of the validation losses against d after the last epoch that all runs have, every "
                    f"seed a mark, with the fitted power of d{'; grey and dotted: published' if dotted else ''}. "
                    "Second: the fitted exponent over training; band: 95 % interval, dashed: 1/2.",
                    key=True,
                ),
            ],
        ),
        Section(
            "time",
            "4. Time",
            answers.time(results),
            [
                Drawing(
                    "epoch_time",
                    lambda: figures.epoch_time(results),
                    "Training steps only, without validation. Line: median over epochs and seeds; "
                    f"band: 10 % to 90 %.{dotted}",
                )
            ],
        ),
        Section(
            "weights", f"5. Weights against {ref}'s", answers.weights(results, similar), _weights(results, similar)
        ),
        Section(
            "trajectories",
            "6. Filters through training",
            f"Seed {seed}. Distances between far points of a t-SNE say little: what to look at is whether paths that "
            "start together stay together.",
            [
                Drawing(
                    f"tsne_{layer}",
                    partial(figures.filter_trajectories, results, layer, seed),
                    f"Filters of {layer} at every snapshot, one embedding per size, initialised by PCA.",
                )
                for layer in _convolutions(similar) or ["convolutions"]
            ],
        ),
        Section(
            "filters",
            "7. First layer",
            f"Seed {seed}; each filter in its own range of greys.",
            [Drawing("filters", lambda: figures.first_layer(results, seed), "First convolution, last snapshot.")],
        ),
        Section(
            "budget",
            "8. Against what it costs",
            "Floating-point operations are counted in the steps themselves, all that they multiply."
            if cost == "flops"
            else "A forward and backward pass counts as three forward passes.",
            [
                Drawing(
                    f"{quantity}_by_{against}",
                    partial(curve, quantity, against),
                    f"{figures.LABELS[quantity].capitalize()} against {figures.LABELS[against]}. "
                    "Mean ± standard deviation over seeds.",
                    key=(quantity, against) == ("val_accuracy", cost),
                )
                for quantity in ("val_accuracy", "val_loss")
                for against in (cost, "seconds")
            ],
        ),
    ]


def minima_section(results: Results, line: pd.DataFrame, around: pd.DataFrame, unmeasured: str) -> Section:
    """The question that the nets and their data answer: the tables of ``measure_minima``, or why there are none."""
    section = Section("minima", "9. Between and around the minima", answers.minima(results, line, around))
    if unmeasured:
        section.answer = f"Not measured: {unmeasured}."
        return section
    for quantity in ("loss", "accuracy"):
        caption = f"{quantity.capitalize()} on the straight line between the last weights, on training images. "
        draw = partial(figures.minima_line, results, line, quantity)
        section.figures.append(Drawing(f"line_{quantity}", draw, caption + "Mean ± standard deviation over seeds."))
    draw = partial(figures.sharpness_by_size, results, around)
    section.figures.append(
        Drawing(
            "sharpness",
            draw,
            "Rise of the training loss under noise of 10 % of each filter's norm. "
            "Mean ± standard deviation over seeds.",
        )
    )
    return section


def _convolutions(similar: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(similar.dropna(subset=["matched"])["layer"]))


def _weights(results: Results, similar: pd.DataFrame) -> list[Drawing]:
    drawings = []
    for method in results.others:
        for measure in ("cosine", "l2"):
            drawings.append(
                Drawing(
                    f"{measure}_{slug(method)}",
                    partial(figures.weight_similarity, results, similar, measure, method),
                    f"{'Cosine similarity' if measure == 'cosine' else 'L2 distance'} of the weights of {method} and "
                    f"{results.study.reference}, same seed, per layer. Mean ± standard deviation over seeds.",
                )
            )
        drawings.append(
            Drawing(
                f"matched_{slug(method)}",
                partial(figures.matched_similarity, results, similar, method),
                "Filters may be learned in another order: cosine before and after the best one-to-one matching. "
                "Matching alone raises it, also between unrelated filters.",
            )
        )
    return drawings
