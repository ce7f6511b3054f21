"""What is measured on a study's table: pure functions of numbers."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

KEYS = ["task", "d", "seed", "epoch"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; the bounds are NaN where the data give none."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        value = f"{self.value:{spec}}"
        return value if np.isnan(self.low) else f"{value} [{self.low:{spec}}, {self.high:{spec}}]"

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


def mean_interval(values: ArrayLike, level: float = 0.95, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """The mean of independent values, such as those of several seeds, ``x̄ ± t s/√n`` (Student's t, n − 1 degrees).

    The interval ends at ``bounds``, beyond which no mean can lie: [0, 1] for an accuracy. With two seeds t is 12.7.
    """
    x = np.asarray(values, dtype=float)
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean, np.nan, np.nan)
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]))


def over_seeds(table: pd.DataFrame, column: str, by: str = "epoch") -> pd.DataFrame:
    """Mean, standard deviation (of a sample; NaN for one seed) and number of seeds of a column, by epoch.

    A seed that is NaN makes the mean NaN: without a run that diverged the others would look better than the method is.
    """
    groups = table.groupby(by)[column]
    return groups.agg(
        mean=lambda values: values.mean(skipna=False), std=lambda values: values.std(skipna=False), count="count"
    ).reset_index()


def ratios(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Compare each method with the reference, at the same task, seed (so the same start and batches) and epoch.

    ``train_loss`` and ``val_loss`` are Loss / Loss_ref, ``val_accuracy`` is Accuracy_ref / Accuracy: all above 1 where
    the reference is better. ``k_train`` and ``k_val`` are Loss / (Loss_ref √d): constant in d if the slowdown that
    theory allows, O(√d), is what happens. Rows without their counterpart are left out.
    """
    ref = table[table["method"] == reference]
    pairs = table[table["method"] != reference].merge(ref, on=KEYS, suffixes=("", "_ref"))
    result = pairs[["method", *KEYS]].copy()
    for loss in ("train_loss", "val_loss"):
        result[loss] = pairs[loss] / pairs[f"{loss}_ref"]
    result["val_accuracy"] = pairs["val_accuracy_ref"] / pairs["val_accuracy"]
    root = np.sqrt(pairs["d"])
    return result.assign(k_train=result["train_loss"] / root, k_val=result["val_loss"] / root)


def exponent(d: ArrayLike, ratio: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The exponent α of ``ratio ~ dᵅ``: the slope of a least-squares line through (log d, mean log ratio).

    Every size counts the same, however many seeds it has. The interval is a percentile bootstrap (Efron 1979) that
    draws at each size its seeds again, with replacement: it says how far seeds make the slope uncertain, not whether
    the law is a power. Resampled means vary too little by ``√((n − 1)/n)``, and few seeds leave the variance itself
    uncertain: deviations are enlarged by the inverse of the one and by ``t/z``, the quantile of Student's t for
    ``Σ (n − 1)`` degrees of freedom over the normal one. Where a size has one seed only, the interval is that of the
    line: the standard error of its slope by the sizes' scatter about it, times Student's t for two degrees of freedom
    fewer than there are sizes, which takes the law to be a power; NaN bounds for two sizes then. All NaN for less than
    two sizes, or where a ratio is not finite: a run has diverged.

    Args:
        d: the sizes, [n].
        ratio: positive, [n]; several with the same d are seeds.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    sizes, at = np.unique(np.asarray(d, dtype=float), return_inverse=True)
    logs = np.log(np.asarray(ratio, dtype=float))
    if len(sizes) < 2 or not np.isfinite(logs).all():
        return Interval(np.nan, np.nan, np.nan)
    x = np.log(sizes) - np.log(sizes).mean()
    weights = x / (x @ x)  # the slope is a weighted sum of the means
    groups = [logs[at == index] for index in range(len(sizes))]
    means = np.array([group.mean() for group in groups])
    value = float(weights @ means)
    counts = np.array([len(group) for group in groups])
    if counts.min() < 2:
        return _of_line(x, means - means.mean() - value * x, value, level)
    rng = np.random.default_rng(seed)
    draws = [
        group[rng.integers(n, size=(resamples, n))].mean(1) - group.mean()
        for n, group in zip(counts, groups, strict=True)
    ]
    tail = np.array([(1 - level) / 2, (1 + level) / 2])
    widened = stats.t.ppf(tail[1], (counts - 1).sum()) / stats.norm.ppf(tail[1])
    low, high = value + widened * np.quantile((weights * np.sqrt(counts / (counts - 1))) @ np.stack(draws), tail)
    return Interval(value, float(low), float(high))


def _of_line(x: np.ndarray, residuals: np.ndarray, slope: float, level: float) -> Interval:
    degrees = len(x) - 2
    if degrees < 1:
        return Interval(slope, np.nan, np.nan)
    error = np.sqrt(residuals @ residuals / degrees / (x @ x))
    half = float(stats.t.ppf((1 + level) / 2, degrees) * error)
    return Interval(slope, slope - half, slope + half)


def exponents(compared: pd.DataFrame, column: str) -> pd.DataFrame:
    """`exponent` of a column of `ratios` at each epoch: ``epoch``, ``value``, ``low``, ``high``."""
    rows = []
    for epoch, at in compared.groupby("epoch"):
        found = exponent(at["d"].to_numpy(), at[column].to_numpy())
        rows.append({"epoch": epoch, "value": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def final(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last epoch of each method, task and seed."""
    return table.loc[table.groupby(["method", "task", "seed"])["epoch"].idxmax()]


def common_epoch(compared: pd.DataFrame) -> int:
    """The last epoch that every run of a table has reached, such as those of one method in ``ratios``."""
    return int(compared.groupby(["method", "task", "seed"])["epoch"].max().min())
