"""Several real processes, joined by gloo, against one."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_lightning as zo
from tests import distributed_worker as worker
from tests.distributed_worker import SAMPLES, STEPS, batch, estimator, net, train
from tests.processes import together
from zo_lightning.distributed import fingerprint

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


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
    results = together(tmp_path, size, worker.trains)
    probed = SAMPLES // size
    for result in results:
        for name, weights in alone.items():
            assert same(weights, result[name]), name
        for split in ("data", "both", "PerExample data", "PerExample directions", "PerExample both"):
            assert same(results[0][split], result[split]), split
            assert not same(result[split], net().state_dict()), split
        # Of each direction it probes, a rank sends loss and slope, and one pair of hashes a step: 8 bytes each.
        assert result["bytes"] == 3 * STEPS * [16 * probed + 16]
        assert result["data bytes"] == 20 * (16 * SAMPLES + 16)
        assert result["both bytes"] == 20 * (16 * probed + 16)


@pytest.mark.parametrize(("split", "samples"), [("data", 2), ("directions", 3), ("both", 2), ("both", 3)])
def test_the_mean_estimate_is_the_gradient_of_the_whole_batch(tmp_path: Path, split: str, samples: int) -> None:
    """Also where one rank probes more directions than the other."""
    count = 500
    mean, other = together(tmp_path, 2, worker.estimates, split, samples, count)
    assert torch.equal(mean, other)
    model = net().eval()
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    # A slope of one rank's half is along a gradient gₖ of its own, so E‖ĝ − g‖² ≤ (d + 1) max‖gₖ‖² / (q · count), with
    # unequal weights at most 4/3 as much; √ of it is four times what the difference usually is along any one direction.
    halves = [_gradient(model, x[k::2], y[k::2]) for k in range(2)]
    largest = max(float(g_k.norm()) for g_k in halves)
    assert float((mean - g).norm()) < 1.3 * largest * math.sqrt(4 / 3 * (len(g) + 1) / (samples * count))


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return together(tmp_path_factory.mktemp("faults"), 2, worker.faults)


@pytest.mark.parametrize("name", ["central", "PerExample"])
@pytest.mark.parametrize("split", ["data", "directions", "both"])
def test_a_loss_that_is_not_finite_on_one_rank_is_so_on_all(faults: list[Any], split: str, name: str) -> None:
    assert [result[f"{name} {split}"] for result in faults] == 2 * ["NonFiniteLoss: the loss is nan"]


def test_different_weights_stop_all_ranks(faults: list[Any]) -> None:
    for result in faults:
        assert result["diverged"].startswith("WeightsDiverged: at step 50 the weights of rank 1 differ")


@pytest.mark.parametrize("what", ["step", "seed"])
def test_another_step_or_seed_stops_all_ranks_at_once(faults: list[Any], what: str) -> None:
    for result in faults:
        assert "rank 1 is at another step or has another seed" in result[what]


def test_fewer_directions_than_ranks_are_refused(faults: list[Any]) -> None:
    assert [result["few"] for result in faults] == 2 * [
        "ValueError: 2 processes cannot split 1 directions: take more samples"
    ]


def test_a_killed_rank_stops_the_others_and_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    lost, dead = together(tmp_path / "two", 2, worker.killed, checkpoint)
    assert dead is None
    assert "rank 0 at step 70: another process has ended" in lost
    alone = train(estimator("central", "directions"), slice(None))
    for weights in together(tmp_path / "four", 4, worker.resumed, checkpoint):
        assert same(weights, alone)


def test_slopes_of_split_data_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks' numbers, as one of them receives them."""
    import zo_lightning.distributed as module

    monkeypatch.setattr(module, "world_size", lambda: 3)
    rows = [[1.0, 2.0, 0.0, 9.0], [2.0, 4.0, 3.0, 0.0], [6.0, 0.0, 0.0, 0.0]]
    monkeypatch.setattr(module, "gather", lambda *_: [[*row, 0.0, 0.0] for row in rows])
    known = [torch.zeros(1)], 0, 1
    assert zo.Distributed("data").exchange([], 2, *known) == [(3.0, 2.0), (1.0, 3.0)]
    assert zo.Distributed("directions").exchange([], 4, *known) == [(1, 2), (2, 4), (6, 0), (0, 9)]
    # Rank 0 has two of the four directions: each counts 4/6, those of the other ranks 4/3, and each rank 4/3 in all.
    both = zo.Distributed("both").exchange([], 4, *known)
    assert torch.tensor(both).allclose(torch.tensor([(2 / 3, 4 / 3), (8 / 3, 16 / 3), (8, 0), (0, 6)]))


def test_the_hash_sees_every_value_whatever_its_type() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64):
        tensors = [torch.ones(3, 2, dtype=dtype).T, torch.tensor(1.0, dtype=dtype)]
        before = fingerprint(tensors)
        assert before == fingerprint(tensors) < 2**53
        tensors[1].add_(1)
        assert before != fingerprint(tensors)


@pytest.mark.parametrize("wrong", [{"split": "all"}, {"check_every": 0}])
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
