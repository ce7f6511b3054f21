"""Adapt weights to three chips in each of the ways, and write table and figure.

python -m examples.noisy_hardware
python -m examples.noisy_hardware --smoke    # one chip, a quarter of the reads
"""

import argparse
from pathlib import Path

from matplotlib import pyplot as plt

from examples.noisy_hardware.methods import METHODS, READS, Job, train
from examples.results import Result, read, table, train_all


def draw(results: list[Result], file: Path) -> None:
    """A line from before to after for each device."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for k, result in enumerate(results):
        place = list(METHODS).index(result.method) + 0.15 * (result.seed % 3 - 1)
        axes.plot([result.before, result.after], [place, place], color="grey", zorder=1)
        axes.scatter(result.before, place, color="white", edgecolor="black", label="" if k else "before")
        axes.scatter(result.after, place, color="#0072B2", label="" if k else "after")
    axes.set_yticks(range(len(METHODS)), list(METHODS))
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy on the chip", xlim=(0, 1))
    axes.legend(loc="lower left")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Train on all devices, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/examples"), help="folder of table and figure")
    args = parser.parse_args()
    jobs = [Job(name, seed) for name in METHODS for seed in args.seeds]
    if args.smoke:
        jobs = [Job(name, 42, READS // 4) for name in METHODS]
    file = args.out / "noisy_hardware.csv"
    print(table(train_all(train, jobs, file, apart=not args.smoke)))
    draw(read(file), args.out / "noisy_hardware.png")


if __name__ == "__main__":
    main()
