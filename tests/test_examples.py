"""Results of the examples: kept once, read back, and put into a table."""

import os
import subprocess
import sys
from math import isnan, nan
from pathlib import Path

from examples.results import Result, read, record, table, train_all

ROOT = Path(__file__).resolve().parents[1]


def result(seed: int, after: float, method: str = "ZO") -> Result:
    return Result("digits", method, seed, "accuracy", 0.1, after, 12.5, nan, 3.25)


def test_a_result_replaces_the_one_of_the_same_training(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.csv"
    for one in (result(1, 0.8), result(2, 0.7), result(1, 0.9)):
        record(file, one)
    kept = read(file)
    assert [(one.seed, one.after, one.gflops) for one in kept] == [(2, 0.7, 12.5), (1, 0.9, 12.5)]
    assert isnan(kept[0].peak_mb)


def in_process(seed: int) -> Result:
    return result(seed, float(os.getpid()))


def test_trainings_can_have_a_process_each(tmp_path: Path) -> None:
    """That of an id is one of its own, and what it gives is kept as soon as it is there."""
    here = train_all(in_process, [1, 2], tmp_path / "here.csv", apart=False)
    apart = train_all(in_process, [1, 2], tmp_path / "apart.csv")
    assert {one.after for one in here} == {os.getpid()}
    assert len({one.after for one in apart} | {os.getpid()}) == 3
    assert [one.seed for one in read(tmp_path / "apart.csv")] == [1, 2]


def test_the_table_has_a_row_for_each_method() -> None:
    lines = table([result(1, 0.8), result(2, 0.9), result(1, 0.95, "FO")]).splitlines()
    assert lines[2] == "| digits | ZO | accuracy | 0.100 | 0.850 ± 0.071 | 2 | 12 | – | 3.2 |"
    assert lines[3] == "| digits | FO | accuracy | 0.100 | 0.950 | 1 | 12 | – | 3.2 |"


MEASURED = """
import torch
from examples.results import Cost
torch.ones(1000)
with Cost() as cost:
    held = torch.ones(20_000_000)
    del held
print(cost.seconds, cost.peak_mb)
"""


def test_a_peak_is_that_of_the_block() -> None:
    """In a process of its own: in this one, memory that other tests have freed may be at hand."""
    run = subprocess.run([sys.executable, "-c", MEASURED], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, peak = map(float, run.stdout.split())
    assert seconds > 0
    assert isnan(peak) or 79 < peak < 110  # 80 MB, and what PyTorch sets up meanwhile
