"""Runs of the command line in processes of their own, forked from one that has imported everything; some are killed."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tests.callbacks.test_last_checkpoint import same
from zo_lightning.__main__ import main
from zo_lightning.checkpoint_io import load_checked

_SERVER = multiprocessing.get_context("forkserver")
_PRELOADED = ["zo_lightning.cli", "sklearn.datasets", "torch.utils.tensorboard", "tests.faults.runs"]
_SERVER.set_forkserver_preload([*_PRELOADED, "pytorch_lightning", "zo_lightning.modules", "zo_lightning.callbacks"])

ASKED = "asked.txt"
TIMES = ("seconds", "per_second", "train/step_ms")
"""Parts of the names of metrics that are times: no two runs have the same."""


_tells: Any = None
"""In a process of ``run``: is set when training begins."""


class Began(Callback):
    """Tells the process that waits that training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _tells is not None:
            _tells.set()


class Asked(Callback):
    """Counts the forward passes of the net while it trains."""

    passes = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.net.register_forward_hook(self._count)  # type: ignore[union-attr,operator]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path(ASKED).write_text(str(self.passes))

    def _count(self, net: nn.Module, *_: Any) -> None:
        self.passes += net.training


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; negative, the signal that killed it.
        said: on both of its streams.
        seconds: that it has trained.
    """

    code: int
    said: str
    seconds: float


def run(folder: Path, words: str, kill_after: float | None = None, timeout: float = 300) -> Ended:
    """Run ``zo-lightning`` in a folder; kill it so many seconds after training has begun."""
    began, end = _SERVER.Event(), time.monotonic() + timeout
    with tempfile.NamedTemporaryFile("r", errors="replace") as said:
        process = _SERVER.Process(target=_main, args=(folder, words, said.name, began))
        process.start()
        while process.is_alive() and not began.wait(0.01) and time.monotonic() < end:
            pass
        begin = time.monotonic()
        process.join(max(0.0, end - begin) if kill_after is None else kill_after)
        seconds = time.monotonic() - begin
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert kill_after is not None, f"'{words}' did not end within {timeout} s: {said.read()}"
        assert process.exitcode is not None
        return Ended(process.exitcode, said.read(), seconds)


def _main(folder: Path, words: str, said: str, began: Any) -> None:
    global _tells
    _tells = began
    torch.set_num_threads(1)
    os.chdir(folder)
    with Path(said).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["zo-lightning"]
    code = main(words.split())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # multiprocessing would wait for a study's idle workers


def assert_ended_alike(a: Path, b: Path) -> None:
    """Two folders of runs hold the same weights and buffers, the same state, and the same curves of both kinds."""
    ends: list[Any] = [load_checked(folder / "checkpoints" / "last.ckpt") for folder in (a, b)]
    for key in ("state_dict", "global_step", "epoch", "optimizer_states", "lr_schedulers", "estimated_gradient"):
        assert same(ends[0][key], ends[1][key]), key
    assert curves(a) == curves(b)
    table, other = (_without_times(pd.read_csv(folder / "metrics.csv")) for folder in (a, b))
    pd.testing.assert_frame_equal(table, other, check_exact=True)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not any(part in tag for part in TIMES)]
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in tags}


def _without_times(table: pd.DataFrame) -> pd.DataFrame:
    kept = [name for name in table.columns if not any(part in name for part in TIMES)]
    return table[kept].sort_index(axis=1)
