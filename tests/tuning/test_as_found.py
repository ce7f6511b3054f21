"""What modules and data own comes back, whatever short runs do with it; what belongs to a whole run is not asked."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import zo_lightning as zo
from tests.tuning.modules import Halved, loader, quiet, regression


def tuned(module: Any, data: Any = None, **options: Any) -> zo.Suggestion:
    return zo.tune(module, data, quiet(**options), steps=8, progress=False)


class Keeper(Halved):
    """Gives one optimizer, made at its beginning, each time."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.optim.Adam(self.parameters(), 1e-3)

    def configure_optimizers(self) -> Any:
        return self.kept


class Fresh(Keeper):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_an_optimizer_of_the_modules_own_is_as_good_as_a_new_one_and_comes_back() -> None:
    found = []
    for make in (Keeper, Fresh):
        torch.manual_seed(0)
        module = make()
        before = set(vars(module.kept)), dict(module.kept.param_groups[0])
        torch.manual_seed(1)
        found.append(tuned(module, loader()).trials)
        assert (set(vars(module.kept)), module.kept.param_groups[0]) == before
        assert not module.kept.state
    assert found[0] == found[1]


class Random(Halved):
    """Draws from generators of its own, and has its data itself."""

    def __init__(self) -> None:
        super().__init__()
        self.data = loader()
        self.one, self.two, self.three = np.random.default_rng(0), random.Random(0), torch.Generator().manual_seed(0)

    def train_dataloader(self) -> Any:
        return self.data

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = self.one.random() + self.two.random() + float(torch.rand(1, generator=self.three))
        return super().training_step(batch, batch_idx) + 0 * noise


def test_generators_of_a_module_come_back() -> None:
    module, untouched = Random(), Random()
    tuned(module)
    assert module.one.random() == untouched.one.random() and module.two.random() == untouched.two.random()
    assert torch.equal(module.three.get_state(), untouched.three.get_state())
    assert next(iter(module.data))[0].equal(next(iter(untouched.data))[0])


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)
        self.source, self.kept = torch.Generator().manual_seed(5), [loader()]

    def train_dataloader(self) -> Any:
        shuffled = DataLoader(regression(), batch_size=16, shuffle=True, generator=self.source)
        return {"new": shuffled, "kept": self.kept[0]}


class OfMany(Halved):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(next(iter(batch.values())), batch_idx)


def test_generators_of_data_come_back() -> None:
    data, seeded = Data(), torch.Generator().manual_seed(5).get_state()
    tuned(OfMany(), data)
    loaders = {"a": loader(), "b": loader()}
    tuned(OfMany(), loaders)
    for one in (data.source, *(kept.generator for kept in (data.kept[0], *loaders.values()))):
        assert one is not None and torch.equal(one.get_state(), seeded)


class Whole(Halved):
    """Brings callbacks of a whole run, and writes to its logger."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def configure_callbacks(self) -> Any:
        return [ModelCheckpoint(self._folder, save_last=True), EarlyStopping("val/loss"), LearningRateMonitor()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.logger.experiment.add_scalar("batch", batch_idx)  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)


def test_callbacks_of_a_whole_run_write_nothing_and_a_logger_is_there(tmp_path: Path) -> None:
    tuned(Whole(tmp_path), loader())
    assert not list(tmp_path.iterdir())


def test_a_module_brings_what_trains_it() -> None:
    class Brings(Halved):
        def configure_callbacks(self) -> Any:
            return zo.GradientFree(zo.ZerothOrder(seed=0))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            graphs.append(torch.is_grad_enabled())
            return super().training_step(batch, batch_idx)

    graphs: list[bool] = []
    tuned(Brings(), loader())
    assert graphs and not any(graphs)


def test_a_compiled_module_is_tuned_as_it_was_before() -> None:
    module = Halved()
    compiled: Any = torch.compile(module, backend="eager")
    assert tuned(compiled, loader()).trials == tuned(module, loader()).trials


@pytest.mark.parametrize("steps", [3, 8.5])
def test_steps_are_a_whole_number(steps: Any) -> None:
    with pytest.raises(ValueError, match=f"whole number of at least 4, got {steps}"):
        zo.tune(Halved(), loader(), steps=steps)
