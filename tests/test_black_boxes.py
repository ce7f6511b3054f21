"""The page on losses outside PyTorch: its code, section by section, and what its comments say."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "black_boxes.md"
TEXT = PAGE.read_text(encoding="utf-8")


def code(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


SECTIONS = {section.splitlines()[0]: block for section in TEXT.split("\n## ")[1:] for block in code(section)}

# What each section prints at the end: the least that shows that it has trained.
TRAINED = {
    "A metric as the loss": lambda words: float(words[-1]) > 0.85 > float(words[1]),
    "A function to be minimised": lambda words: " ".join(words) == "[1. 1.] 8002 all 1000 steps taken",
    "A program": lambda words: float(words[-2]) < 0.5 and words[-1] == "62",
    "A service behind a net": lambda words: float(words[2]) < 0.3 < float(words[0]),
    "Another runtime, with an adapter in front": lambda words: float(words[1]) > 0.9,
    "Ask and tell": lambda words: float(words[0]) < 0.1 and words[1] == "2.0",
}


def test_every_section_is_run() -> None:
    assert SECTIONS.keys() == TRAINED.keys()
    assert len(code(TEXT)) == 1 + len(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_code_of_the_page_runs(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "onnxruntime" in SECTIONS[section]:
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in (code(TEXT)[0], SECTIONS[section]):
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert TRAINED[section](printed.split()), printed
