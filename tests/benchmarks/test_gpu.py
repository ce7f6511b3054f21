"""The figures of a GPU: without one, that every part of their script runs, and finds the CPU equal to itself."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


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
