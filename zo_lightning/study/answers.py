"""What a study says, in words and numbers: one sentence or two for each of its questions, and the table of its ends."""

import numpy as np
import pandas as pd

from zo_lightning.measures import WHOLE
from zo_lightning.study.devices import unlike_devices
from zo_lightning.study.minima import NOISE
from zo_lightning.study.results import Results, published_at
from zo_lightning.study.statistics import common_epoch, exponent, final, mean_interval, ratios


def final_table(results: Results) -> pd.DataFrame:
    """What each method has reached after its last epoch, by task: a row to read."""
    last = final(results.table)
    reference = last[last["method"] == results.study.reference].set_index(["task", "seed"])["val_accuracy"]
    apart, rows = unlike_devices(results.table), []
    for task, d in results.tasks.items():
        for method in results.methods:
            own = last[(last["task"] == task) & (last["method"] == method)]
            if own.empty:
                continue
            accuracy = own.set_index(["task", "seed"])["val_accuracy"]
            is_reference = method == results.study.reference
            difference = (accuracy - reference.reindex(accuracy.index)).dropna()[: 0 if is_reference else None]
            row = {
                "task": task,
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
                "s / epoch": "–" if apart else f"{own['epoch_seconds'].median():.2f}",
            }
            if results.published is not None:
                theirs = published_at(results, method, d)
                row["published accuracy"] = "–" if theirs.empty else f"{theirs['val_accuracy_mean'].iloc[-1]:.4f}"
            rows.append(row)
    return pd.DataFrame(rows)


def accuracy(results: Results) -> str:
    """The accuracies of the methods after their last epoch, at the smallest and the largest size."""
    last = final(results.table)
    said = []
    for method in results.methods:
        means = last[last["method"] == method].groupby("d")["val_accuracy"].mean()
        said.append(f"{method}: {_span(results, means, '.3f')}")
    return f"Validation accuracy after the last epoch, {_sizes(results)}: " + "; ".join(said) + "."


def slowdown(results: Results) -> str:
    """The exponent α of Loss ratio ~ d^α of each method, and whether 1/2 is in its interval."""
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
    text = "Loss ratio ~ d^α, with 95 % intervals: " + "; ".join(said) + "."
    few = compared["d"].nunique()
    return text + (f" Only {few} sizes: this is a slope, not a law." if few < 4 else "")


def time(results: Results) -> str:
    """The seconds of an epoch, at the smallest and the largest size, or why they are not compared."""
    if apart := unlike_devices(results.table):
        return apart
    middle = results.table.groupby(["method", "d"])["epoch_seconds"].median()
    said = [f"{method}: {_span(results, middle[method], '.2f')} s" for method in results.methods]
    return f"Median seconds per epoch, {_sizes(results)}: " + "; ".join(said) + "."


def weights(results: Results, similar: pd.DataFrame) -> str:
    """The cosine between the last weights of each method and the reference's."""
    if similar.empty:
        return "No two runs of the same task and seed have weight snapshots."
    last = similar[similar["epoch"] == similar.groupby(["method", "task", "seed"])["epoch"].transform("max")]
    said = []
    for method, own in last[last["layer"] == WHOLE].groupby("method", sort=False):
        means = own.groupby("d")["cosine"].mean()
        said.append(f"{method}: {_span(results, means, '.3f')}")
    return f"Cosine of all weights after the last snapshot, {_sizes(results)}: " + "; ".join(said) + "."


def minima(results: Results, line: pd.DataFrame, around: pd.DataFrame) -> str:
    """The barrier between the minima and the rise of the loss around each, from the tables of ``measure_minima``."""
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
    d = list(results.tasks.values())
    ends = [f"{by_size[size]:{form}}" if size in by_size.index else "–" for size in (d[0], d[-1])]
    return ends[0] if len(d) == 1 else " → ".join(ends)


def _sizes(results: Results) -> str:
    d = list(results.tasks.values())
    return f"at d = {d[0]:,}" if len(d) == 1 else f"from d = {d[0]:,} to {d[-1]:,}"


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
