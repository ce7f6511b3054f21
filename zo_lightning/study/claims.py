"""What came out of a study, to be read first: claims, each with its numbers and whether they bear it out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from zo_lightning.measures import WHOLE
from zo_lightning.study.devices import unlike_devices
from zo_lightning.study.results import Results
from zo_lightning.study.statistics import Interval, common_epoch, exponent, final, mean_interval, ratios

YES, NO, MIXED, OPEN = "yes", "no", "depends on d", "undecided"


@dataclass(frozen=True)
class Claim:
    """A sentence that a study can bear out or refute.

    Attributes:
        sentence: the claim.
        verdict: ``"yes"`` or ``"no"`` where the 95 % intervals leave no other, ``"depends on d"`` where they say
            one thing at one size and the opposite at another, ``"undecided"`` where one of them does not say.
        numbers: what was measured, with intervals.
        anchor: the section of the page that shows it.
    """

    sentence: str
    verdict: str
    numbers: str
    anchor: str


def claims_of(results: Results, similar: pd.DataFrame, around: pd.DataFrame) -> list[Claim]:
    """The claims about each method that is compared with the reference.

    Args:
        results: of the study.
        similar: the table of ``weights.similarity``.
        around: the second table of ``minima.measure_minima``.
    """
    methods = [method for method in results.others if method != results.study.control]
    return [
        claim
        for method in methods
        for claim in (*_about(results, method), *_about_minima(results, method, similar, around))
    ]


def _about(results: Results, method: str) -> list[Claim]:
    ref = results.study.reference
    found = []
    behind = _by_size(results, method, lambda own, other: _last(own) - _last(other))
    if behind:
        said = _spoken(behind, "+.3f")
        found.append(
            Claim(f"{method} ends less accurate than {ref}.", _sign(behind), f"accuracy − {ref}'s: {said}", "final")
        )
    equal = _by_size(results, method, _at_equal_cost) if results.table["flops"].notna().all() else {}
    if equal:
        sentence = f"At equal floating-point operations {method} is less accurate than {ref}."
        found.append(Claim(sentence, _sign(equal), f"accuracy − {ref}'s: {_spoken(equal, '+.3f')}", "budget"))
    if slower := _slowdown(results, method):
        found.append(slower)
    if not unlike_devices(results.table) and (longer := _by_size(results, method, _log_faster, np.inf)):
        times = {d: Interval(*(float(np.exp(-x)) for x in (i.value, i.high, i.low))) for d, i in longer.items()}
        sentence = f"An epoch of {method} takes longer than one of {ref}."
        found.append(Claim(sentence, _sign(longer), f"{ref}'s seconds times {_spoken(times, '.2f')}", "time"))
    return found


def _about_minima(results: Results, method: str, similar: pd.DataFrame, around: pd.DataFrame) -> list[Claim]:
    ref, control = results.study.reference, results.study.control
    found = []
    apart = _compared(results, _cosines(similar), method, control) if control is not None else {}
    if apart:
        sentence = f"{method} ends in another minimum than {ref}, further away than {ref} with other batches does."
        said = f"cosine of the matched filters with {ref}'s − {control}'s with them: {_spoken(apart, '+.3f')}"
        found.append(Claim(sentence, _sign(apart), said, "weights"))
    equal = _by_size(results, method, at_equal_loss)
    if equal:
        sentence = f"At equal training loss {method} is less accurate than {ref}."
        found.append(Claim(sentence, _sign(equal), f"accuracy − {ref}'s: {_spoken(equal, '+.3f')}", "curves"))
    rises = around.set_index(["method", "d", "seed"])["increase"]
    rounder = _compared(results, -rises, method, ref, np.inf)
    if rounder:
        larger = {d: Interval(-i.value, -i.high, -i.low) for d, i in rounder.items()}
        sentence = f"The minima of {method} are sharper than {ref}'s."
        said = f"rise of the loss under noise − {ref}'s: {_spoken(larger, '+.3f')}"
        found.append(Claim(sentence, _sign(rounder), said, "minima"))
    return found


def _cosines(similar: pd.DataFrame) -> pd.Series:
    """The cosine with the reference's last weights: the mean over convolutions, matched; of all weights without any."""
    last = similar[similar["epoch"] == similar.groupby(["method", "d", "seed"])["epoch"].transform("max")]
    keys = ["method", "d", "seed"]
    matched = last.groupby(keys)["matched"].mean()
    return matched.fillna(last[last["layer"] == WHOLE].set_index(keys)["cosine"])


