"""The adapter, the map, and both, on files that training has not seen."""

from math import nan
from pathlib import Path

import numpy as np
import torch
from torch import nn

from examples.results import Cost, Result
from examples.somebody_elses_model.listings import Listing, installed, listings
from examples.somebody_elses_model.ours import TextBegins, characters, train_adapter, train_map
from examples.somebody_elses_model.theirs import GFLOP, probabilities, types_of
from zo_lightning.costs import count_flops

KNOWN = {"py": "python", "json": "json", "js": "javascript", "md": "markdown", "css": "css", "csv": "csv"}
NEW = {"rst": "rst", "c": "c", "toml": "toml", "f90": "fortran", "cmake": "cmake", "xml": "xml"}  # for the test alone


@torch.no_grad()
def answers(listings: list[Listing], adapter: nn.Module) -> np.ndarray:
    return probabilities(listings, adapter(characters(listings)).numpy())


@torch.no_grad()
def accuracy(listings: list[Listing], adapter: nn.Module, behind: nn.Module) -> float:
    logits = behind(torch.from_numpy(answers(listings, adapter)).clamp_min(1e-6).log())
    return float((logits.argmax(1) == torch.tensor(types_of(listings))).float().mean())


def train(method: str, seed: int, root: Path, smoke: bool) -> list[Result]:
    """Train in front of the model or behind it with the known types, and test with them and with others."""
    torch.set_num_threads(1)
    files, steps = installed({*KNOWN, *NEW}, 8 if smoke else 60, seed), 5 if smoke else 40
    known, adapter, gflops = listings(files, KNOWN, 0, seed), TextBegins(), 0.0
    tests = {"types in training": listings(files, KNOWN, 1, seed), "other types": listings(files, NEW, 1, seed)}
    begin = {name: accuracy(test, adapter, nn.Identity()) for name, test in tests.items()}

    def tested(method: str, behind: nn.Module, *costs: float) -> list[Result]:
        after = {name: accuracy(test, adapter, behind) for name, test in tests.items()}
        return [Result(name, method, seed, "accuracy", begin[name], after[name], *costs) for name in tests]

    if method == "files alone":
        tests = {
            name: listings(files, types, 1, seed, ("nothing",)) for name, types in zip(tests, (KNOWN, NEW), strict=True)
        }
        return tested(method, nn.Identity(), nan, nan, nan)
    if method == "map behind":
        with Cost() as cost:
            linear, gflops = train_map(answers(known, adapter), types_of(known))
        return tested(method, linear, gflops + len(known) * GFLOP, cost.peak_mb, cost.seconds)
    with Cost() as cost:
        adapter = train_adapter(known, seed, steps)
    gflops = 9 * steps * (12 * GFLOP + count_flops(lambda: adapter(characters(known[:12]))) / 1e9)
    results = tested(method, nn.Identity(), gflops, cost.peak_mb, cost.seconds)
    with Cost() as more:
        linear, spent = train_map(answers(known, adapter), types_of(known))
    costs = gflops + spent + len(known) * GFLOP, max(cost.peak_mb, more.peak_mb), cost.seconds + more.seconds
    return results + tested("adapter and map", linear, *costs)
