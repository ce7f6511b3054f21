"""Reports as text: the parts of any page, and the page and the summary on a study of training curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from zo_lightning.study.claims import Claim
from zo_lightning.study.grid import Cell, Study
from zo_lightning.study.results import Results
from zo_lightning.study.sections import Section

_TEMPLATE = Path(__file__).with_name("page.html")
_FILES = "results.csv beside this page, and similarity.csv, line.csv, sharpness.csv, declaration.yaml"
_TABLE_NOTE = (
    "Means over seeds with their 95 % confidence interval (Student's t) in brackets. The difference to the reference "
    "is paired by seed."
)
_CLAIMS_NOTE = (
    "In brackets: 95 % intervals over seeds, paired by seed, each for itself. "
    "A claim is undecided where its intervals leave more than one answer."
)
_NAMED = 12  # missing cells in the summary; the page lists all
_PUBLISHED_NOTE = " Published: mean of 10 runs, after the same epoch."


def html(results: Results, claims: list[Claim], table: pd.DataFrame, sections: list[Section]) -> str:
    """The page, whose figures are drawn: one file that needs no other."""
    return rendered(
        name=results.study.name,
        overview=_overview(results),
        claims=claims,
        claims_note=_CLAIMS_NOTE,
        diverged=_diverged(results) if results.diverged else "",
        missing=cells_missing(results.missing),
        sections=sections,
        table_title="After the last epoch",
        table=table,
        table_note=_table_note(results),
        settings=settings_of(results.study),
        files=_FILES,
    )


def rendered(**parts: Any) -> str:
    """The page of which these are the parts; tables are data frames."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True)
    environment.filters["table"] = lambda frame: Markup(frame.to_html(index=False, border=0))
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(**parts)


def settings_of(study: Study) -> dict[str, str]:
    """The configuration of each method, as YAML."""
    return {
        name: yaml.safe_dump_all([*method.overlays, *({"at": task, **o} for task, o in method.by_task.items())])
        for name, method in study.methods.items()
        if method.overlays or method.by_task
    }


def table_lines(table: pd.DataFrame) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]


def section_lines(section: Section) -> list[str]:
    """A section in Markdown, whose figures lie beside it as PNG."""
    lines = [f"## {section.title}", "", section.answer, ""]
    if section.table is not None:
        lines += [*table_lines(section.table), ""]
    lines += [f"![{one.caption}]({one.name}.png)" for one in section.figures if one.panels] + [""]
    return lines + [f"Not drawn ({one.name}): {one.reason}." for one in section.figures if one.reason]


def cells_missing(missing: Mapping[Cell, str]) -> list[str]:
    """Which cells have no run, and why."""
    return [f"{cell} ({reason})" for cell, reason in missing.items()]


def missing_lines(missing: Mapping[Cell, str]) -> list[str]:
    """The first cells without a run in Markdown, and how many more there are."""
    named = cells_missing(missing)
    more = f"; and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return ["Missing cells: " + "; ".join(named[:_NAMED]) + more + ".", ""] if named else []


def markdown(results: Results, claims: list[Claim], table: pd.DataFrame, sections: list[Section]) -> str:
    """The summary, which shows the figures that lie beside it as PNG."""
    lines = [f"# Study {results.study.name}", "", _overview(results), ""]
    if claims:
        lines += ["## What came out", ""]
        lines += [f"- {claim.sentence} **{claim.verdict.capitalize()}**: {claim.numbers}." for claim in claims]
        lines += ["", _CLAIMS_NOTE, ""]
    if results.diverged:
        lines += [_diverged(results), ""]
    lines += missing_lines(results.missing)
    lines += [*table_lines(table), "", _table_note(results), ""]
    for section in sections:
        lines += section_lines(section)
    return "\n".join(lines).rstrip() + "\n"


def _overview(results: Results) -> str:
    total, done = len(results.study.cells()), len(results.cells)
    return (
        f"{len(results.methods)} methods ({', '.join(results.methods)}), {len(results.tasks)} sizes, "
        f"{len(results.study.seeds)} seeds: {done} of {total} cells are finished. Methods are compared with "
        f"{results.study.reference}, at the same seed: the same initialisation and the same batches."
    )


def _table_note(results: Results) -> str:
    return _TABLE_NOTE if results.published is None else _TABLE_NOTE + _PUBLISHED_NOTE


def _diverged(results: Results) -> str:
    """Which runs ended without a finite loss; means over their seeds are not drawn or NaN."""
    return f"Diverged, so that means over seeds have no value: {'; '.join(map(str, results.diverged))}."
