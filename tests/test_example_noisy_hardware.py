"""The example of a chip in the loop."""

import sys
from pathlib import Path

import pytest
import torch

from examples.noisy_hardware import __main__ as noisy_hardware
from examples.noisy_hardware.device import LIMIT, SHAPES, Device
from examples.noisy_hardware.methods import METHODS, digits
from examples.results import read


def test_the_smoke_form_adapts_the_weights_to_the_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["noisy_hardware", "--smoke", "--out", str(tmp_path)])
    noisy_hardware.main()
    results = {result.method: result for result in read(tmp_path / "noisy_hardware.csv")}
    assert list(results) == list(METHODS)
    assert len({result.before for result in results.values()}) == 1
    # Of 360 images, read ten times: two standard deviations are 0.05.
    alone, zeroth_order = results["left alone"].after, results["ZerothOrder"].after
    assert zeroth_order > alone + 0.15
    assert zeroth_order > results["ideal gradient, clipping unknown"].after
    assert results["ZerothOrder"].gflops > 0
    assert (tmp_path / "noisy_hardware.png").stat().st_size > 0


def test_a_chip_is_a_chip_of_its_seed_and_no_read_is_like_another() -> None:
    torch.manual_seed(0)
    weights, x = [torch.randn(shape) for shape in SHAPES], torch.rand(16, 64)
    first, second = Device(1), Device(1)
    reads = [first(weights, x)[-1] for _ in range(2)]
    assert torch.equal(reads[0], second(weights, x)[-1])
    assert not torch.equal(reads[0], reads[1])
    assert not torch.equal(reads[0], Device(2)(weights, x)[-1])
    assert torch.equal(reads[0] * 4, (reads[0] * 4).round())
    assert float(reads[0].abs().max()) == LIMIT


def test_a_chip_fades() -> None:
    weights, x = [torch.full(shape, 0.01) for shape in SHAPES], torch.ones(200, 64)
    young, old = Device(1), Device(1)
    for device in (young, old):
        device.shift = [0 * shift for shift in device.shift]
    old.reads = 10**6
    assert float(old(weights, x)[0].mean()) < float(young(weights, x)[0].mean())


def test_a_search_sees_no_test_image() -> None:
    _, test, labels = digits(held_out=False)
    _, held_out, _ = digits(held_out=True)
    assert len(test) == len(labels) == len(held_out) == 360
    assert not {tuple(x.tolist()) for x in test} & {tuple(x.tolist()) for x in held_out}
