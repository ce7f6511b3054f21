"""Settings of two examples, tried once each with seed 0 on images that are held out of the training set.

python -m examples.search quantised_net --root data
python -m examples.search noisy_hardware
"""

import argparse
from pathlib import Path

from examples import quantised_net
from examples.noisy_hardware import methods as noisy_hardware
from examples.results import table, train_all

STEP = quantised_net.STEP
RATES = [{"lr": lr} for lr in (1e-4, 3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 1.5e-2, 2e-2, 3e-2)]
QUANTISED = {
    "backpropagation, straight through weights": RATES,
    "backpropagation, straight through all": RATES,
    "PerExample": [
        *({"mu": mu} for mu in (0.003, 0.03, 0.1, 0.3, 1, 3)),
        *({"mu": 1, "lr": lr} for lr in (2.5e-3, 1e-2, 2e-2)),
    ],
    "ZerothOrder": [
        *({"mu": STEP * 4.0**k} for k in (-2, -1, 0, 1, 2, 3)),
        *({"mu": STEP * 4, "lr": lr} for lr in (5e-3, 2e-2, 4e-2)),
    ],
}
STEPS = {"PerExample": 155, "ZerothOrder": 300}
RATES_ON_CHIP = [{"lr": lr} for lr in (1e-5, 1e-4, 1e-3)]
NOISY = {
    "ideal gradient, clipping unknown": RATES_ON_CHIP,
    "ideal gradient": RATES_ON_CHIP,
    "ideal gradient, logits alone are read": RATES_ON_CHIP,
    "ZerothOrder": [{"lr": 1e-2, "mu": 0.1}, {"lr": 2e-2, "mu": 0.1}, {"lr": 1e-2, "mu": 0.3}],
}


def main() -> None:
    """Write ``search/<example>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=["quantised_net", "noisy_hardware"])
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of MNIST")
    parser.add_argument("--out", type=Path, default=Path("docs/examples"))
    args = parser.parse_args()
    file = args.out / "search" / f"{args.example}.csv"
    if args.example == "quantised_net":
        jobs = [
            quantised_net.Job(name, 0, args.root, STEPS.get(name, 311), settings)
            for name, tried in QUANTISED.items()
            for settings in tried
        ]
        results = train_all(quantised_net.train, jobs, file, apart=False)
    else:
        chips = [noisy_hardware.Job(name, 0, settings=settings) for name, tried in NOISY.items() for settings in tried]
        results = train_all(noisy_hardware.train, chips, file, apart=False)
    print(table(results))


if __name__ == "__main__":
    main()
