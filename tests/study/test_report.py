"""``zo-lightning report``: the page and its figures."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.study.conftest import copied
from zo_lightning.__main__ import main
from zo_lightning.study.results import Results, read_results

FIGURES = {
    *("accuracy", "train_loss", "val_loss", "final_accuracy", "ratios", "k", "exponent", "epoch_time"),
    *("cosine_ZO-AdaMM", "l2_ZO-AdaMM", "matched_ZO-AdaMM", "tsne_conv1", "tsne_conv2", "filters"),
    *("val_accuracy_by_flops", "val_accuracy_by_seconds", "val_loss_by_flops", "val_loss_by_seconds"),
    *("line_loss", "line_accuracy", "sharpness"),
}


@pytest.fixture(scope="module")
def report(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        assert main(["report", "lightning_logs/tiny", "--output", str(folder)]) == 0
    return folder


def test_all_figures_are_written(report: Path) -> None:
    assert {path.stem for path in report.glob("*.png")} == FIGURES
    assert {path.stem for path in report.glob("*.svg")} == FIGURES


def test_page_is_self_contained_and_holds_all_figures(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert page.count("<figure id=") == len(FIGURES)
    assert page.count('<img src="data:image/svg+xml;base64,') > len(FIGURES)  # a panel each
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "Not drawn" not in page
    assert "8 of 8 cells are finished" in page


def test_tables_and_summary(report: Path, results: Results) -> None:
    written = pd.read_csv(report / "results.csv", dtype={"val_loss": str})
    assert written["val_loss"].map(float).tolist() == results.table["val_loss"].tolist()
    assert len(pd.read_csv(report / "line.csv")) == 2 * 2 * 31
    assert len(pd.read_csv(report / "sharpness.csv")) == 8
    summary = (report / "summary.md").read_text()
    assert re.search(r"ZO-AdaMM: α = -?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]", summary)
    assert "| ScalableCNN 1 | ZO-AdaMM | 10,602 | 2 | 3 |" in summary


@pytest.fixture
def kept(report: Path, tmp_path: Path) -> Path:
    """The tables of a report, and nothing else."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("results.csv", "similarity.csv", "line.csv", "sharpness.csv", "declaration.yaml"):
        shutil.copy(report / name, folder)
    return folder


def test_tables_alone_give_the_same_figures_but_those_of_snapshots(report: Path, kept: Path) -> None:
    assert main(["report", str(kept / "results.csv")]) == 0
    made = kept / "results_report"
    of_snapshots = {name for name in FIGURES if name == "filters" or name.startswith("tsne_")}
    assert {path.stem for path in made.glob("*.png")} == FIGURES - of_snapshots
    for name in ("results.csv", "similarity.csv", "line.csv", "sharpness.csv", "declaration.yaml"):
        assert (made / name).read_bytes() == (report / name).read_bytes(), name
    there, here = ((folder / "summary.md").read_text() for folder in (report, made))
    assert here[: here.index("![")] == there[: there.index("![")]  # claims, table and answers


def test_a_declaration_beside_a_table_says_what_is_compared_with_what(kept: Path) -> None:
    table = pd.read_csv(kept / "results.csv", dtype=str)
    first = (table["method"] == "FO-AdaMM") & (table["task"] == "ScalableCNN 1") & (table["seed"] == "1")
    shuffled = pd.concat([table[table["method"] != "FO-AdaMM"], table[(table["method"] == "FO-AdaMM") & ~first]])
    shuffled.sort_values("epoch", ascending=False, kind="stable").to_csv(
        kept / "results.csv", index=False, lineterminator="\r\n", encoding="utf-8-sig"
    )
    results = read_results(kept / "results.csv")
    assert results.study.reference == "FO-AdaMM" and [str(cell) for cell in results.missing] == [
        "FO-AdaMM, ScalableCNN 1, seed 1"
    ]
    assert all(list(run["epoch"]) == [1, 2, 3] for _, run in results.table.groupby(["method", "task", "seed"]))
    (kept / "declaration.yaml").unlink()
    alone = read_results(kept / "results.csv").study
    assert (alone.name, alone.reference, alone.control) == ("tiny", "ZO-AdaMM", None)