def _compared(results: Results, values: pd.Series, method: str, other: str, most: float = 2.0) -> dict[int, Interval]:
    """By how much a value of a method is above another one's of the same seed, as ``_by_size``."""
    found, sizes = {}, list(results.tasks.values())
    for d in dict.fromkeys([sizes[0], sizes[-1]]):
        pairs = [(values.get((method, d, seed)), values.get((other, d, seed))) for seed in results.study.seeds]
        differences = [own - its for own, its in pairs if own is not None and its is not None]
        if differences and np.isfinite(differences).all():
            found[d] = mean_interval(differences, bounds=(-most, most))
    return found


def _slowdown(results: Results, method: str) -> Claim | None:
    compared = ratios(results.table, results.study.reference)
    own = compared[compared["method"] == method]
    if own["d"].nunique() < 2:
        return None
    at = own[own["epoch"] == common_epoch(own)]
    alpha = exponent(at["d"].to_numpy(), at["val_loss"].to_numpy())
    if np.isnan(alpha.value):
        return None
    verdict = OPEN if np.isnan(alpha.low) or (0.5 in alpha and 0 in alpha) else YES if alpha.high >= 0.5 else NO
    sizes = own["d"].nunique()
    few = f", of {sizes} sizes: a slope, not a law" if sizes < 4 else f", of {sizes} sizes"
    return Claim(
        f"The more weights, the further {method} falls behind {results.study.reference}: by √d or more in the loss.",
        verdict,
        f"validation loss ratio ~ d^α, α = {alpha:.2f}{few}",
        "slowdown",
    )


Compare = Callable[[pd.DataFrame, pd.DataFrame], float]


def _by_size(results: Results, method: str, compare: Compare, most: float = 1.0) -> dict[int, Interval]:
    """A comparison with the reference's run of the same seed, within ±``most``: its mean, at the ends of the sizes."""
    found = {}
    table, ref = results.table, results.study.reference
    sizes = list(results.tasks.items())
    for task, d in dict([sizes[0], sizes[-1]]).items():
        runs = dict(list(table[table["task"] == task].groupby(["method", "seed"])))
        seeds = [seed for name, seed in runs if name == method and (ref, seed) in runs]
        values = [compare(runs[method, seed], runs[ref, seed]) for seed in seeds]
        if values and np.isfinite(values).all():
            found[d] = mean_interval(values, bounds=(-most, most))
    return found


def _last(run: pd.DataFrame) -> float:
    return float(final(run)["val_accuracy"].iloc[0])


def _log_faster(own: pd.DataFrame, other: pd.DataFrame) -> float:
    """The logarithm of how many times as fast an epoch is as one of another run."""
    return float(np.log(other["epoch_seconds"].median() / own["epoch_seconds"].median()))


def _at_equal_cost(own: pd.DataFrame, other: pd.DataFrame) -> float:
    """The difference in accuracy where the cheaper of two runs ends; between epochs the curves are straight."""
    spent = min(own["flops"].max(), other["flops"].max())
    reached = [np.interp(spent, run["flops"], run["val_accuracy"]) for run in (own, other)]
    return float(reached[0] - reached[1])


def at_equal_loss(own: pd.DataFrame, other: pd.DataFrame) -> float:
    """The difference in accuracy where both have the lowest training loss that the worse of them reaches.

    NaN where one of them is below that after its first epoch.
    """
    losses = [np.minimum.accumulate(run["train_loss"].to_numpy()) for run in (own, other)]
    level = max(loss[-1] for loss in losses)
    if level > min(loss[0] for loss in losses):
        return np.nan
    pairs = zip(losses, (own, other), strict=True)
    reached = [np.interp(-level, -loss, run["val_accuracy"]) for loss, run in pairs]
    return float(reached[0] - reached[1])


def _sign(by_size: Mapping[int, Interval]) -> str:
    """Whether all intervals are below 0."""
    verdicts = {YES if i.high < 0 else NO if i.low > 0 else OPEN for i in by_size.values()}
    return MIXED if {YES, NO} <= verdicts else OPEN if OPEN in verdicts else verdicts.pop()


def _spoken(by_size: Mapping[int, Interval], form: str) -> str:
    return "; ".join(f"{interval:{form}} at d = {d:,}" for d, interval in by_size.items())
