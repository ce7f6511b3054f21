"""What a study says in words and numbers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.study.test_claims import NOTHING
from zo_lightning.study import answers
from zo_lightning.study.claims import claims_of
from zo_lightning.study.figures import NothingToDraw
from zo_lightning.study.minima import SHARPNESS
from zo_lightning.study.results import Results
from zo_lightning.study.sections import sections_of
from zo_lightning.study.weights import similarity


def test_barrier_is_the_height_above_the_line_between_the_ends(results: Results) -> None:
    """Loss 1 − t + 8 t (1 − t) has ends of 1 and 0 and a barrier of 2 at its middle; what is outside [0, 1] is none."""
    position = np.linspace(-0.25, 1.25, 7)
    loss = 1 - position + 8 * position * (1 - position)
    ends = [{"method": "ZO-AdaMM", "task": net, "d": d, "seed": 1} for net, d in results.tasks.items()]
    line = pd.concat([pd.DataFrame({**end, "position": position, "loss": loss}) for end in ends])
    around = pd.DataFrame([{**end, "loss": 1.0, "increase": 0.25} for end in ends], columns=list(SHARPNESS))
    said = answers.minima(results, line, around)
    assert "in nats: ZO-AdaMM 2.00 → 2.00." in said
    assert said.endswith("under 10% noise: ZO-AdaMM 0.250 → 0.250.")


def test_table_has_a_row_for_each_method_and_size(results: Results) -> None:
    table = answers.final_table(results)
    assert table["method"].tolist() == ["FO-AdaMM", "ZO-AdaMM"] * 2
    assert set(table["epochs"]) == {"3"}
    assert table["accuracy − FO-AdaMM's"].eq("–").tolist() == [True, False] * 2


def test_seconds_of_several_devices_are_not_compared(results: Results) -> None:
    devices = np.where(results.table["method"] == "FO-AdaMM", "a processor", "a GPU")
    mixed = replace(results, table=results.table.assign(device=devices))
    said = "Seconds are not compared: the runs are of several devices, a GPU, a processor."
    assert answers.time(mixed) == said and answers.time(results).startswith("Median seconds per epoch")
    assert set(answers.final_table(mixed)["s / epoch"]) == {"–"}
    drawings = [drawing for section in sections_of(mixed, similarity(mixed)) for drawing in section.figures]
    timed = [drawing for drawing in drawings if "seconds" in drawing.name or "time" in drawing.name]
    assert len(timed) == 3
    for drawing in timed:
        with pytest.raises(NothingToDraw, match="several devices, a GPU, a processor"):
            drawing.draw()
    assert "time" in {claim.anchor for claim in claims_of(results, *NOTHING)}
    assert "time" not in {claim.anchor for claim in claims_of(mixed, *NOTHING)}


def test_runs_that_counted_no_operations_are_compared_by_forward_passes(results: Results) -> None:
    older = Results(results.study, results.folder, results.table.assign(flops=np.nan), {}, None)
    for of, cost in ((results, "flops"), (older, "forward_passes")):
        budget = next(section for section in sections_of(of, similarity(of)) if section.anchor == "budget")
        assert [drawing.name for drawing in budget.figures if drawing.key] == [f"val_accuracy_by_{cost}"]
    assert set(answers.final_table(older)["TFLOP"]) == {"–"}
    assert all(float(value) > 0 for value in answers.final_table(results)["TFLOP"])
