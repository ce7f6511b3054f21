"""The table of a study's results."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.study.conftest import copied
from zo_lightning.study.results import published, read_results
from zo_lightning.user_errors import UserError


def test_damaged_cells_are_missing_and_nowhere_else(finished: Path, tmp_path: Path) -> None:
    study = copied(finished, tmp_path)
    (study / "ZO-AdaMM/ScalableCNN_1/seed_1/config.yaml").unlink()
    results = read_results(study)
    assert [str(cell) for cell in results.missing] == ["ZO-AdaMM, ScalableCNN 1, seed 1"]
    assert len(results.table) == 7 * 3
    for config in study.rglob("config.yaml"):
        config.unlink()
    with pytest.raises(UserError, match="none of its 8 cells is finished"):
        read_results(study)


def test_damaged_study_is_told(finished: Path, tmp_path: Path) -> None:
    study = tmp_path / "tiny"
    shutil.copytree(finished / "lightning_logs" / "tiny", study)
    text = yaml.safe_load((study / "study.yaml").read_text())
    del text["methods"]
    (study / "study.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match=r"study.yaml' is damaged: KeyError\('methods'\)"):
        read_results(study)


def test_published_table_is_whole() -> None:
    table = published()
    assert set(table["method"]) == {"FO-AdaMM", "ZO-AdaMM"}
    assert table.groupby(["method", "d"]).size().tolist() == [50] * 22
    last = table[(table["method"] == "ZO-AdaMM") & (table["d"] == 1400) & (table["epoch"] == 50)]
    assert last["val_accuracy_mean"].item() == pytest.approx(0.8054, abs=5e-4)
    assert table.notna().all(axis=None)
