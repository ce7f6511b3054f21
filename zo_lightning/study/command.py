"""The subcommands ``study`` and ``report``."""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from zo_lightning.presets import find
from zo_lightning.study.declared import read_study
from zo_lightning.study.folder import claim, is_finished, seconds_of
from zo_lightning.study.grid import Cell, Study
from zo_lightning.user_errors import CommandParser, UserError
from zo_lightning.words import OTHERS

if TYPE_CHECKING:
    from zo_lightning.study.runs import Fit, Outcome

LOGS = Path("lightning_logs")


def study(words: list[str], fit: "Fit") -> int:
    """Run the command line of ``study``; return its exit code: 0, 1 where a cell failed, 130 where it was stopped.

    Raises:
        UserError: the command line or the study's file is wrong; nothing has been written.
    """
    options, rest = _study_parser().parse_known_args(words)
    declared = read_study(find(options.config), _fit_options(rest))
    jobs = options.jobs or os.cpu_count() or 1
    folder = LOGS / declared.name
    from zo_lightning.study.plan import check, estimate  # slow to import
    from zo_lightning.study.runs import run_cells

    sizes = check(declared, fit)
    if options.dry_run:
        _print_plan(declared, folder, sizes, estimate(declared, sizes, fit), jobs)
        return 0
    claim(declared, folder)
    cells = [*declared.trial_cells(), *declared.cells()]
    progress = _Progress(cells, folder, jobs)
    try:
        with progress:
            outcomes = run_cells(
                declared,
                folder,
                fit,
                jobs=jobs,
                threads=options.threads,
                backend=options.backend,
                address=options.address,
                report=progress.report,
            )
    except KeyboardInterrupt:
        done = sum(is_finished(folder, cell) for cell in cells)
        print(f"\nStopped: {done} of {len(cells)} cells are finished; the same command goes on.", file=sys.stderr)
        return 130
    return _print_outcomes(outcomes, folder, len(cells))


def report(words: list[str], fit: "Fit") -> int:
    """Run the command line of ``report``; return its exit code. ``fit`` is asked for 0 epochs: it builds nets and data.

    Raises:
        UserError: there is nothing to report on.
    """
    parser = CommandParser(prog="zo-lightning report", description=OTHERS["report"].capitalize() + ".")
    parser.add_argument(
        "folder", type=Path, help="a study's folder, such as lightning_logs/smoke, or a report's results.csv"
    )
    parser.add_argument(
        "--output", type=Path, help="where the report is written; default: <folder>/report, or <file>_report"
    )
    parser.add_argument("--trust", action="store_true", help="import the classes that the runs' configurations name")
    options = parser.parse_args(words)
    from zo_lightning.study.report import write_report

    output = options.output or _beside(options.folder)
    page = write_report(options.folder, output, fit, _say, options.trust)
    print(f"The report is {page}")
    return 0


def _beside(source: Path) -> Path:
    return source.with_name(f"{source.stem}_report") if source.is_file() else source / "report"


def _say(what: str) -> None:
    """Show what is being done, in one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="\r", file=sys.stderr, flush=True)


def _study_parser() -> CommandParser:
    parser = CommandParser(
        prog="zo-lightning study",
        description=OTHERS["study"].capitalize() + ".",
        epilog="Further options, such as --data.root data, are given to every run as they would be to `fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", required=True, help="the study: a file, or study/smoke and the like")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and estimate the time; train nothing")
    parser.add_argument("--jobs", type=_positive, help="cells at a time; default: as many as there are cores")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of each; default 1")
    parser.add_argument("--backend", choices=("loky", "dask", "ray"), default="loky", help="joblib's; default loky")
    parser.add_argument("--address", help="of a Dask scheduler or a Ray cluster; default: a local one is started")
    return parser


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{word}'")
    return int(word)


def _fit_options(words: list[str]) -> tuple[str, ...]:
    sections = ("--model", "--data", "--trainer", "--checkpoint", "--last_checkpoint", "--progress_bar")
    for position, word in enumerate(words):
        is_value = position > 0 and words[position - 1].startswith("--") and "=" not in words[position - 1]
        if not (word.split("=")[0].split(".")[0] in sections or (is_value and not word.startswith("--"))):
            raise UserError(f"unknown argument '{word}'; see zo-lightning study --help")
    return tuple(words)


def _print_plan(study: Study, folder: Path, sizes: dict[str, int], seconds: dict[Cell, float], jobs: int) -> None:
    cells = [*study.trial_cells(), *study.cells()]
    done = [cell for cell in cells if is_finished(folder, cell)]
    for cell in cells:
        state = "finished" if cell in done else f"about {duration(seconds[cell])}"
        print(f"{folder / cell.folder}  d = {sizes[cell.task]:,}  {state}")
    left = sum(seconds[cell] for cell in cells if cell not in done)
    print(f"{len(cells)} cells, {len(done)} of them finished; the others take about {duration(left / jobs)}", end=" ")
    print(f"with {jobs} at a time (estimated from a few steps of each method).")


class _Progress:
    """A bar over cells, with the time left by how long the like of them took; where no terminal is, a line per cell."""

    def __init__(self, cells: list[Cell], folder: Path, jobs: int) -> None:
        self.left: dict[Path, Cell] = {}
        self.jobs = jobs
        self.seconds: dict[tuple[str, str, int | None], list[float]] = defaultdict(list)
        for cell in cells:
            if (seconds := seconds_of(folder, cell)) is None:
                self.left[cell.folder] = cell
            else:
                self.seconds[cell.method, cell.task, cell.budget].append(seconds)
        self.total = len(cells)

    def __enter__(self) -> "_Progress":
        from tqdm import tqdm

        form = "{n_fmt}/{total_fmt} cells |{bar}| {elapsed} so far{postfix}"
        done = self.total - len(self.left)
        self.bar = tqdm(total=self.total, initial=done, bar_format=form, unit="cell", disable=None)
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def report(self, outcome: "Outcome") -> None:
        """Count a cell."""
        cell = outcome.cell
        self.left.pop(cell.folder, None)
        if outcome.error is None:
            self.seconds[cell.method, cell.task, cell.budget].append(outcome.seconds)
        else:
            self.bar.write(f"failed: {cell}: {outcome.error}", file=sys.stderr)
        left = f"about {duration(self._seconds_left())} left"
        if self.bar.disable:
            done = self.total - len(self.left)
            print(f"{done} of {self.total} cells: {cell}, {duration(outcome.seconds)}; {left}", file=sys.stderr)
        self.bar.set_postfix_str(left, refresh=False)
        self.bar.update()

    def _seconds_left(self) -> float:
        means = {key: fmean(values) for key, values in self.seconds.items()}
        overall = fmean(means.values()) if means else 0.0
        return sum(means.get((cell.method, cell.task, cell.budget), overall) for cell in self.left.values()) / self.jobs


def _print_outcomes(outcomes: "list[Outcome]", folder: Path, total: int) -> int:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    print(f"{total - len(failed)} of {total} cells are finished; the report: zo-lightning report {folder}")
    for outcome in failed:
        print(f"zo-lightning: error: {outcome.cell}: {outcome.error}", file=sys.stderr)
        print(f"  the whole of it: {folder / outcome.cell.folder / 'error.txt'}", file=sys.stderr)
    return 1 if failed else 0


def duration(seconds: float) -> str:
    """A time to read: ``"45 s"``, ``"12 min"``, ``"3 h 20 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
