"""A file is short enough to be read at once."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "zo_lightning"
LINES = 350


def test_no_file_is_longer_than_a_reader_keeps_in_mind() -> None:
    counts = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")
    }
    assert counts
    too_long = {name: lines for name, lines in counts.items() if lines > LINES}
    assert not too_long, f"above {LINES} lines: {too_long}"