def test_published_numbers_stand_beside_those_of_their_data_alone(report: Path, kept: Path) -> None:
    assert set(pd.read_csv(report / "results.csv")["data"]) == {"Digits"}
    assert "published" not in (report / "summary.md").read_text()
    assert read_results(kept / "results.csv").published is None
    (kept / "results.csv").write_text((kept / "results.csv").read_text().replace(",Digits,", ",MNIST,"))
    assert read_results(kept / "results.csv").published is not None


def test_names_may_be_such_as_pandas_takes_for_nothing(kept: Path) -> None:
    text = (kept / "results.csv").read_text().replace("ZO-AdaMM", "NA").replace("FO-AdaMM", '"F, O"')
    (kept / "results.csv").write_text(text)
    (kept / "declaration.yaml").unlink()
    assert read_results(kept / "results.csv").methods == ["F, O", "NA"]


def _again(text: str) -> str:
    return text + text.splitlines()[-1] + "\n"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("results.csv", lambda text: text.replace("method,task", "task,method"), "not the results.csv of a report"),
        ("results.csv", lambda text: text.splitlines()[0], "has no rows"),
        ("results.csv", lambda text: text.replace(",Digits,", ",,"), "a data is empty"),
        ("results.csv", lambda text: text + "FO,x,Digits,many,1,1,1,1,1,1,1,1,1,cpu\n", "is damaged: invalid literal"),
        ("results.csv", lambda text: text[: text.rindex(",")], "has 13 values, not 14"),
        ("results.csv", lambda text: text.replace(",1400,1,2,", ",1400,1,0,"), "epochs count from 1"),
        (
            "results.csv",
            lambda text: text.replace(",1400,1,2,", ",1401,1,2,"),
            "has more than one d",
        ),
        ("results.csv", lambda text: text.replace(",1400,", f",{10**30},"), "is damaged: "),
        (
            "declaration.yaml",
            lambda text: text.replace("reference: FO-AdaMM", "reference: SGD"),
            "is damaged: KeyError",
        ),
        ("declaration.yaml", lambda text: text.replace("budgets: []", "budgets: [1, 2]"), "none of the study's"),
        ("results.csv", _again, "two rows have the same method, task, seed, epoch"),
        ("results.csv", lambda text: text.replace("ZO-AdaMM,", "ES,"), "runs that are none of the study's"),
        ("sharpness.csv", _again, "sharpness.csv' is damaged: two rows have the same method, task, seed"),
        ("line.csv", lambda text: text[: text.rindex(",")], "line.csv' is damaged: row 125 has 6 values, not 7"),
    ],
)
def test_table_that_is_none_is_refused(kept: Path, capsys: Any, name: str, change: Any, said: str) -> None:
    text = (kept / name).read_text()
    (kept / name).write_text(change(text))
    assert change(text) != text
    assert main(["report", str(kept / "results.csv")]) == 2
    assert said in capsys.readouterr().err
    assert not (kept / "results_report").exists()


def test_a_fuller_report_is_not_drawn_over_by_its_table(report: Path, capsys: Any) -> None:
    assert main(["report", str(report / "results.csv"), "--output", str(report)]) == 2
    assert "may hold a fuller report: choose another --output" in capsys.readouterr().err
    assert (report / "filters.png").is_file()


def test_a_report_with_other_columns_is_replaced_and_a_foreign_table_is_not(kept: Path, report: Path) -> None:
    output = kept / "results_report"
    output.mkdir()
    (output / "results.csv").write_text("method,task,d\n")
    assert main(["report", str(kept / "results.csv")]) == 2
    (output / "report.html").write_text("<html>")
    assert main(["report", str(kept / "results.csv")]) == 0
    assert (output / "results.csv").read_bytes() == (report / "results.csv").read_bytes()


def test_key_figures_are_in_tensorboard(report: Path) -> None:
    tags = EventAccumulator(str(report)).Reload().Tags()["images"]
    assert {"study/accuracy", "study/final_accuracy", "study/exponent"} <= set(tags)


