"""What a study says while it runs."""

import io
import sys
from pathlib import Path

import pytest

from zo_lightning.study.command import _Progress
from zo_lightning.study.grid import Cell
from zo_lightning.study.runs import Outcome

CELLS = [Cell("ZO-AdaMM", "ScalableCNN 1", seed, ()) for seed in (1, 2)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(output: io.StringIO, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", output)
    with _Progress(CELLS, folder, jobs=1) as progress:
        for cell, error in zip(CELLS, (None, "the loss is nan"), strict=True):
            progress.report(Outcome(cell, 30.0, error))
    return output.getvalue()


def test_a_file_gets_a_line_per_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, failed, second = said(io.StringIO(), tmp_path, monkeypatch).splitlines()
    assert first == "1 of 2 cells: ZO-AdaMM, ScalableCNN 1, seed 1, 30 s; about 30 s left"
    assert failed == "failed: ZO-AdaMM, ScalableCNN 1, seed 2: the loss is nan"
    assert second.startswith("2 of 2 cells: ")


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = said(Terminal(), tmp_path, monkeypatch)
    assert "2/2 cells |" in shown and " of 2 cells" not in shown
