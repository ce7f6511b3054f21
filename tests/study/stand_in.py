"""A study that trains nothing: each of its runs does what its method says."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from pytorch_lightning.utilities.exceptions import SIGTERMException

from zo_lightning.study.grid import Method, Study
from zo_lightning.study.runs import run_cells


def fake_fit(words: Sequence[str]) -> Any:
    """Do what the last overlay's model says, and note it in the run's folder."""
    settings: dict[str, Any] = {}
    for file in (word for flag, word in zip(words, words[1:], strict=False) if flag == "-c"):
        settings |= yaml.safe_load(Path(file).read_text()).get("model", {})
    run = Path(words[words.index("-c") + 1]).parents[1]
    print("said by the run")
    (run / "pid").write_text(str(os.getpid()))
    (run / "metrics.csv").write_text("" if settings["do"] == "nothing" else "epoch\n0\n")
    if settings["do"] == "raise":
        raise ValueError("no such luck")
    if settings["do"] == "exit":
        raise SystemExit(1)
    if settings["do"] == "stop":  # Lightning's answer to Ctrl-C
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904
    if settings["do"] == "terminate":
        raise SIGTERMException
    if settings["do"] == "die":
        time.sleep(0.5)
        os._exit(9)
    if settings["do"] == "wait":
        time.sleep(2)
    module = SimpleNamespace(parameters=lambda: iter([torch.zeros(3, requires_grad=True), torch.zeros(2)]))
    return SimpleNamespace(
        interrupted=settings["do"] == "interrupt",
        lightning_module=module,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def study(*seeds: int, options: tuple[str, ...] = (), **methods: str) -> Study:
    made = {name: Method(({"model": {"do": what}},), {}) for name, what in methods.items()}
    return Study("fake", (), made, {"SmallCNN": ({},)}, seeds, next(iter(made)), options=options)


def run(declared: Study, folder: Path, **settings: Any) -> dict[str, str | None]:
    return {str(outcome.cell): outcome.error for outcome in run_cells(declared, folder, fake_fit, **settings)}
