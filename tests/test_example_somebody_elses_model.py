"""The example of somebody else's model, with JSON that is made here: Magika does not know it in a listing."""

import json
import random

import pytest

pytest.importorskip("magika")
pytest.importorskip("onnxruntime")

from torch import nn

from examples.somebody_elses_model.experiment import accuracy
from examples.somebody_elses_model.listings import TOOLS, listings
from examples.somebody_elses_model.ours import TextBegins, characters, train_adapter


def documents(count: int) -> dict[str, list[bytes]]:
    draw = random.Random(0)
    rows = [{f"key{k}": draw.randrange(1000) for k in range(30)} for _ in range(count)]
    return {"json": [json.dumps(row, indent=2).encode() for row in rows]}


def test_an_adapter_in_front_makes_listings_readable() -> None:
    """Files of the test are others than those of training."""
    files, types = documents(32), {"json": "json"}
    training, test = listings(files, types, 0, 0), listings(files, types, 1, 1)
    before = accuracy(test, TextBegins(), nn.Identity())
    adapter = train_adapter(training, seed=0, steps=10, size=5)
    assert accuracy(test, adapter, nn.Identity()) > before + 0.2


def test_a_listing_keeps_the_files_lines() -> None:
    files = documents(10)
    for k, (label, first, last) in enumerate(listings(files, {"json": "json"}, 0, 0)):
        lines = files["json"][2 * k].split(b"\n")
        assert label == "json"
        assert all(shown.endswith(line) for shown, line in zip(first, lines, strict=True))
        assert first == last == lines if TOOLS[k % len(TOOLS)] == "nothing" else first != lines


def test_an_adapter_begins_with_whole_lines() -> None:
    cuts = TextBegins()(characters(listings(documents(10), {"json": "json"}, 0, 0)))
    assert not cuts.any()
