"""``zo-lightning report``: the page, its figures and the measures behind them."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from zo_lightning.__main__ import main
from zo_lightning.cli_errors import UserError
from zo_lightning.study import figures
from zo_lightning.study.figures import NothingToDraw
from zo_lightning.study.minima import line_between, sharpness
from zo_lightning.study.report import _sections, final_table
from zo_lightning.study.results import Results, published, published_at, read_results
from zo_lightning.study.weights import embed, first_filters, similarity, trajectories

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
    assert page.count('<img src="data:image/svg+xml;base64,') == len(FIGURES)
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


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "lightning_logs" / "tiny", tmp_path / "tiny"))


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


def drawn(results: Results, with_published: bool) -> Iterator[Figure]:
    if with_published:
        results = Results(results.study, results.folder, results.table, {}, published())
    for quantity in ("val_accuracy", "train_loss", "val_loss"):
        for against in ("epoch", "forward_passes", "flops", "seconds"):
            yield figures.learning_curves(results, quantity, against)
    for draw in ("loss_ratios", "slowdown", "slowdown_exponent", "final_accuracy", "epoch_time"):
        yield getattr(figures, draw)(results)


@pytest.mark.parametrize("with_published", [False, True])
def test_axes_have_names_and_methods_are_told_apart(results: Results, with_published: bool) -> None:
    for figure in drawn(results, with_published):
        shared = [text.get_text() for text in figure.texts]  # labels of all panels together
        for axes in filter(lambda a: a.get_visible(), figure.axes):
            place = axes.get_subplotspec()
            assert shared or axes.get_xlabel() or (place is not None and not place.is_last_row())
            assert axes.lines
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        named = {text.get_text() for legend in legends for text in legend.get_texts()}
        assert any("ZO-AdaMM" in name or name.startswith("d = ") for name in named)


def test_runs_that_counted_no_operations_are_compared_by_forward_passes(results: Results) -> None:
    older = Results(results.study, results.folder, results.table.assign(flops=np.nan), {}, None)
    for of, cost in ((results, "flops"), (older, "forward_passes")):
        budget = next(section for section in _sections(of, similarity(of)) if section.anchor == "budget")
        assert [drawing.name for drawing in budget.figures if drawing.key] == [f"val_accuracy_by_{cost}"]
    assert set(final_table(older)["TFLOP"]) == {"–"}
    assert all(float(value) > 0 for value in final_table(results)["TFLOP"])


def test_published_curves_are_drawn_at_their_size_only(results: Results) -> None:
    beside = Results(results.study, results.folder, results.table, {}, published())
    first, second = figures.learning_curves(beside, "val_accuracy").axes[:2]
    theirs = published_at(beside, "ZO-AdaMM", 1400)
    assert any(np.array_equal(line.get_ydata(), theirs["val_accuracy_mean"]) for line in first.lines)
    assert len(second.lines) == 2  # 10,602 is none of their sizes
    assert theirs["epoch"].tolist() == [1, 2, 3]  # no longer than the study's own runs


def test_published_table_is_whole() -> None:
    table = published()
    assert set(table["method"]) == {"FO-AdaMM", "ZO-AdaMM"}
    assert table.groupby(["method", "d"]).size().tolist() == [50] * 22
    last = table[(table["method"] == "ZO-AdaMM") & (table["d"] == 1400) & (table["epoch"] == 50)]
    assert last["val_accuracy_mean"].item() == pytest.approx(0.8054, abs=5e-4)
    assert table.notna().all(axis=None)


def test_similarity_begins_with_the_same_weights(results: Results) -> None:
    similar = similarity(results)
    start = similar[similar["epoch"] == 0]
    assert start["cosine"].to_numpy() == pytest.approx(np.ones(len(start)))
    assert start["l2"].to_numpy() == pytest.approx(np.zeros(len(start)))
    later = similar[similar["epoch"] == 3]
    assert (later["l2"] > 0).all()
    assert set(later["layer"]) == {"all", "conv1", "conv2", "fc1", "fc2", "fc3"}
    convolutions = later.dropna(subset=["matched"])
    assert set(convolutions["layer"]) == {"conv1", "conv2"}
    assert (convolutions["matched"] >= convolutions["cosine"] - 1e-9).all()


def test_trajectories_and_filters(results: Results) -> None:
    paths = trajectories(results, "ScalableCNN 1", 1)
    shapes = {layer: table.shape for layer, table in paths.items()}
    assert shapes == {"conv1": (2 * 4 * 3, 3 + 25), "conv2": (2 * 4 * 3, 3 + 27)}
    assert {method: f.shape for method, f in first_filters(results, "ScalableCNN 1", 1).items()} == {
        "FO-AdaMM": (3, 1, 5, 5),
        "ZO-AdaMM": (3, 1, 5, 5),
    }
    assert trajectories(results, "ScalableCNN 1", 99) == {}


def test_embedding_separates_and_is_reproducible() -> None:
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(0, 0.1, (20, 9)), rng.normal(5, 0.1, (20, 9))])
    placed = embed(two)
    assert np.array_equal(placed, embed(two))
    halves = np.split(placed, 2)
    centres = [half.mean(0) for half in halves]
    widest = max(np.linalg.norm(half - centre, axis=1).max() for half, centre in zip(halves, centres, strict=True))
    assert np.linalg.norm(centres[0] - centres[1]) > widest
    assert np.isnan(embed(two[:3])).all()
    assert np.isnan(embed(np.ones((10, 4)))).all()


def quadratic(weights: dict[str, Tensor]) -> tuple[float, float]:
    return float(0.5 * weights["w"].square().sum()), float(weights["w"].sum())


def test_line_passes_through_both_ends() -> None:
    a, b = {"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)}
    points = line_between(a, b, quadratic, np.array([-0.5, 0.0, 0.5, 1.0]))
    assert points == [(-0.5, 0.5, -2.0), (0.0, 0.0, 0.0), (0.5, 0.5, 2.0), (1.0, 2.0, 4.0)]


def test_sharpness_of_a_quadratic() -> None:
    """½‖w + σ‖w_f‖ ξ‖² rises by ½ σ² Σ‖w_f‖² and a term of mean zero, σ Σ ‖w_f‖ <w_f, ξ_f>."""
    weights = {"w": torch.randn(8, 100, generator=torch.Generator().manual_seed(0)), "bias": torch.ones(8)}
    at, rise = sharpness(weights, quadratic, noise=0.1, samples=200)
    squares = weights["w"].square().sum(1)
    assert at == pytest.approx(float(squares.sum()) / 2)
    # <w_f, ξ_f> = ‖w_f‖ cos with E cos² = 1/100: the standard error of the mean over 200 samples
    error = 0.1 * float(squares.square().sum().sqrt()) / 10 / np.sqrt(200)
    assert rise == pytest.approx(0.005 * float(squares.sum()), abs=4 * error)
    assert sharpness(weights, quadratic) == sharpness(weights, quadratic)


def test_nothing_to_draw_says_why(results: Results) -> None:
    empty = pd.DataFrame(columns=["method", "net", "d", "seed", "epoch", "layer", "cosine", "matched", "increase"])
    for draw in (
        lambda: figures.weight_similarity(results, empty, "cosine", "ZO-AdaMM"),
        lambda: figures.matched_similarity(results, empty, "ZO-AdaMM"),
        lambda: figures.filter_trajectories(results, "conv1", 99),
        lambda: figures.first_layer(results, 99),
        lambda: figures.minima_line(results, empty, "loss"),
        lambda: figures.sharpness_by_size(results, empty),
    ):
        with pytest.raises(NothingToDraw, match="no "):
            draw()


def test_damaged_study_is_told(finished: Path, tmp_path: Path) -> None:
    study = tmp_path / "tiny"
    shutil.copytree(finished / "lightning_logs" / "tiny", study)
    text = yaml.safe_load((study / "study.yaml").read_text())
    del text["methods"]
    (study / "study.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match=r"study.yaml' is damaged: KeyError\('methods'\)"):
        read_results(study)


def test_page_in_a_browser(report: Path) -> None:
    """Every figure loads, nothing is wider than the page, and the console stays silent."""
    driver = chromium()
    try:
        driver.get((report / "report.html").as_uri())
        loaded = driver.execute_script(
            "return [...document.images].map(i => i.complete && i.naturalWidth > 0 && i.offsetWidth > 100)"
        )
        assert loaded == [True] * len(FIGURES)
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
