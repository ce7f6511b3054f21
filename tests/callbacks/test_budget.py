import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from tests.callbacks.runs import automatic, batches, classifier, events, first_order, net, scalars, trainer, validation
from zo_lightning import GradientFree, ZerothOrder
from zo_lightning.callbacks import Budget, GradientAlignment
from zo_lightning.callbacks.budget import peak_memory


def test_every_curve_also_against_cost(tmp_path: Path) -> None:
    for make, per_step in ((classifier, 2), (first_order, 3), (automatic, 3)):
        logger = TensorBoardLogger(tmp_path, make.__name__)
        fit = trainer(tmp_path, Budget(), logger=logger)
        fit.fit(make(), batches(), validation())
        seen = events(Path(logger.log_dir))
        tags = {tag for tag in seen.Tags()["scalars"] if not tag.startswith("vs_flops/") and tag != "epoch"}
        copies = {tag.removeprefix("vs_flops/") for tag in seen.Tags()["scalars"] if tag.startswith("vs_flops/")}
        assert copies == tags - {"budget/flops"} >= {"train/loss", "val/acc", "budget/seconds"}
        for tag in copies:
            by_steps, by_flops = seen.Scalars(tag), seen.Scalars(f"vs_flops/{tag}")
            assert [event.value for event in by_steps] == [event.value for event in by_flops], tag
        spent = [event.value for event in seen.Scalars("budget/flops")]  # after steps 2, 4, ..., 12
        assert [event.step for event in seen.Scalars("vs_flops/train/loss")] == [round(value / 1e6) for value in spent]
        assert [event.step for event in seen.Scalars("vs_flops/val/acc")] == [round(spent[i] / 1e6) for i in (2, 5)]
        assert spent == pytest.approx([spent[0] * i for i in range(1, 7)], rel=1e-6)  # float32 in the file
        assert [event.value for event in seen.Scalars("budget/forward_passes")][-1] == 12 * per_step
        assert [event.value for event in seen.Scalars("budget/examples")] == [8, 16, 24, 32, 40, 48]
        assert fit.loggers == [logger]  # the second one was for the run


def flops(make: Any, folder: Path, *others: Callback) -> float:
    """Of two epochs of six steps."""
    budget = Budget()
    trainer(folder, budget, *others).fit(make(), batches())
    return budget.flops


def test_flops_are_those_of_the_steps_in_any_module(tmp_path: Path) -> None:
    with FlopCounterMode(display=False) as counter:
        net()(torch.rand(4, 3, 8, 8))
    forward = counter.get_total_flops()
    first = 2 * 4 * 4 * 6 * 6 * 3 * 9  # of the first layer, whose input needs no gradient
    for make in (automatic, first_order, classifier):
        step = 2 * forward if make is classifier else 3 * forward - first
        assert flops(make, tmp_path) == 12 * step


def test_diagnostics_are_no_cost_of_training(tmp_path: Path) -> None:
    alone = flops(classifier, tmp_path)
    assert flops(classifier, tmp_path, GradientAlignment(1)) == alone


