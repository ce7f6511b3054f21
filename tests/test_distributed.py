"""Several real processes, joined by gloo, against one."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_lightning as zo
import zo_lightning.distributed as distributed
from tests import distributed_worker as worker
from tests.distributed_worker import FEW, SAMPLES, STEPS, batch, estimator, net, train
from tests.processes import together
from zo_lightning.distributed import fingerprint


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@cache
def alone_central() -> dict[str, Tensor]:
    return train(estimator("central", "directions"), slice(None))


@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_split_directions_end_with_the_weights_of_one(tmp_path: Path, size: int) -> None:
    few = {
        name: train(estimator(name, "directions"), slice(None), steps=FEW)
        for name in ("central", "forward", "ForwardGradient")
    }
    alone = {**few, "central": alone_central(), "lean": few["central"]}
    alone["uneven"] = train(estimator("central", "directions", 5), slice(None), steps=FEW)
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
        assert result["bytes"] == (STEPS + 2 * len(FEW)) * [16 * probed + 16]
        assert result["data bytes"] == len(FEW) * (16 * SAMPLES + 16)
        assert result["both bytes"] == len(FEW) * (16 * probed + 16)


@pytest.fixture(scope="module")
def estimates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    first, second = together(tmp_path_factory.mktemp("estimates"), 2, worker.estimates)
    for name, estimate in first.items():
        assert torch.equal(estimate, second[name]), name
    return first


@pytest.mark.parametrize(("split", "samples"), worker.SPLITS)
def test_estimates_along_directions_are_the_mean_over_ranks(
    estimates: dict[str, Tensor], split: str, samples: int
) -> None:
    """``ĝ = Σₖ (1/N nₖ) Σᵢ <gₖ, uᵢ> uᵢ`` over the nₖ directions that rank k probes, also where one probes more."""
    model = net().eval()
    params = list(model.parameters())
    expected = torch.zeros(sum(p.numel() for p in params))
    for rank in range(2):
        x, y = (t[worker.part(split, rank)] for t in batch(0))
        loss = nn.functional.cross_entropy(model(x), y)
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])
        probed = range(samples) if split == "data" else range(rank, samples, 2)
        weight = 1 / samples if split == "directions" else 1 / (2 * len(probed))
        for index in probed:
            u = torch.cat([t.flatten() for t in zo.Gaussian().draw(params, 3, 0, index).tensors()])
            expected += weight * torch.dot(g, u) * u
    found = estimates[f"ForwardGradient {split} {samples}"]
    # Float32 sums of at most 200 products: √200 · 6e-8 of the whole, and as much again from the net's own sums.
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("split", ["data", "directions", "both"])
def test_estimates_without_directions_are_the_mean_over_ranks(estimates: dict[str, Tensor], split: str) -> None:
    estimator = worker.estimator("DirectFeedbackAlignment", split)
    parts = [worker.one_estimate(estimator, worker.part(split, rank)) for rank in range(2)]
    found = estimates[f"DirectFeedbackAlignment {split} 1"]
    assert torch.allclose(found, (parts[0] + parts[1]) / 2, atol=1e-6)


def test_without_a_seed_directions_are_those_of_pytorchs(estimates: dict[str, Tensor]) -> None:
    """Those that are probed and those that the update draws, though probes set PyTorch's seed between."""
    assert torch.equal(estimates["unseeded"], estimates["ForwardGradient both 2"])


@pytest.mark.parametrize(("split", "samples"), worker.SPLITS)
def test_estimates_per_example_are_the_mean_over_ranks(
    estimates: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, split: str, samples: int
) -> None:
    """The parts of both ranks, computed here one after the other, each with its weight."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda numbers, *_: [list(numbers), list(numbers)])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(worker.one_estimate(estimator("PerExample", split, samples), worker.part(split, rank)))
    assert torch.equal(estimates[f"PerExample {split} {samples}"], parts[0] + parts[1])
    assert not torch.allclose(parts[0], parts[1], rtol=0.1)


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
    for weights in together(tmp_path / "four", 4, worker.resumed, checkpoint):
        assert same(weights, alone_central())


def test_slopes_of_split_data_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks' numbers, as one of them receives them."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    rows = [[1.0, 2.0, 0.0, 9.0], [2.0, 4.0, 3.0, 0.0], [6.0, 0.0, 0.0, 0.0]]
    monkeypatch.setattr(distributed, "gather", lambda *_: [[*row, 0.0, 0.0] for row in rows])
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


def test_errors_of_collectives_are_told_from_others() -> None:
    of_gloo = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer\nException raised from ...")
    for error in (of_gloo, torch.distributed.DistBackendError("NCCL error"), torch.distributed.DistNetworkError("")):
        assert distributed.tells_of_loss(error)
    for error in (RuntimeError("shapes differ"), ValueError("gloo"), zo.ProcessLost("said already: gloo")):
        assert not distributed.tells_of_loss(error)
    said = distributed.loss_of_process(of_gloo, 7)
    assert said.startswith("rank 0 at step 7: another process has ended") and "Exception raised" not in said


@pytest.mark.parametrize("wrong", [{"split": "all"}, {"check_every": 0}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        zo.Distributed(**wrong)
