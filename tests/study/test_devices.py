"""What runs were trained on."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from tests.study.conftest import copied
from zo_lightning.study import devices
from zo_lightning.study.devices import device_name, unlike_devices
from zo_lightning.study.folder import FINISHED
from zo_lightning.study.results import read_results


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("processor\t: 0\nmodel name\t: Some Core @ 2 GHz: fast\nprocessor\t: 1\n", "Some Core @ 2 GHz: fast"),
        ("processor\t: 0\nmodel name\t:\n", "elsewhere"),
        (None, "elsewhere"),
    ],
)
def test_a_processor_has_the_name_that_linux_gives(
    told: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told is not None:
        (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(devices, "_PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.processor", lambda: "elsewhere")
    assert device_name(torch.device("cpu")) == name
    monkeypatch.setattr("platform.processor", lambda: "")
    assert device_name(torch.device("cpu")) == (name if name != "elsewhere" else "cpu")
    assert device_name(torch.device("meta")) == "meta"


def test_runs_of_one_device_are_like() -> None:
    assert unlike_devices(pd.DataFrame({"device": ["a", "a"]})) == ""
    assert "a, b" in unlike_devices(pd.DataFrame({"device": ["b", "a", "b"]}))


def test_a_run_says_what_it_was_trained_on_and_one_that_does_not_is_read(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    assert set(read_results(folder).table["device"]) == {device_name(torch.device("cpu"))}
    file = next(folder.rglob(FINISHED))
    about = yaml.safe_load(file.read_text())
    del about["device"]
    file.write_text(yaml.safe_dump(about))
    results = read_results(folder)
    assert not results.missing
    assert set(results.table["device"]) == {device_name(torch.device("cpu")), "unknown"}
