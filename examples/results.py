"""What the examples share: a training's cost, results kept in a file, and the table that is made of them.

    python -m examples.results docs/examples/*.csv

One table of all.
"""

import argparse
import csv
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing.pool import Pool
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple, TypeVar

from typing_extensions import Self

_Job = TypeVar("_Job")


class Result(NamedTuple):
    """One training, a row of a results file; numbers that were not measured are NaN.

    Attributes:
        example: the problem.
        method: what trained it.
        seed: of weights, data and directions.
        metric: what ``before`` and ``after`` are, on data that nothing was chosen on.
        before: of the model that the training began with.
        after: of the trained model.
        gflops: floating-point operations of all training steps, in 10⁹.
        peak_mb: of memory while training, above what the process held before, in 10⁶ bytes.
        seconds: of training.
    """

    example: str
    method: str
    seed: int
    metric: str
    before: float
    after: float
    gflops: float
    peak_mb: float
    seconds: float


class Cost:
    """Context of a training, in a process of its own: its seconds, and its peak of memory where the kernel tells it."""

    seconds = peak_mb = float("nan")

    def __enter__(self) -> Self:
        reset = Path("/proc/self/clear_refs")
        if reset.exists():  # Linux
            reset.write_text("5")
        self._start, self._began = _kilobytes("VmRSS"), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.peak_mb = (_kilobytes("VmHWM") - self._start) * 1024 / 1e6


def record(file: Path, result: Result) -> None:
    """Write a result into a file, in the place of an older one of the same example, method and seed."""
    kept = [one for one in read(file) if one[:3] != result[:3]] if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(Result._fields)
        for one in [*kept, result]:
            writer.writerow([f"{value:.5g}" if isinstance(value, float) else value for value in one])


def train_all(train: Callable[[_Job], Result], jobs: Sequence[_Job], file: Path, apart: bool = True) -> list[Result]:
    """Do one training after the other, each in a process of its own if ``apart``; the results are in the file, too."""
    results = []
    with _processes(train) if apart else nullcontext() as pool:
        for result in pool.imap(train, jobs) if pool else map(train, jobs):
            record(file, result)
            print(table([result]).splitlines()[-1], flush=True)
            results.append(result)
    return results


def _processes(train: Callable[..., Result]) -> Pool:
    """One process after the other, with the libraries loaded beforehand where the system can fork."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    module = sys.modules[train.__module__].__spec__
    if forks and module:
        context.set_forkserver_preload([module.name])
    return context.Pool(1, maxtasksperchild=1)


def read(file: Path) -> list[Result]:
    """The results of a file, in its order."""
    kinds = Result.__annotations__
    with file.open(newline="", encoding="utf-8") as rows:
        return [Result(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(rows)]


def table(results: list[Result]) -> str:
    """A row for each method in Markdown: mean and standard deviation over seeds, and mean costs."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.example, result.method), []).append(result)
    lines = ["| problem | method | metric | before | after | seeds | GFLOP | peak MB | seconds |", "|---" * 9 + "|"]
    for (example, method), rows in groups.items():
        before, after = ([getattr(row, name) for row in rows] for name in ("before", "after"))
        spread = f" ± {stdev(after):.3f}" if len(after) > 1 else ""
        costs = " | ".join(_short(mean(getattr(row, name) for row in rows)) for name in Result._fields[6:])
        scores = f"{mean(before):.3f} | {mean(after):.3f}{spread}"
        lines.append(f"| {example} | {method} | {rows[0].metric} | {scores} | {len(rows)} | {costs} |")
    return "\n".join(lines)


def _short(number: float) -> str:
    return "–" if number != number else f"{number:,.{0 if number >= 10 else 1}f}"


def _kilobytes(field: str) -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) for line in lines if line.startswith(field)), float("nan"))


def main() -> None:
    """Print the table of some files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="results that the examples have written")
    print(table([result for file in parser.parse_args().files for result in read(file)]))


if __name__ == "__main__":
    main()
