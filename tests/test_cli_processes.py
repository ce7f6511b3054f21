"""The command line and a script on several processes, started by Lightning and by torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lightning_worker import command_line
from tests.processes import free_port, together

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "distributed.md"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
OPTIONS = (
    "--trainer.accelerator cpu --trainer.limit_train_batches 3 --trainer.max_epochs 1 --trainer.strategy auto "
    "--trainer.check_val_every_n_epoch 1 --trainer.enable_progress_bar false --trainer.enable_model_summary false"
)
TWO = "--trainer.devices 2 --trainer.strategy ddp"
DIRECTIONS = "--model.estimator ZerothOrder --model.estimator.samples 2 --model.estimator.distributed.split directions"


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", *" ".join(words).split()]
    pipe: Any = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def ended(run: "subprocess.Popen[str]") -> str:
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(next(folder.rglob("last.ckpt")), weights_only=False)["state_dict"]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("alone")
    ((code, _, errors),) = together(folder, 1, command_line, f"fit {DIRECTIONS} {OPTIONS}")
    assert code == 0, errors
    return weights(folder)


def test_two_processes_of_lightning_train_as_one(tmp_path: Path, alone: dict[str, Tensor]) -> None:
    run = start(tmp_path, "zo_lightning fit", DIRECTIONS, OPTIONS, TWO)
    assert "The run is in" in ended(run)
    assert same(weights(tmp_path), alone)


@pytest.mark.parametrize("estimator", ["Backprop", "PerExample"])
def test_estimators_that_reduce_gradients_end_cleanly(tmp_path: Path, estimator: str) -> None:
    first, second = together(tmp_path, 2, command_line, f"fit --model.estimator {estimator} {OPTIONS} {TWO}")
    assert (first[0], second[0]) == (0, 0)
    assert "The run is in" in first[1] and "The run is in" not in second[1]


def test_two_nodes_of_torchrun_train_as_one_process(tmp_path: Path, alone: dict[str, Tensor]) -> None:
    port = free_port()
    words = (
        "-m zo_lightning fit",
        DIRECTIONS,
        OPTIONS,
        "--trainer.devices 1 --trainer.num_nodes 2 --trainer.strategy ddp",
    )
    where = f"--nproc_per_node 1 --nnodes 2 --master_addr 127.0.0.1 --master_port {port}"
    nodes = [
        start(tmp_path / str(node), f"torch.distributed.run {where} --node_rank {node}", *words) for node in range(2)
    ]
    assert ["The run is in" in ended(node) for node in nodes] == [True, False]
    assert same(weights(tmp_path / "0"), alone)


def test_the_script_of_the_page_runs_under_torchrun(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    out = ended(start(tmp_path, "torch.distributed.run --standalone --nproc_per_node 2 train.py"))
    hashes = re.findall(r"rank (\d): loss ([\d.]+), weights (\d+)", out)
    assert sorted(rank for rank, _, _ in hashes) == ["0", "1"]
    assert len({(loss, hash_) for _, loss, hash_ in hashes}) == 1
    assert float(hashes[0][1]) < 0.5


@pytest.mark.parametrize("estimator", ["Backprop", "ZerothOrder"])
def test_a_killed_rank_ends_the_other_with_one_line(tmp_path: Path, estimator: str) -> None:
    callback = "--trainer.callbacks+ tests.lightning_worker.Dies --trainer.callbacks.step 2"
    (code, _, errors), dead = together(
        tmp_path, 2, command_line, f"fit --model.estimator {estimator} {OPTIONS} {TWO} {callback}"
    )
    assert (code, dead) == (1, None)
    (line,) = [line for line in errors.splitlines() if line.startswith("zo-lightning: error")]
    assert re.search("rank 0 at step 2: another process has ended.*Resume from the last checkpoint", line)
