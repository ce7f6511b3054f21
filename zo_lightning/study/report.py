"""One page on a study: figures, tables and what they answer, from the folders of its runs."""

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from zo_lightning.cli_errors import UserError
from zo_lightning.measures import WHOLE
from zo_lightning.study import figures
from zo_lightning.study.figures import NothingToDraw
from zo_lightning.study.grid import slug
from zo_lightning.study.measures import common_epoch, exponent, final, mean_interval, ratios
from zo_lightning.study.minima import LINE, NOISE, SHARPNESS, measure_minima
from zo_lightning.study.results import COLUMNS, Results, published_at, read_results, write_results
from zo_lightning.study.runs import Fit
from zo_lightning.study.weights import Progress, similarity

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")
_TABLE_NOTE = (
    "Means over seeds with their 95 % confidence interval (Student's t) in brackets. The difference to the reference "
    "is paired by seed."
)
_PUBLISHED_NOTE = " Published: mean of 10 runs, after the same epoch."


@dataclass
class Drawing:
    """A figure of the page: how it is drawn, and where it is once it is."""

    name: str
    draw: Callable[[], Figure]
    caption: str
    key: bool = False
    source: str = ""
    reason: str = ""


@dataclass
class Section:
    """A question of the study, its answer in numbers, and its figures."""

    anchor: str
    title: str
    answer: str
    figures: list[Drawing] = field(default_factory=list)


def write_report(folder: Path, output: Path, build: Fit, progress: Progress = lambda what: None) -> Path:
    """Write ``report.html`` (one self-contained file), figures as PNG and SVG, ``results.csv`` and ``summary.md``.

    The key figures go to TensorBoard as well. Nothing is trained; ``build`` makes the nets and the data of which the
    loss is evaluated. What is missing in an unfinished study is named, and the rest is drawn.

    Returns:
        The page.

    Raises:
        UserError: the folder holds no study with a finished cell, or ``output`` holds something other than a report.
    """
    results = read_results(folder)
    _claim(output)
    similar = similarity(results, progress)
    try:
        (line, around), unmeasured = measure_minima(results, build, progress), ""
    except UserError as error:  # the runs' data are gone; the rest needs none
        line, around, unmeasured = pd.DataFrame(columns=list(LINE)), pd.DataFrame(columns=list(SHARPNESS)), str(error)
    table = final_table(results)
    sections = [*_sections(results, similar), _minima_section(results, line, around, unmeasured)]
    write_results(results, output / "results.csv")
    for name, measured in (("similarity", similar), ("line", line), ("sharpness", around)):
        measured.to_csv(output / f"{name}.csv", index=False)
    with _tensorboard(output) as writer:
        for drawing in (drawing for section in sections for drawing in section.figures):
            progress(f"figure {drawing.name}")
            _draw(drawing, output, writer)
    (output / "summary.md").write_text(_summary(results, table, sections), encoding="utf-8")
    page = output / PAGE
    page.write_text(_page(results, table, sections), encoding="utf-8")
    return page


def final_table(results: Results) -> pd.DataFrame:
    """What each method has reached after its last epoch, by net: a row to read."""
    last = final(results.table)
    reference = last[last["method"] == results.study.reference].set_index(["net", "seed"])["val_accuracy"]
    rows = []
    for net, d in results.nets.items():
        for method in results.methods:
            own = last[(last["net"] == net) & (last["method"] == method)]
            if own.empty:
                continue
            accuracy = own.set_index(["net", "seed"])["val_accuracy"]
            is_reference = method == results.study.reference
            difference = (accuracy - reference.reindex(accuracy.index)).dropna()[: 0 if is_reference else None]
            row = {
                "net": net,
                "method": method,
                "d": f"{d:,}",
                "seeds": len(own),
                "epochs": _range(own["epoch"]),
                "accuracy": f"{mean_interval(accuracy, bounds=(0, 1)):.4f}",
                "std": f"{accuracy.std():.4f}" if len(own) > 1 else "–",
                f"accuracy − {results.study.reference}'s": "–"
                if difference.empty
                else f"{mean_interval(difference, bounds=(-1, 1)):+.4f}",
                "validation loss": f"{mean_interval(own['val_loss'], bounds=(0, np.inf)):.3f}",
                "forward passes": _range(own["forward_passes"]),
                "TFLOP": f"{own['flops'].mean() / 1e12:.3g}" if own["flops"].notna().all() else "–",
                "s / epoch": f"{own['epoch_seconds'].median():.2f}",
            }
            if results.published is not None:
                theirs = published_at(results, method, d)
                row["published accuracy"] = "–" if theirs.empty else f"{theirs['val_accuracy_mean'].iloc[-1]:.4f}"
            rows.append(row)
    return pd.DataFrame(rows)


