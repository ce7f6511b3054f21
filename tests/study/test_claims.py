"""What a report says first: claims and verdicts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from zo_lightning.study.claims import MIXED, NO, OPEN, YES, Claim, at_equal_loss, claims_of
from zo_lightning.study.minima import SHARPNESS
from zo_lightning.study.results import Results
from zo_lightning.study.weights import SIMILARITY

SEEDS = (1, 2, 3)
NOTHING = pd.DataFrame(columns=list(SIMILARITY)), pd.DataFrame(columns=list(SHARPNESS))


def made(results: Results, accuracy: Any, loss: Any = lambda d: 1.0, seconds: float = 2.0) -> dict[str, Claim]:
    """The claims of a study in which the reference has the accuracy 0.9 and the loss 1, and an epoch of a second."""
    rows = []
    for net, d in results.tasks.items():
        for seed in SEEDS:
            for method in ("FO-AdaMM", "ZO-AdaMM"):
                other = method == "ZO-AdaMM"
                noise = 1e-3 * (seed - 2)
                for epoch in (1, 2, 3):
                    rows.append(
                        {
                            **dict.fromkeys(results.table.columns, 0.0),
                            **{"method": method, "task": net, "d": d, "seed": seed, "epoch": epoch},
                            "val_accuracy": (accuracy(d) if other else 0.9) * epoch / 3 + (noise if other else 0),
                            "val_loss": loss(d) * (1 + noise) if other else 1.0,
                            "train_loss": 1.0,
                            "flops": epoch * (1e9 if other else 2e9),
                            "epoch_seconds": seconds * (1 + noise) if other else 1.0,
                        }
                    )
    study = replace(results, table=pd.DataFrame(rows), published=None, missing={})
    return {claim.anchor: claim for claim in claims_of(study, *NOTHING)}


def test_numbers_and_verdicts_are_those_of_the_runs(results: Results) -> None:
    claims = made(results, lambda d: 0.6, lambda d: d**0.1)
    assert claims["final"].verdict == YES
    # a mean of three seeds that differ by 0.001: 4.303 · 0.001 / √3 = 0.0025 to each side
    assert "−" in claims["final"].numbers and "-0.300 [-0.302, -0.298] at d = 1,400" in claims["final"].numbers
    # both have 3e9 operations: the one at its end, the other in the middle of its way, at 0.45
    assert "+0.150 [+0.148, +0.152]" in claims["budget"].numbers and claims["budget"].verdict == NO
    assert claims["slowdown"].verdict == NO and "α = 0.10" in claims["slowdown"].numbers
    assert claims["time"].verdict == YES and "times 2.00 [2.00, 2.00]" in claims["time"].numbers


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        (lambda d: 0.95, NO),
        (lambda d: 0.9, OPEN),
        (lambda d: 0.6 if d == 1400 else 0.9, OPEN),
        (lambda d: 0.6 if d == 1400 else 0.95, MIXED),
    ],
)
def test_what_is_not_shown_is_undecided(results: Results, accuracy: Any, verdict: str) -> None:
    assert made(results, accuracy)["final"].verdict == verdict


def test_the_law_of_the_theory_is_borne_out_where_it_holds(results: Results) -> None:
    assert made(results, lambda d: 0.6, np.sqrt)["slowdown"].verdict == YES


def test_one_seed_decides_nothing(results: Results) -> None:
    table = results.table[results.table["seed"] == 1]
    claims = claims_of(replace(results, table=table), *NOTHING)
    assert len(claims) == 5 and {claim.verdict for claim in claims} == {OPEN}


def test_without_the_reference_nothing_is_claimed(results: Results) -> None:
    table = results.table[results.table["method"] != "FO-AdaMM"]
    assert claims_of(replace(results, table=table), *NOTHING) == []


def test_minima_are_compared_with_those_of_the_same_method_in_another_order(results: Results) -> None:
    study = replace(results.study, control="other order", seeds=SEEDS)
    near, far, rises = {"FO-AdaMM": 1.0, "other order": 0.6}, {"ZO-AdaMM": 0.2}, {"FO-AdaMM": 0.1, "ZO-AdaMM": 0.5}
    similar, around = [], []
    for d in results.tasks.values():
        for seed in SEEDS:
            noise = 0.01 * (seed - 2)
            for method, cosine in (near | far).items():
                for epoch, layer in ((1, "conv1"), (2, "conv1"), (2, "all")):
                    matched = (cosine + noise * len(method)) if layer == "conv1" and epoch == 2 else np.nan
                    similar.append((method, "net", d, seed, epoch, layer, 0.9, 1.0, matched))
            around += [(method, "net", d, seed, 1.0, rise + noise * len(method)) for method, rise in rises.items()]
    tables = pd.DataFrame(similar, columns=list(SIMILARITY)), pd.DataFrame(around, columns=list(SHARPNESS))
    claims = {claim.anchor: claim for claim in claims_of(replace(results, study=study), *tables)}
    assert claims["weights"].verdict == YES and "-0.400 [-0.475, -0.325] at d = 1,400" in claims["weights"].numbers
    assert claims["minima"].verdict == YES and "+0.400 [+0.400, +0.400]" in claims["minima"].numbers


def test_at_equal_training_loss_the_better_minimum_shows() -> None:
    def run(losses: list[float], accuracies: list[float]) -> pd.DataFrame:
        return pd.DataFrame({"train_loss": losses, "val_accuracy": accuracies})

    reference, slow = run([0.8, 0.4, 0.2], [0.7, 0.9, 0.95]), run([0.9, 0.7, 0.6], [0.6, 0.7, 0.75])
    assert at_equal_loss(slow, reference) == pytest.approx(0.75 - 0.8), "0.6 lies halfway from 0.8 to 0.4"
    assert np.isnan(at_equal_loss(run([0.95, 0.9], [0.5, 0.6]), reference)), "the reference was never at 0.9"
