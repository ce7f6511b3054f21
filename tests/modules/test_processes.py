"""Trainers and Fabric on several real processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DistributedSampler

import zo_lightning as zo
from tests import lightning_worker as worker
from tests.processes import together
from zo_lightning.modules.processes import check_processes, check_samplers


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def sends(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return together(tmp_path_factory.mktemp("sends"), 2, worker.sends)


FIRST = next(worker.net().parameters())
D = sum(p.numel() for p in worker.net().parameters())
BUFFERS = sum(b.nbytes for b in worker.net().buffers())
SIGNAL = 8
"""Lightning tells all ranks at each batch whether one was asked to end."""


@pytest.mark.parametrize(("split", "probed"), [("data", 4), ("directions", 2), ("both", 2)])
def test_slopes_are_all_that_a_step_sends(sends: list[Any], split: str, probed: int) -> None:
    for sent in (result[split][0] for result in sends):
        assert sent == 4 * [{"broadcast_": SIGNAL + BUFFERS, "allgather_": 16 * probed + 16}]


def test_estimates_without_slopes_send_what_backpropagation_sends(sends: list[Any]) -> None:
    for result in sends:
        reduced = [step["allreduce_"] for step in result["Backprop"][0]]
        assert reduced == 4 * [4 * D]
        assert [step["allreduce_"] for step in result["PerExample"][0]] == 4 * [4 * D + 4]  # and the loss


@pytest.mark.parametrize("split", ["data", "directions"])
def test_the_callback_sends_and_trains_as_the_mixin(sends: list[Any], split: str) -> None:
    for result in sends:
        assert result[f"GradientFree {split}"][0] == result[split][0]
        assert same(result[f"GradientFree {split}"][1], result[split][1])


@pytest.mark.parametrize("name", ["data", "directions", "both", "PerExample", "Backprop"])
def test_ranks_end_with_equal_weights(sends: list[Any], name: str) -> None:
    first, second = (worker.trained(result[name][1]) for result in sends)
    assert same(first, second)
    assert not torch.equal(first["net.2.weight"], FIRST)


def test_backpropagation_is_that_of_automatic_optimization_bit_for_bit(sends: list[Any]) -> None:
    for result in sends:
        assert same(result["Backprop"][1], result["automatic"][1])


TOLERANCE = {"ZerothOrder": 1e-5, "Regressor": 1e-5, "Backprop": 0.1}
"""The same sums in another order; with Backprop, batch normalisation sees half a batch on each rank."""


def test_metrics_of_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    alone = together(tmp_path / "one", 1, worker.measures)[0]
    first, second = together(tmp_path / "two", 2, worker.measures)
    for name, values in alone.items():
        assert first[name].keys() == values.keys()
        for key, value in values.items():
            if name == "Regressor" or key.startswith(("val/", "test/")) or key == "train/loss_epoch":
                assert first[name][key] == second[name][key], key
                assert first[name][key] == pytest.approx(value, rel=TOLERANCE[name]), key


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_resumes_on_any_number_of_processes(tmp_path: Path, checkpoint: tuple[Path, Any], size: int) -> None:
    path, uninterrupted = checkpoint
    first, *others = together(tmp_path / "resumed", size, worker.resumes, path)
    assert same(first, uninterrupted)
    for weights in others:  # whose buffers follow with the next step
        assert same(worker.trained(weights), worker.trained(uninterrupted))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("resume")
    together(folder / "saves", 2, worker.saves, folder)
    return folder / "step=5.ckpt", together(folder / "whole", 1, worker.resumes, None)[0]


@pytest.mark.parametrize("name", ["ZerothOrder", "Backprop"])
def test_a_rank_that_is_killed_ends_the_others_with_a_clear_error(tmp_path: Path, name: str) -> None:
    """In whichever collective it is noticed: the exchange of slopes, or DistributedDataParallel's own."""
    text, dead = together(tmp_path, 2, worker.dies, name)
    assert dead is None
    assert "rank 0 at step 6: another process has ended" in text
    assert "Resume from the last checkpoint" in text


def test_fabric_trains_on_two_processes(tmp_path: Path) -> None:
    alone = together(tmp_path / "one", 1, worker.fabric)[0]
    first, second = together(tmp_path / "two", 2, worker.fabric)
    assert same(first["directions"], alone["directions"])
    for name in ("both", "PerExample"):
        assert same(first[name], second[name])
        assert not torch.equal(first[name]["2.weight"], FIRST)


def a_trainer(strategy: Any, sampler: Any = None) -> Any:
    return SimpleNamespace(world_size=2, strategy=strategy, train_dataloader=SimpleNamespace(sampler=sampler))


def test_strategies_that_split_weights_are_refused() -> None:
    for estimator in (zo.ZerothOrder(), zo.ForwardGradient(), zo.PerExample()):
        check_processes(a_trainer(DDPStrategy()), estimator)
        with pytest.raises(MisconfigurationException, match="all weights in every process.*FSDPStrategy.*ddp"):
            check_processes(a_trainer(FSDPStrategy()), estimator)
    check_processes(a_trainer(FSDPStrategy()), zo.Backprop())


def test_estimators_that_cannot_share_are_refused() -> None:
    class Own(zo.GradientEstimator):
        def estimate(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(MisconfigurationException, match="Own gives each process a gradient of its own.*devices=1"):
        check_processes(a_trainer(DDPStrategy()), Own())


def test_samplers_that_split_the_batch_are_refused_where_directions_are_split() -> None:
    sampler = DistributedSampler(range(8), num_replicas=2, rank=0)  # type: ignore[arg-type]
    trainer = a_trainer(DDPStrategy(), sampler)
    for split in ("data", "both"):
        check_samplers(trainer, worker.zeroth_order(split))
    with pytest.raises(MisconfigurationException, match="use_distributed_sampler=False"):
        check_samplers(trainer, worker.zeroth_order("directions"))
    check_samplers(a_trainer(DDPStrategy()), worker.zeroth_order("directions"))