def _sections(results: Results, similar: pd.DataFrame) -> list[Section]:
    ref, seed = results.study.reference, results.cells[0].seed
    curve = partial(figures.learning_curves, results)
    cost = "flops" if results.table["flops"].notna().all() else "forward_passes"
    published = ", published means dotted" if results.published is not None else ""
    over = f"Mean ± standard deviation over seeds{published}."
    sections = [
        Section(
            "curves",
            "1. Learning curves",
            _answer_accuracy(results),
            [
                Drawing("accuracy", lambda: curve("val_accuracy"), f"Validation accuracy per epoch. {over}", key=True),
                Drawing("train_loss", lambda: curve("train_loss"), f"Training loss per epoch. {over}"),
                Drawing("val_loss", lambda: curve("val_loss"), f"Validation loss per epoch. {over}"),
                Drawing(
                    "final_accuracy",
                    lambda: figures.final_accuracy(results),
                    "Validation accuracy after the last epoch against the number of weights.",
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
            _answer_exponent(results),
            [
                Drawing("k", lambda: figures.slowdown(results), f"k = Loss / ({ref}'s loss · √d), one curve per size."),
                Drawing(
                    "exponent",
                    lambda: figures.slowdown_exponent(results),
                    "Left: ratio of the validation losses against d, every seed a dot, with the fitted power of d. "
                    "Right: the fitted exponent over training.",
                    key=True,
                ),
            ],
        ),
        Section(
            "time",
            "4. Time",
            _answer_time(results),
            [Drawing("epoch_time", lambda: figures.epoch_time(results), "Training steps only, without validation.")],
        ),
        Section("weights", f"5. Weights against {ref}'s", _answer_similarity(results, similar)),
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
    weights = next(section for section in sections if section.anchor == "weights")
    for method in results.others:
        for measure in ("cosine", "l2"):
            weights.figures.append(
                Drawing(
                    f"{measure}_{slug(method)}",
                    partial(figures.weight_similarity, results, similar, measure, method),
                    f"{'Cosine similarity' if measure == 'cosine' else 'L2 distance'} of the weights of {method} and "
                    f"{ref}, same seed, per layer. Mean ± standard deviation over seeds.",
                )
            )
        weights.figures.append(
            Drawing(
                f"matched_{slug(method)}",
                partial(figures.matched_similarity, results, similar, method),
                "Filters may be learned in another order: cosine before and after the best one-to-one matching. "
                "Matching alone raises it, also between unrelated filters.",
            )
        )
    return sections


def _minima_section(results: Results, line: pd.DataFrame, around: pd.DataFrame, unmeasured: str) -> Section:
    section = Section("minima", "9. Between and around the minima", _answer_minima(results, line, around))
    if unmeasured:
        section.answer = f"Not measured: {unmeasured}."
        return section
    for quantity in ("loss", "accuracy"):
        caption = f"{quantity.capitalize()} on the straight line between the last weights, on training images. "
        draw = partial(figures.minima_line, results, line, quantity)
        section.figures.append(Drawing(f"line_{quantity}", draw, caption + "Mean ± standard deviation over seeds."))
    draw = partial(figures.sharpness_by_size, results, around)
    section.figures.append(Drawing("sharpness", draw, "Filter-normalised sharpness."))
    return section


def _convolutions(similar: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(similar.dropna(subset=["matched"])["layer"]))


def _answer_accuracy(results: Results) -> str:
    last = final(results.table)
    said = []
    for method in results.methods:
        means = last[last["method"] == method].groupby("d")["val_accuracy"].mean()
        said.append(f"{method}: {_span(results, means, '.3f')}")
    return f"Validation accuracy after the last epoch, {_sizes(results)}: " + "; ".join(said) + "."


def _answer_exponent(results: Results) -> str:
    compared = ratios(results.table, results.study.reference)
    if compared.empty or compared["d"].nunique() < 2:
        return "An exponent needs the reference and another method at two sizes at least."
    said = []
    for method in results.others:
        own = compared[compared["method"] == method]
        if own["d"].nunique() < 2:
            continue
        epoch = common_epoch(own)
        at = own[own["epoch"] == epoch]
        alpha = exponent(at["d"].to_numpy(), at["val_loss"].to_numpy())
        train = exponent(at["d"].to_numpy(), at["train_loss"].to_numpy())
        if np.isnan(alpha.value):
            said.append(f"{method}: none, since a loss is not finite after epoch {epoch}")
            continue
        if np.isnan(alpha.low):
            verdict = "no interval with one seed"
        else:
            verdict = (
                "1/2 is " + ("inside" if 0.5 in alpha else "below" if alpha.low > 0.5 else "above") + " the interval"
            )
        said.append(
            f"{method}: α = {alpha:.2f} for the validation loss, {train:.2f} for the training loss "
            f"after epoch {epoch} ({verdict})"
        )
    text = "Loss ratio ~ d^α, with 95 % bootstrap intervals over seeds: " + "; ".join(said) + "."
    few = compared["d"].nunique()
    return text + (f" Only {few} sizes: this is a slope, not a law." if few < 4 else "")


def _answer_time(results: Results) -> str:
    middle = results.table.groupby(["method", "d"])["epoch_seconds"].median()
    said = [f"{method}: {_span(results, middle[method], '.2f')} s" for method in results.methods]
    return f"Median seconds per epoch, {_sizes(results)}: " + "; ".join(said) + "."


def _answer_similarity(results: Results, similar: pd.DataFrame) -> str:
    if similar.empty:
        return "No two runs of the same net and seed have weight snapshots."
    last = similar[similar["epoch"] == similar.groupby(["method", "net", "seed"])["epoch"].transform("max")]
    said = []
    for method, own in last[last["layer"] == WHOLE].groupby("method", sort=False):
        means = own.groupby("d")["cosine"].mean()
        said.append(f"{method}: {_span(results, means, '.3f')}")
    return f"Cosine of all weights after the last snapshot, {_sizes(results)}: " + "; ".join(said) + "."


def _answer_minima(results: Results, line: pd.DataFrame, around: pd.DataFrame) -> str:
    said = []
    for method in results.others:
        own = line[line["method"] == method]
        inside = own[(own["position"] >= -1e-9) & (own["position"] <= 1 + 1e-9)]
        if inside.empty:
            continue
        heights = inside.groupby(["d", "seed"]).apply(_barrier, include_groups=False)
        said.append(f"{method} {_span(results, heights.groupby('d').mean(), '.2f')}")
    if around.empty:
        return "No run has its last weights."
    flat = around.groupby(["method", "d"])["increase"].mean()
    rises = "; ".join(f"{method} {_span(results, flat[method], '.3f')}" for method in results.methods if method in flat)
    barrier = "; ".join(said) or "none"
    return (
        f"{_sizes(results).capitalize()}: loss barrier on the line from {results.study.reference}'s minimum, above the "
        f"straight line between the ends, in nats: {barrier}. Rise of the loss under {NOISE:.0%} noise: {rises}."
    )


def _barrier(points: pd.DataFrame) -> float:
    """The largest excess of the loss over linear interpolation between the two ends (Frankle et al. 2020)."""
    p, loss = points["position"].to_numpy(), points["loss"].to_numpy()
    return float(np.max(loss - np.interp(p, p[[0, -1]], loss[[0, -1]])))


def _span(results: Results, by_size: pd.Series, form: str) -> str:
    """The values at the smallest and the largest size of the study, "–" where there is none."""
    d = list(results.nets.values())
    ends = [f"{by_size[size]:{form}}" if size in by_size.index else "–" for size in (d[0], d[-1])]
    return ends[0] if len(d) == 1 else " → ".join(ends)


def _sizes(results: Results) -> str:
    d = list(results.nets.values())
    return f"at d = {d[0]:,}" if len(d) == 1 else f"from d = {d[0]:,} to {d[-1]:,}"


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _draw(drawing: Drawing, output: Path, writer: Any) -> None:
    try:
        with matplotlib.rc_context({"svg.hashsalt": drawing.name}):
            figure = drawing.draw()
            svg = io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            figure.set_layout_engine("none")  # laid out once is enough
            figure.savefig(output / f"{drawing.name}.png", dpi=130)
    except NothingToDraw as nothing:
        drawing.reason = str(nothing)
        for old in ("png", "svg"):  # of an earlier report
            (output / f"{drawing.name}.{old}").unlink(missing_ok=True)
        return
    (output / f"{drawing.name}.svg").write_bytes(svg.getvalue())
    drawing.source = "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
    if drawing.key:
        writer.add_figure(f"study/{drawing.name}", figure, close=False)


@contextmanager
def _tensorboard(output: Path) -> Iterator[Any]:
    from torch.utils.tensorboard import SummaryWriter

    for old in output.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(output))
    try:
        yield writer
    finally:
        writer.close()


def _claim(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"'{output}' is a file; the report needs a folder")
    if output.is_dir() and any(output.iterdir()) and not _is_report(output):
        raise UserError(f"'{output}' holds something that is no report: choose another --output")
    output.mkdir(parents=True, exist_ok=True)


def _is_report(output: Path) -> bool:
    table = output / "results.csv"
    if not table.is_file():
        return False
    with table.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n") == ",".join(COLUMNS)


def _overview(results: Results) -> str:
    total, done = len(results.study.cells()), len(results.cells)
    return (
        f"{len(results.methods)} methods ({', '.join(results.methods)}), {len(results.nets)} sizes, "
        f"{len(results.study.seeds)} seeds: {done} of {total} cells are finished. Methods are compared with "
        f"{results.study.reference}, at the same seed: the same initialisation and the same batches."
    )


def _summary(results: Results, table: pd.DataFrame, sections: list[Section]) -> str:
    lines = [f"# Study {results.study.name}", "", _overview(results), ""]
    if results.diverged:
        lines += [_diverged(results), ""]
    if results.missing:
        lines += ["Missing cells: " + "; ".join(_missing(results)) + ".", ""]
    lines += ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    lines += ["", _table_note(results), ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.answer, ""]
        lines += [f"![{one.caption}]({one.name}.png)" for one in section.figures if one.source] + [""]
        lines += [f"Not drawn ({one.name}): {one.reason}." for one in section.figures if one.reason]
    return "\n".join(lines).rstrip() + "\n"


def _table_note(results: Results) -> str:
    return _TABLE_NOTE if results.published is None else _TABLE_NOTE + _PUBLISHED_NOTE


def _diverged(results: Results) -> str:
    """Which runs ended without a finite loss; means over their seeds are not drawn or NaN."""
    return f"Diverged, so that means over seeds have no value: {'; '.join(map(str, results.diverged))}."


def _missing(results: Results) -> list[str]:
    return [f"{cell} ({reason})" for cell, reason in results.missing.items()]


def _page(results: Results, table: pd.DataFrame, sections: list[Section]) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    template = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    settings = {
        name: yaml.safe_dump_all([*method.overlays, *({"at scale": s, **o} for s, o in method.by_scale.items())])
        for name, method in results.study.methods.items()
    }
    return template.render(
        name=results.study.name,
        overview=_overview(results),
        diverged=_diverged(results) if results.diverged else "",
        missing=_missing(results),
        sections=sections,
        table=Markup(table.to_html(index=False, border=0)),
        table_note=_table_note(results),
        settings=settings,
    )