def test_matrices_that_the_optimizer_multiplies_are_counted(tmp_path: Path) -> None:
    class Multiplies(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            torch.mm(torch.ones(1, 1), torch.ones(1, 1))
            return loss

    for make in (automatic, classifier):
        usual = flops(make, tmp_path)

        def own(make: Any = make) -> Any:
            module = make()
            module.optimizer = lambda p: Multiplies(p, 0.01)
            return module

        assert flops(own, tmp_path) == usual + 12 * 2


@pytest.mark.parametrize("axis", ["forward_passes", "seconds"])
def test_another_axis(axis: Any, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, Budget(axis), logger=logger).fit(classifier(), batches(), validation())
    seen = events(Path(logger.log_dir))
    spent = [event.value for event in seen.Scalars(f"budget/{axis}")]
    # seconds are read once more for the axis, so that they may be round numbers higher by one
    found = [event.step for event in seen.Scalars(f"vs_{axis}/train/loss")]
    assert found == pytest.approx(spent, abs=0 if axis == "forward_passes" else 1)
    with pytest.raises(ValueError, match="flops, forward_passes, seconds, got 'epochs'"):
        Budget("epochs")  # type: ignore[arg-type]


def test_a_module_can_be_left_unwatched(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, Budget(measure_flops=False), logger=logger).fit(automatic(), batches())
    tags = events(Path(logger.log_dir)).Tags()["scalars"]
    assert "budget/forward_passes" in tags and "budget/flops" not in tags
    assert not [tag for tag in tags if tag.startswith("vs_flops/")]


def test_a_step_that_fails_or_is_called_off_leaves_no_one_watching(tmp_path: Path) -> None:
    class Stops(Callback):
        def __init__(self, error: type[Exception] | None) -> None:
            self.error = error

        def on_train_batch_start(self, *_: Any) -> int:
            if self.error:
                raise self.error("stop")
            return -1

    for error in (RuntimeError, None):
        fit = trainer(tmp_path, Budget(), Stops(error))
        with nullcontext() if error is None else pytest.raises(error, match="stop"):
            fit.fit(automatic(), batches())
        assert not _get_current_dispatch_mode_stack()


def test_seconds_memory_and_speed(tmp_path: Path) -> None:
    trainer(tmp_path, Budget()).fit(automatic(), batches())
    logged = {tag: [value for _, value in values] for tag, values in scalars(tmp_path).items()}
    assert logged["budget/seconds"] == sorted(logged["budget/seconds"]) and logged["budget/seconds"][0] > 0
    # two steps lie between two readings of the clock
    between = [2 / (b - a) for a, b in zip(logged["budget/seconds"], logged["budget/seconds"][1:], strict=False)]
    assert logged["budget/steps_per_second"][1:] == pytest.approx(between, rel=0.01)
    assert 50 < logged["budget/peak_memory_mb"][0] < 100_000
    before = peak_memory(torch.device("cpu"))
    assert peak_memory(torch.device("cpu")) >= before + (torch.ones(1 << 26).sum() < 0)


def test_it_goes_on_counting_after_a_resume(tmp_path: Path) -> None:
    class Wait(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            budget = next(c for c in trained.callbacks if isinstance(c, Budget))  # type: ignore[attr-defined]
            budget._since -= 10  # as if the batch had taken ten seconds

    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4)
    trained: Trainer = trainer(tmp_path / "a", Budget(), Wait(), checkpoint, max_steps=4, enable_checkpointing=True)
    trained.fit(automatic(), batches())
    trainer(tmp_path / "b", Budget()).fit(automatic(), batches(), ckpt_path=checkpoint.best_model_path)
    logged = scalars(tmp_path / "b")
    assert logged["budget/examples"][0] == (6, 24)
    assert logged["budget/forward_passes"][0] == (6, 18)
    before = {step: value for step, value in scalars(tmp_path / "a")["budget/flops"]}
    assert logged["budget/flops"][0] == (6, before[4] * 6 / 4)
    assert 40 < logged["budget/seconds"][0][1] < 60


def test_a_run_after_one_that_failed_draws_each_curve_once(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if not trainer.global_step:
                trainer.callbacks.remove(self)  # type: ignore[attr-defined]
                raise RuntimeError("broken")

    fit = trainer(tmp_path, Budget(), Fails(), logger=TensorBoardLogger(tmp_path))
    with pytest.raises(RuntimeError, match="broken"):
        fit.fit(automatic(), batches())
    fit.fit(automatic(), batches())
    assert len(fit.loggers) == 1
    assert len(events(Path(fit.log_dir or "")).Scalars("vs_flops/budget/examples")) == 6


def test_a_logger_without_pictures_gets_the_columns(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, Budget(), logger=logger).fit(automatic(), batches())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"budget/flops", "budget/forward_passes", "budget/examples", "train/loss"} <= set(header)
    assert not any(tag.startswith("vs_flops/") for tag in header)


def test_batches_of_unknown_size_count_as_none() -> None:
    from zo_lightning.callbacks.budget import _size

    assert _size((torch.ones(5, 2), torch.ones(5))) == 5
    assert _size(object()) == 0


@pytest.mark.parametrize("make", [classifier, automatic])
def test_a_trainer_that_logs_nothing(make: Any, tmp_path: Path) -> None:
    budget = Budget()
    trainer(tmp_path, budget, log_every_n_steps=0).fit(make(), batches())
    bare = Budget()
    Trainer(barebones=True, accelerator="cpu", max_epochs=2, callbacks=[bare], default_root_dir=tmp_path).fit(
        make(), batches()
    )
    assert budget.forward_passes == bare.forward_passes > 0
    assert budget.flops == bare.flops > 0


def test_an_estimator_that_nothing_asks_is_named(tmp_path: Path) -> None:
    module: Any = automatic()
    module.estimator = ZerothOrder(seed=0)
    with pytest.warns(UserWarning, match="AutomaticClassifier.estimator is not used, .* trained by backpropagation"):
        trainer(tmp_path, Budget(), max_steps=1).fit(module, batches())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, Budget(), GradientFree(module.estimator), max_steps=1).fit(module, batches())
        trainer(tmp_path, Budget(), max_steps=1).fit(classifier(), batches())
    assert not [one for one in caught if "is not used" in str(one.message)]
