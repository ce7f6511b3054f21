"""The report on runs with given budgets: what each method reaches for what it costs, and who wins where."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from zo_lightning.study.devices import unlike_devices
from zo_lightning.study.figures.budgets import COSTS, MEASURES, costs_of, measure_of, middle_of, reached_by_cost
from zo_lightning.study.figures.style import rows_of
from zo_lightning.study.grid import slug
from zo_lightning.study.page import cells_missing, missing_lines, rendered, section_lines, settings_of, table_lines
from zo_lightning.study.runs_table import TRIALS_FILE, Runs, write_runs
from zo_lightning.study.sections import Drawing, Section
from zo_lightning.study.statistics import Interval, mean_interval
from zo_lightning.study.tables import RESULTS

_FILES = "results.csv beside this page, a row per run"
_NOTE = (
    "Test accuracy of the last weights (of a regression: test loss), measured once, at the end; in brackets the 95 % "
    "interval of the mean over seeds (Student's t). Differences are paired by seed. A budget is in forward passes of "
    "128 examples, of which a step of backpropagation takes three."
)


def sections_by_task(runs: Runs) -> list[Section]:
    """A section for each task, and one on how learning rates were chosen, where they were."""
    sections = [
        Section(
            slug(task),
            f"{place}. {task}, d = {_d(runs, task)}",
            _in_words(runs, task),
            [
                Drawing(
                    f"budgets_{slug(task)}", partial(reached_by_cost, runs, task), _caption(runs, task), key=place == 1
                )
            ],
            _ranking(runs, task),
        )
        for place, task in enumerate(runs.tasks, 1)
    ]
    if not runs.trials.empty:
        sections.append(_chosen_rates(runs, len(sections) + 1))
    return sections


def write_budget_files(runs: Runs, sections: list[Section], output: Path, page: Path) -> None:
    """Write the page, whose figures are drawn, ``summary.md``, and the tables as CSV."""
    write_runs(runs, output / RESULTS)
    if not runs.trials.empty:
        runs.trials.to_csv(output / TRIALS_FILE, index=False)
    table = winners(runs)
    lines = [f"# Study {runs.name}", "", _overview(runs), "", *missing_lines(runs.missing)]
    lines += ["## Who wins where", "", *table_lines(table), "", _NOTE, ""]
    for section in sections:
        lines += section_lines(section)
    (output / "summary.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    page.write_text(
        rendered(
            name=runs.name,
            overview=_overview(runs),
            missing=cells_missing(runs.missing),
            sections=sections,
            table_title="Who wins where",
            table=table,
            table_note=_NOTE,
            settings={} if runs.study is None else settings_of(runs.study),
            files=_FILES + (f", and {TRIALS_FILE}" if not runs.trials.empty else ""),
        ),
        encoding="utf-8",
    )


def winners(runs: Runs) -> pd.DataFrame:
    """For each task and budget the best method, the best but the reference, and the difference between the two."""
    rows = []
    for task in runs.tasks:
        table = rows_of(runs.table, task=task)
        measure = measure_of(table)
        for budget, at in table.groupby("budget"):
            ranked = _ranked(at, measure)
            others = [method for method in ranked if method != runs.reference]
            first, other = ranked[0], others[0] if others else None
            known = other is not None and runs.reference in ranked
            behind = _difference(at, other, runs.reference, measure) if other is not None and known else None
            rows.append(
                {
                    "task": task,
                    "d": _d(runs, task),
                    "passes": f"{budget:,}",
                    "best": first,
                    MEASURES[measure]: _said(at, first, measure),
                    f"best but {runs.reference}": other or "–",
                    f"its {MEASURES[measure]}": "–" if other is None else _said(at, other, measure),
                    f"its lead on {runs.reference}": "–" if behind is None else f"{behind:+.4f}",
                }
            )
    return pd.DataFrame(rows).fillna("–")


def _ranking(runs: Runs, task: str) -> pd.DataFrame:
    """The methods at a task, by budget, the best first."""
    table, rows = rows_of(runs.table, task=task), []
    measure = measure_of(table)
    for budget, at in table.groupby("budget"):
        ranked = _ranked(at, measure)
        for place, method in enumerate(ranked, 1):
            own = rows_of(at, method=method)
            behind = _difference(at, method, ranked[0], measure)
            rows.append(
                {
                    "passes": f"{budget:,}",
                    "": place,
                    "method": method,
                    MEASURES[measure]: _said(at, method, measure),
                    f"{measure} − the best's": "–" if place == 1 or behind is None else f"{behind:+.4f}",
                    "seeds": len(own),
                    **({"test loss": f"{own['loss'].mean():.4g}"} if measure == "accuracy" else {}),
                    "TFLOP": f"{own['flops'].mean() / 1e12:.3g}" if own["flops"].notna().all() else "–",
                    **({"seconds": f"{own['seconds'].mean():.1f}"} if "seconds" in costs_of(table) else {}),
                    "lr": ", ".join(f"{lr:g}" for lr in sorted(set(own["lr"]))),
                    "device": ", ".join(sorted(set(own["device"]))),
                }
            )
    return pd.DataFrame(rows)


def _chosen_rates(runs: Runs, number: int) -> Section:
    rows, edges = [], []
    several = runs.trials["budget"].nunique() > 1
    for (task, method, budget), at in runs.trials.groupby(["task", "method", "budget"], sort=False):
        measure = measure_of(at)
        tried = "; ".join(
            f"{row.lr:g}: " + (f"{getattr(row, measure):.4g}" if np.isfinite(row.loss) else "diverged")
            for row in at.sort_values("lr").itertuples()
        )
        chosen = at[at["chosen"]]["lr"]
        best = float(chosen.iloc[0]) if len(chosen) else None
        if best in (at["lr"].min(), at["lr"].max()):
            edges.append(f"{method} at {task}" + (f", {budget:,} passes" if several else ""))
        rows.append(
            {
                "task": task,
                "method": method,
                "passes": f"{budget:,}",
                "lr": "–" if best is None else f"{best:g}",
                f"lr: {measure} on held-out data": tried,
            }
        )
    counts = runs.trials.groupby(["task", "method", "budget"]).size()
    every = len(runs.tasks) * len(runs.methods) * runs.trials["budget"].nunique()
    is_whole = len(counts) == every and counts.nunique() == 1
    said = "Each method had as many trials as the others" if is_whole else "Not all trials are here"
    if runs.study is not None and (trials := runs.study.trials) is not None:
        said += (
            f", of {' and '.join(f'{budget:,}' for budget in trials.budgets)} passes with seed {trials.seed}, "
            f"judged on {100 * trials.val_size:g} % of the training data, which they had not seen"
        )
        if several:
            said += "; a run goes by the longest trials within its own budget"
    edge = f" The best was the smallest or the largest that was tried: {'; '.join(edges)}." if edges else ""
    return Section(
        "rates", f"{number}. How learning rates were chosen", f"{said}.{edge}", [], pd.DataFrame(rows).fillna("–")
    )


def _in_words(runs: Runs, task: str) -> str:
    table, said = rows_of(runs.table, task=task), []
    measure = measure_of(table)
    for budget, at in table.groupby("budget"):
        ranked = _ranked(at, measure)
        best = ", then ".join(
            f"{method} {middle_of(rows_of(at, method=method), measure).value:.3f}" for method in ranked[:3]
        )
        said.append(f"{budget:,} passes: {best}")
    return f"{MEASURES[measure].capitalize()} after " + "; ".join(said) + "."


def _caption(runs: Runs, task: str) -> str:
    table = rows_of(runs.table, task=task)
    on = unlike_devices(table) or f"All runs are of one device, {table['device'].iloc[0]}."
    over = f"Mean and 95 % interval over seeds. {on}"
    what = MEASURES[measure_of(table)].capitalize()
    if table["budget"].nunique() == 1:
        return f"{what} of {task} after {table['budget'].iloc[0]:,} passes, and what that cost. {over}"
    against = ", ".join(COSTS[cost] for cost in costs_of(table))
    return f"{what} of {task} against {against}; each mark is a run of its own. {over}"


def _overview(runs: Runs) -> str:
    budgets, seeds = sorted(set(runs.table["budget"])), sorted(set(runs.table["seed"]))
    total = len(runs.table) + len(runs.missing)
    return (
        f"{len(runs.methods)} methods, {len(runs.tasks)} tasks, budgets of {', '.join(f'{b:,}' for b in budgets)} "
        f"forward passes of 128 examples, seeds {', '.join(map(str, seeds))}: {len(runs.table)} of {total} cells are "
        "finished. Each budget is a run of its own, whose learning rate decays to 0 until it is spent. Equal seeds "
        "have the same initialisation."
    )


def _ranked(table: pd.DataFrame, measure: str) -> list[str]:
    """The methods, the best first; those without a finite mean last."""
    means = table.groupby("method", sort=False)[measure].mean()
    return list(means.sort_values(ascending=measure == "loss", na_position="last", kind="stable").index)


def _difference(table: pd.DataFrame, method: str, other: str, measure: str) -> Interval | None:
    """How much more the one reaches than the other, over the seeds that both have."""
    by_seed = table.set_index(["method", "seed"])[measure]
    found = (by_seed.loc[method] - by_seed.loc[other]).dropna()
    return None if found.empty else mean_interval(found)


def _said(table: pd.DataFrame, method: str, measure: str) -> str:
    return f"{middle_of(rows_of(table, method=method), measure):.4f}"


def _d(runs: Runs, task: str) -> str:
    return f"{int(rows_of(runs.table, task=task)['d'].iloc[0]):,}"
