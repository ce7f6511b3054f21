"""One page on a study: figures, tables and what they answer, from the folders of its runs or a table of them."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import yaml

from zo_lightning.study.answers import final_table
from zo_lightning.study.budget_report import sections_by_task, write_budget_files
from zo_lightning.study.claims import claims_of
from zo_lightning.study.figures import NothingToDraw
from zo_lightning.study.figures.panels import legend, split
from zo_lightning.study.folder import DECLARED, read_declaration, write_whole
from zo_lightning.study.grid import Study
from zo_lightning.study.minima import LINE, SHARPNESS, measure_minima
from zo_lightning.study.page import html, markdown
from zo_lightning.study.results import COLUMNS, Results, read_results, write_results
from zo_lightning.study.runs import Fit
from zo_lightning.study.runs_table import COLUMNS as BUDGET_COLUMNS
from zo_lightning.study.runs_table import TRIALS_FILE, read_runs
from zo_lightning.study.sections import Drawing, Section, minima_section, sections_of
from zo_lightning.study.tables import RESULTS, begins_with, read_table
from zo_lightning.study.weights import SIMILARITY, Progress, similarity
from zo_lightning.user_errors import UserError

PAGE = "report.html"
_MEASURED = {
    "similarity": (SIMILARITY, ("epoch", "layer")),
    "line": (LINE, ("position",)),
    "sharpness": (SHARPNESS, ()),
}
"""The tables of what is measured of weights: their columns, and which of them tell the rows of a run apart."""


def write_report(
    source: Path, output: Path, build: Fit, progress: Progress = lambda what: None, trusted: bool = False
) -> Path:
    """Write ``report.html`` (one self-contained file), figures as PNG and SVG, ``results.csv`` and ``summary.md``.

    The key figures go to TensorBoard as well. Nothing is trained; ``build`` makes the nets and the data of which the
    loss is evaluated, where their classes are ours or PyTorch's, or ``trusted``. What is missing in an unfinished study
    is named, and the rest is drawn. Weights take room, and may be deleted once a report has measured them: what
    ``output`` says of a finished run whose weights are gone stays. ``source`` is the folder of a study, or the
    ``results.csv`` of a report; what that report has measured of weights is taken from the tables beside it, and
    its declaration and its trials too. Figures of snapshots cannot be drawn then.

    Returns:
        The page.

    Raises:
        UserError: ``source`` holds no study with a finished cell, and no such table; what an earlier report has
            measured is damaged; or ``output`` holds something other than a report, or is the table's own folder.
    """
    if source.is_file() and output.resolve() == source.resolve().parent:
        raise UserError(f"'{output}' is the table's own folder, and may hold a fuller report: choose another --output")
    if _has_budgets(source):
        return _write_budget_report(source, output, progress)
    results = read_results(source)
    before = {name: _measured_before(source, output, name) for name in _MEASURED}
    _claim(output)
    similar = _with_earlier(similarity(results, progress), before["similarity"], results)
    try:
        (line, around), unmeasured = measure_minima(results, build, progress, trusted), ""
    except UserError as error:  # the runs' data are gone, or their code is not to be run; the rest needs neither
        line, around, unmeasured = pd.DataFrame(columns=list(LINE)), pd.DataFrame(columns=list(SHARPNESS)), str(error)
    line, around = (_with_earlier(new, before[name], results) for name, new in (("line", line), ("sharpness", around)))
    table, claims = final_table(results), claims_of(results, similar, around)
    sections = [*sections_of(results, similar), minima_section(results, line, around, unmeasured)]
    _write_declaration(results.study, output)
    write_results(results, output / RESULTS)
    for name, measured in (("similarity", similar), ("line", line), ("sharpness", around)):
        measured.to_csv(output / f"{name}.csv", index=False)
    with _tensorboard(output) as writer:
        _draw_all(sections, output, writer, progress)
    (output / "summary.md").write_text(markdown(results, claims, table, sections), encoding="utf-8")
    page = output / PAGE
    page.write_text(html(results, claims, table, sections), encoding="utf-8")
    return page


def _measured_before(source: Path, output: Path, name: str) -> pd.DataFrame | None:
    """What the report that is drawn again, or an earlier one of the same folder, has measured of weights."""
    if source.is_file() and source.name != RESULTS:
        return None
    file = (source.parent if source.is_file() else output) / f"{name}.csv"
    columns, keys = _MEASURED[name]
    if not file.is_file() or not begins_with(file, columns):
        return None
    try:
        return read_table(file, columns, ["method", "task", "seed", *keys])
    except UserError as error:
        raise UserError(f"{error}; without that file all is drawn that needs no weights that are gone") from error


def _with_earlier(measured: pd.DataFrame, earlier: pd.DataFrame | None, results: Results) -> pd.DataFrame:
    """What was measured, and what has been measured before of runs that now have no weights."""
    if earlier is None:
        return measured
    run = ["method", "task", "seed"]
    finished = {(cell.method, cell.task, cell.seed) for cell in results.cells}
    wanted = finished - set(measured[run].itertuples(index=False, name=None))
    kept = [key in wanted for key in earlier[run].itertuples(index=False, name=None)]
    if measured.empty:  # whose columns have no types
        return earlier.loc[kept].reset_index(drop=True)
    return pd.concat([measured, earlier.loc[kept]], ignore_index=True) if any(kept) else measured


def _write_declaration(study: Study, output: Path) -> None:
    write_whole(output / DECLARED, yaml.safe_dump(study.declaration(), sort_keys=False))


def _has_budgets(source: Path) -> bool:
    """Whether a study, or a table of one, is of runs with budgets.

    Raises:
        UserError: it is neither of them.
    """
    if not source.is_file():
        return bool(read_declaration(source).budgets)
    for columns, has_budgets in ((COLUMNS, False), (BUDGET_COLUMNS, True)):
        if begins_with(source, columns):
            return has_budgets
    raise UserError(
        f"'{source}' is no study's folder, and not the results.csv of a report, which begins with "
        f"'{','.join(COLUMNS)}' or, of runs with budgets, '{','.join(BUDGET_COLUMNS)}'"
    )


def _write_budget_report(source: Path, output: Path, progress: Progress) -> Path:
    runs = read_runs(source)
    _claim(output)
    sections, page = sections_by_task(runs), output / PAGE
    if source.is_file():  # of a folder they say what trials were that have been removed since
        for old in (DECLARED, TRIALS_FILE):
            (output / old).unlink(missing_ok=True)
    if runs.study is not None:
        _write_declaration(runs.study, output)
    _draw_all(sections, output, None, progress)
    write_budget_files(runs, sections, output, page)
    return page


def _draw_all(sections: list[Section], output: Path, writer: Any, progress: Progress) -> None:
    for drawing in (drawing for section in sections for drawing in section.figures):
        progress(f"figure {drawing.name}")
        _draw(drawing, output, writer)


def _draw(drawing: Drawing, output: Path, writer: Any) -> None:
    try:
        with matplotlib.rc_context({"svg.hashsalt": drawing.name}):
            figure = drawing.draw()
            svg = io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            figure.set_layout_engine("none")  # laid out once is enough
            figure.savefig(output / f"{drawing.name}.png", dpi=130)
            panels = split(figure)
            drawing.legend = legend(figure)
    except NothingToDraw as nothing:
        drawing.reason = str(nothing)
        for old in ("png", "svg"):  # of an earlier report
            (output / f"{drawing.name}.{old}").unlink(missing_ok=True)
        return
    (output / f"{drawing.name}.svg").write_bytes(svg.getvalue())
    drawing.panels = ["data:image/svg+xml;base64," + base64.b64encode(panel).decode() for panel in panels]
    if drawing.key and writer is not None:
        writer.add_figure(f"study/{drawing.name}", figure, close=False)


@contextmanager
def _tensorboard(output: Path) -> Iterator[Any]:
    from torch.utils.tensorboard import SummaryWriter

    for old in output.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(output))
    try:
        yield writer
    finally:
        writer.close()


def _claim(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"'{output}' is a file; the report needs a folder")
    if output.is_dir() and any(output.iterdir()) and not _is_report(output):
        raise UserError(f"'{output}' holds something that is no report: choose another --output")
    output.mkdir(parents=True, exist_ok=True)


def _is_report(output: Path) -> bool:
    table = output / RESULTS
    if not table.is_file():
        return False
    whole = None if not (output / PAGE).is_file() else 2  # with its page also one whose table has other columns since
    return any(begins_with(table, columns[:whole]) for columns in (COLUMNS, BUDGET_COLUMNS))
