"""Benchmarks run in small; that of a GPU finds the CPU equal to itself."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, scaling, step_cost


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_runs_in_small(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--only", part, "--root", str(tmp_path), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    assert gpu.main() == 0
    found = json.loads(file.read_text())
    assert found["failed"] == [] and found["rows"]
    if part == "directions":
        assert {"equal, bit for bit"} == {one for row in found["rows"] for one in row["found"].split("; ")}


def test_a_part_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: gpu.Run) -> gpu.Rows:
        yield "one", "measured"
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "adamm", fails)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--only", "adamm", "waits"])
    assert gpu.main() == 1
    shown = capsys.readouterr()
    assert "| adamm | FAILED" in shown.out and "| waits | signs" in shown.out and "no such kernel" in shown.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--device cpu" in capsys.readouterr().err


def test_step_cost_measures_every_method_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpu.json"
    small = ["--modes", "plain", "--seconds", "0", "--scales", "0.1112", "--batch", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["step_cost.py", *small])
    step_cost.main()
    found = json.loads(file.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert {name for name in step_cost.PLAIN if "torchzero" not in name} <= rows.keys() <= step_cost.PLAIN.keys()
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows.values())
    # One direction asks two passes; backpropagation's three lack the gradient by the images.
    assert rows["signs, SGD"]["flops_in_passes"] == rows["MeZO, plain loop"]["flops_in_passes"] == 2
    assert 2 < rows["backpropagation, Adam"]["flops_in_passes"] < 3
    assert found["versions"]["torch"] == version("torch")


def test_scaling_measures_and_draws(tmp_path: Path) -> None:
    found = scaling.milliseconds(1 / 9, 2, samples=2, many=True, seconds=0)
    assert found.keys() == scaling.STYLES.keys() and min(found.values()) > 0
    points: scaling.Points = {name: [(1, 2.0), (10, 3.0)] for name in scaling.MEMORY}
    scaling.draw(dict.fromkeys(("weights", "memory", "directions", "images"), points), tmp_path / "a" / "cost.png")
    assert (tmp_path / "a" / "cost.png").stat().st_size > 10_000
