"""Several real processes, joined by gloo, against one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zo_lightning as zo
from tests.distributed_worker import SAMPLES, estimator, net, train
from zo_lightning.distributed import fingerprint

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def together(folder: Path, case: str, size: int) -> list[Any]:
    """What each of ``size`` processes found in a case; None of one that was killed."""
    words = [str(size), str(folder / f"{case}{size}.store"), str(folder / case), case]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_worker", str(rank), *words], env=ENVIRONMENT, cwd=ROOT
        )
        for rank in range(size)
    ]
    for worker in workers:
        worker.wait(timeout=240)
    files = [folder / f"{case}.{rank}" for rank in range(size)]
    return [torch.load(file) if file.exists() else None for file in files]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_split_directions_end_with_the_weights_of_one(tmp_path: Path, size: int) -> None:
    alone = {
        name: train(estimator(name, "directions"), slice(None)) for name in ("central", "forward", "ForwardGradient")
    }
    alone["lean"] = alone["central"]
    alone["uneven"] = train(estimator("central", "directions", 5), slice(None))
    assert not same(alone["central"], net().state_dict())
    results = together(tmp_path, "train", size)
    assert all(same(results[0]["data"], result["data"]) for result in results)  # a batch of its own for each
    for result in results:
        for name, weights in alone.items():
            assert same(weights, result[name]), name
        # Of each direction it probes, a rank sends loss and slope, 8 bytes each; every 50th step the hash's 8 too.
        probed = SAMPLES // size
        assert result["bytes"] == 3 * [16 * probed + 8 * (step % 50 == 0) for step in range(200)]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return together(tmp_path_factory.mktemp("faults"), "faults", 2)


@pytest.mark.parametrize("split", ["data", "directions"])
def test_a_loss_that_is_not_finite_on_one_rank_is_so_on_all(faults: list[Any], split: str) -> None:
    assert [result[split] for result in faults] == 2 * ["NonFiniteLoss: the loss is nan"]


def test_different_weights_stop_all_ranks(faults: list[Any]) -> None:
    for result in faults:
        assert result["diverged"].startswith("WeightsDiverged: at step 50 the weights of rank 1 differ")


def test_fewer_directions_than_ranks_are_refused(faults: list[Any]) -> None:
    assert [result["few"] for result in faults] == 2 * [
        "ValueError: 2 processes cannot split 1 directions: take more samples"
    ]


def test_a_killed_rank_stops_the_others_and_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    lost, killed = together(tmp_path, "killed", 2)
    assert killed is None
    assert "rank 0 at step 70: another process has ended" in lost["lost"]
    alone = train(estimator("central", "directions"), slice(None))
    for result in together(tmp_path, "resumed", 4):
        assert same(result["central"], alone)


def test_slopes_of_split_data_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks' numbers, as one of them receives them."""
    import zo_lightning.distributed as module

    monkeypatch.setattr(module, "world_size", lambda: 3)
    monkeypatch.setattr(module, "gather", lambda *_: [[1.0, 2.0, 0.0, 9.0], [2.0, 4.0, 3.0, 0.0], [6.0, 0.0, 0.0, 0.0]])
    weights = [torch.zeros(1)]
    assert zo.Distributed("data").exchange([], 2, weights, 1) == [(3.0, 2.0), (1.0, 3.0)]
    assert zo.Distributed("directions").exchange([], 4, weights, 1) == [(1, 2), (2, 4), (6, 0), (0, 9)]


def test_the_hash_sees_every_value_whatever_its_type() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64):
        tensors = [torch.ones(3, 2, dtype=dtype).T, torch.tensor(1.0, dtype=dtype)]
        before = fingerprint(tensors)
        assert before == fingerprint(tensors) < 2**53
        tensors[1].add_(1)
        assert before != fingerprint(tensors)


@pytest.mark.parametrize("wrong", [{"split": "both"}, {"check_every": 0}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        zo.Distributed(**wrong)


def fitted(folder: Path, words: str) -> dict[str, Tensor]:
    """The weights after three steps of the command line."""
    folder.mkdir()
    options = (
        f"fit {words} --trainer.accelerator cpu --trainer.limit_train_batches 3 --trainer.max_epochs 1 "
        "--trainer.check_val_every_n_epoch 1 --trainer.enable_progress_bar false --trainer.enable_model_summary false"
    )
    run = subprocess.run(
        [sys.executable, "-m", "zo_lightning", *options.split()],
        env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "The run is in" in run.stdout
    checkpoint = next(folder.rglob("last.ckpt"))
    return torch.load(checkpoint, weights_only=False)["state_dict"]


def test_the_command_line_trains_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """ZerothOrder bit for bit; Backprop ends with exit code 0, without a rank that waits for the others."""
    two = "--trainer.devices 2 --trainer.strategy ddp"
    zeroth_order = "--model.estimator ZerothOrder --model.estimator.distributed.split directions"
    alone = fitted(tmp_path / "alone", f"{zeroth_order} --trainer.devices 1")
    assert same(alone, fitted(tmp_path / "two", f"{zeroth_order} {two}"))
    fitted(tmp_path / "backprop", f"--model.estimator Backprop {two}")
