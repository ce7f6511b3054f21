"""What is measured on a study's table."""

import numpy as np
import pandas as pd
import pytest

from zo_lightning.study.statistics import common_epoch, exponent, exponents, final, mean_interval, over_seeds, ratios


def test_mean_interval_is_students() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.30265, s = 1
    assert (found.value, found.low) == pytest.approx((2.0, 2 - 4.30265 / np.sqrt(3)), abs=1e-5)
    assert found.high - found.value == pytest.approx(found.value - found.low)
    assert np.isnan(mean_interval([1.0]).low)
    assert f"{mean_interval([1.0]):.2f}" == "1.00"
    assert f"{mean_interval([0.5, 0.9], bounds=(0, 1)):.1f}" == "0.7 [0.0, 1.0]"


def test_mean_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = sum(0.0 in mean_interval(x) for x in rng.normal(size=(2000, 3)))
    assert abs(hits / 2000 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)  # four standard errors


def table() -> pd.DataFrame:
    """Loss of FO 0.1 d^-0.1 and of ZO 0.2 d^0.4, so a ratio of 2 √d; seed 2 of ZO is missing at d = 100."""
    rows = []
    for seed in (1, 2):
        for d in (100, 1000, 10_000):
            for epoch in (1, 2):
                fo, zo = 0.1 * d**-0.1, 0.2 * d**0.4
                common = {"task": f"net {d}", "d": d, "seed": seed, "epoch": epoch}
                rows.append({"method": "FO", **common, "train_loss": fo, "val_loss": fo, "val_accuracy": 0.9})
                if (seed, d) != (2, 100):
                    rows.append({"method": "ZO", **common, "train_loss": zo, "val_loss": zo, "val_accuracy": 0.45})
    return pd.DataFrame(rows)


def test_ratios_pair_net_seed_and_epoch() -> None:
    compared = ratios(table(), "FO")
    assert len(compared) == 10
    assert set(compared["method"]) == {"ZO"}
    assert compared["val_loss"].to_numpy() == pytest.approx(2 * np.sqrt(compared["d"]))
    assert compared["k_train"].to_numpy() == pytest.approx(np.full(10, 2.0))
    assert compared["val_accuracy"].to_numpy() == pytest.approx(np.full(10, 2.0))
    assert ratios(table(), "ZO")["method"].unique() == ["FO"]


def test_exponent_recovers_a_power() -> None:
    d = [100, 100, 1000, 10_000, 10_000]
    assert exponent(d, 3 * np.array(d, dtype=float) ** 0.37).value == pytest.approx(0.37)
    assert np.isnan(exponent([100, 100], [1.0, 2.0]).value)
    alone = exponent([100, 1000], [1.0, 10.0])
    assert alone.value == pytest.approx(1.0)
    assert np.isnan(alone.low)


@pytest.mark.parametrize(("sizes", "seeds", "short_by"), [(5, 10, 0.0), (4, 2, 0.05), (11, 1, 0.0)])
def test_exponents_interval_covers_the_truth_about_as_often_as_it_says(sizes: int, seeds: int, short_by: float) -> None:
    """Log-normal ratios; with two seeds a resampled mean is one of three numbers, which costs up to 0.05."""
    rng = np.random.default_rng(0)
    d = np.repeat(np.geomspace(1e3, 1e6, sizes), seeds)
    trials = 400
    hits = sum(0.5 in exponent(d, d**0.5 * np.exp(rng.normal(0, 0.3, len(d))), resamples=400) for _ in range(trials))
    assert abs(hits / trials - 0.95) < short_by + 4 * np.sqrt(0.95 * 0.05 / trials)


def test_a_run_that_diverged_leaves_no_exponent_and_no_mean() -> None:
    assert np.isnan(exponent([100, 100, 1000, 1000], [1.0, np.inf, 2.0, 2.0]).value)
    assert np.isnan(exponent([100, 100, 1000, 1000], [1.0, np.nan, 2.0, 2.0]).value)
    curve = over_seeds(pd.DataFrame({"epoch": [1, 1, 2, 2], "val_loss": [1.0, 2.0, 1.0, np.nan]}), "val_loss")
    assert curve["mean"].tolist()[0] == 1.5
    assert np.isnan(curve["mean"].tolist()[1])


def test_exponents_by_epoch() -> None:
    found = exponents(ratios(table(), "FO"), "val_loss")
    assert found["epoch"].tolist() == [1, 2]
    assert found["value"].to_numpy() == pytest.approx([0.5, 0.5])


def test_over_seeds_final_and_common_epoch() -> None:
    rows = table()
    curve = over_seeds(rows[(rows["method"] == "ZO") & (rows["d"] == 100)], "val_loss")
    assert curve["count"].tolist() == [1, 1]
    assert curve["std"].isna().all()
    assert set(final(rows)["epoch"]) == {2}
    assert len(final(rows)) == 11
    assert common_epoch(rows) == 2
    assert common_epoch(rows.drop(rows.index[-1])) == 1