def test_report_of_the_same_runs_is_the_same(report: Path, finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(finished)
    assert main(["report", "lightning_logs/tiny", "--output", str(tmp_path / "again")]) == 0
    for name in ("report.html", "results.csv", "summary.md", "line.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (report / name).read_bytes(), name


def test_partial_study_names_what_is_missing(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    study = tmp_path / "tiny"
    shutil.copytree(finished / "lightning_logs" / "tiny", study)
    (study / "FO-AdaMM/ScalableCNN_1/seed_1/finished.yaml").unlink()
    shutil.rmtree(study / "FO-AdaMM/ScalableCNN_1/seed_2")
    (study / "ZO-AdaMM/ScalableCNN_1/seed_1/metrics.csv").write_text("epoch,val/loss\n")
    (study / "ZO-AdaMM/ScalableCNN_0.111111/seed_1/checkpoints/last.ckpt").write_bytes(b"half")
    snapshot = next((study / "ZO-AdaMM/ScalableCNN_0.111111/seed_1/snapshots").iterdir())
    snapshot.write_bytes(b"half")
    monkeypatch.chdir(finished)
    assert main(["report", str(study)]) == 0
    summary = (study / "report" / "summary.md").read_text()
    assert "FO-AdaMM, ScalableCNN 1, seed 1 (not finished)" in summary
    assert "FO-AdaMM, ScalableCNN 1, seed 2 (not begun)" in summary
    assert re.search(r"ZO-AdaMM, ScalableCNN 1, seed 1 \(damaged", summary)
    assert "5 of 8 cells are finished" in summary
    assert "Not drawn (exponent): an exponent needs two sizes" in summary
    assert (study / "report" / "accuracy.png").is_file()


def test_runs_that_diverged_are_named_and_leave_no_verdict(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    study = copied(finished, tmp_path)
    log = study / "ZO-AdaMM/ScalableCNN_1/seed_1/metrics.csv"
    table = pd.read_csv(log)
    table["val/loss"] = table["val/loss"].where(table["epoch"] < 2, np.inf)  # of the last epoch
    table.to_csv(log, index=False)
    snapshot = sorted((log.parent / "snapshots").iterdir())[-1]
    save_file({name: w * np.nan for name, w in load_file(snapshot).items()}, snapshot)
    monkeypatch.chdir(finished)
    assert main(["report", str(study)]) == 0
    summary = (study / "report" / "summary.md").read_text()
    assert "Diverged, so that means over seeds have no value: ZO-AdaMM, ScalableCNN 1, seed 1." in summary
    assert "ZO-AdaMM: none, since a loss is not finite after epoch 3" in summary
    assert "Diverged" in (study / "report" / "report.html").read_text()


def test_without_the_data_all_but_the_minima_is_drawn(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    study = copied(finished, tmp_path)
    for config in study.rglob("config.yaml"):
        text = yaml.safe_load(config.read_text())
        text["data"] = {"class_path": "MNIST", "init_args": {"root": str(tmp_path / "gone"), "download": True}}
        config.write_text(yaml.safe_dump(text))
    monkeypatch.chdir(finished)
    assert main(["report", str(study)]) == 0
    assert re.search(r"Not measured: .*gone' does not exist", (study / "report" / "summary.md").read_text())
    assert (study / "report" / "cosine_ZO-AdaMM.png").is_file()
    assert not (tmp_path / "gone").exists()


def test_somebodys_own_results_are_no_report(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(finished)
    assert main(["report", "lightning_logs/tiny", "--output", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_without_the_reference_curves_are_drawn_and_comparisons_are_not(
    finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    study = tmp_path / "tiny"
    shutil.copytree(finished / "lightning_logs" / "tiny", study)
    shutil.rmtree(study / "FO-AdaMM")
    monkeypatch.chdir(finished)
    assert main(["report", str(study)]) == 0
    summary = (study / "report" / "summary.md").read_text()
    assert "Not drawn (ratios): no finished run of FO-AdaMM" in summary
    assert (study / "report" / "accuracy.png").is_file()


def test_foreign_output_is_refused(finished: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    monkeypatch.chdir(finished)
    assert main(["report", "lightning_logs/tiny", "--output", str(tmp_path)]) == 2
    assert "holds something that is no report" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert main(["report", "lightning_logs/tiny", "--output", str(tmp_path / "thesis.txt")]) == 2


def test_what_came_out_is_said_first(report: Path) -> None:
    page, summary = (report / "report.html").read_text(), (report / "summary.md").read_text()
    assert page.index("What came out") < page.index("<nav>") < page.index("<table")
    assert summary.index("## What came out") < summary.index("| task |")
    verdict = r"\*\*(Yes|No|Undecided|Depends on d)\*\*"
    assert re.search(
        rf"- ZO-AdaMM ends less accurate than FO-AdaMM\. {verdict}: accuracy − FO-AdaMM's: [-+]0\.", summary
    )
    assert len(re.findall(verdict, summary)) == page.count('<b class="verdict') >= 5


@pytest.mark.parametrize("width", [1400, 400])
def test_page_in_a_browser(report: Path, width: int) -> None:
    """Every panel loads, is wide enough to be read and no wider than the page; the console stays silent."""
    driver = chromium()
    try:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get((report / "report.html").as_uri())
        loaded = driver.execute_script(
            "return [...document.images].map(i => i.complete && i.naturalWidth > 0 && i.offsetWidth >= 300)"
        )
        assert len(loaded) > len(FIGURES) and all(loaded)
        # Letters are of 8 points or more in the drawing, 10.7 pixels at its own size.
        shrunk = driver.execute_script("return Math.min(...[...document.images].map(i => i.width / i.naturalWidth))")
        assert shrunk * 10.7 >= 7.5
        assert driver.execute_script("return document.getElementById('claims').getBoundingClientRect().top") < 900
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert driver.get_log("browser") == []
        assert "tiny" in driver.title
    finally:
        driver.quit()


def chromium() -> Any:
    """A headless Chromium, or skip where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or browser is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-sync", "no-first-run", "window-size=1300,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def test_a_received_folder_is_data_and_no_code(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing that it names is imported before that is asked for, and what it is called is no markup."""
    study, evil = copied(finished, tmp_path), "<script>alert(1)</script>"
    text = yaml.safe_load((study / "study.yaml").read_text().replace("ZO-AdaMM", evil))
    (study / "study.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    (study / "ZO-AdaMM").rename(study / "script_alert_1_script")
    (tmp_path / "received.py").write_text(f"from pathlib import Path\nPath('{tmp_path / 'ran'}').touch()\n")
    for config in study.rglob("config.yaml"):
        text = yaml.safe_load(config.read_text())
        text["model"]["net"] = text["trainer"]["callbacks"] = {"class_path": "received.Thing"}
        config.write_text(yaml.safe_dump(text))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(study)]) == 0
    assert not (tmp_path / "ran").exists()
    page = (study / "report" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and evil not in page
    summary = (study / "report" / "summary.md").read_text()
    assert re.search(r"Not measured: .* names received\.Thing, which a report does not import .*--trust", summary)
    assert main(["report", str(study), "--trust"]) == 0
    assert (tmp_path / "ran").exists()


def test_weights_that_are_measured_may_be_deleted(
    finished: Path, report: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    shutil.copytree(finished, tmp_path / "finished")
    shutil.copytree(report, tmp_path / "made")
    for kind in ("snapshots", "checkpoints"):
        for folder in (tmp_path / "finished").rglob(kind):
            shutil.rmtree(folder)
    monkeypatch.chdir(tmp_path / "finished")
    assert main(["report", "lightning_logs/tiny", "--output", str(tmp_path / "made")]) == 0
    for name in ("similarity.csv", "line.csv", "sharpness.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "made" / name), pd.read_csv(report / name))
    assert "No run has its last weights" not in (tmp_path / "made" / "summary.md").read_text()
