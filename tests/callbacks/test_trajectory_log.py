"""The log of a run: its weights at any step, and going on where it was killed without asking anything again."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import zo_lightning as zo
from zo_lightning.callbacks import TrajectoryLog, reporting
from zo_lightning.replay.rebuild import rebuild
from zo_lightning.replay.start import CannotReplay
from zo_lightning.step_log import Step, StepLog, read_steps

BATCHES = 14  # so that an epoch ends with the checkpoint at step 14, whatever is accumulated


class Lit(LightningModule):
    def __init__(self, make: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, lr=0.1), norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.Dropout(0.2), nn.Tanh(), nn.Linear(5, 3)
        )
        self.make, self.asked = make, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).passes += 1
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    passes = 0

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(4 * BATCHES, 6, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=4)


class ZO(zo.EstimatedGradient, Lit):
    estimator = zo.ZerothOrder(zo.Rademacher(), samples=2, seed=7)


class Weights(Callback):
    """The weights after each optimizer step."""

    def __init__(self) -> None:
        self.history: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.history[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self.on_train_start(trainer, pl_module)


def fit(
    root: Path, module: LightningModule, steps: int = 25, ckpt: Path | None = None, version: int = 0, **settings: Any
) -> dict[int, dict[str, Tensor]]:
    """Train, with a checkpoint every seven steps and the log in ``version_<version>/trajectory``."""
    weights = Weights()
    callbacks = [TrajectoryLog(check_every=5), weights, *settings.pop("callbacks", [])]
    callbacks.append(ModelCheckpoint(root / "checkpoints", "{step}", every_n_train_steps=7, save_top_k=-1))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=CSVLogger(root, name="", version=version),
        callbacks=callbacks,
        log_every_n_steps=4,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, ckpt_path=ckpt)
    return weights.history


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_cycle(params: Any) -> Any:
    made = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(made, 0.2, total_steps=30)  # moves the momentum too
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


RUNS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "adamm": (lambda p: zo.AdaMM(p, lr=0.01), {}),
    "one_cycle": (one_cycle, {}),
    "accumulated": (lambda p: torch.optim.Adam(p, lr=0.01), {"accumulate_grad_batches": 3}),
    "clipped": (lambda p: torch.optim.SGD(p, lr=0.1), {"gradient_clip_val": 0.05}),
    "clipped_by_value": (
        lambda p: zo.SignSGD(p, lr=0.01),
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    ),
}


@pytest.mark.parametrize(("make", "settings"), RUNS.values(), ids=RUNS.keys())
def test_any_step_of_a_run_is_rebuilt(make: Callable[[Any], Any], settings: dict[str, Any], tmp_path: Path) -> None:
    history = fit(tmp_path, ZO(make), **settings)
    for step in (0, 1, 13, 25):
        assert equal(rebuild(tmp_path / "version_0", step).tensors, history[step])
    assert rebuild(tmp_path / "version_0").checked == 25


def test_lean_training_and_a_foreign_module_are_logged_too(tmp_path: Path) -> None:
    class Lean(ZO):
        memory = "lean"
        estimator = zo.ForwardGradient(samples=2, seed=1)

    history = fit(tmp_path / "lean", Lean())
    assert equal(rebuild(tmp_path / "lean" / "version_0").tensors, history[25])
    driver = zo.GradientFree(zo.ZerothOrder(samples=2, seed=1))
    history = fit(tmp_path / "foreign", Lit(), callbacks=[driver])
    assert equal(rebuild(tmp_path / "foreign" / "version_0").tensors, history[25])


@pytest.mark.parametrize("version", [0, 1], ids=["same_folder", "another_folder"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
def test_a_killed_run_goes_on_from_its_log(tmp_path: Path, version: int, settings: dict[str, Any]) -> None:
    whole = fit(tmp_path / "whole", ZO(one_cycle), **settings)
    fit(tmp_path / "killed", ZO(one_cycle), steps=20, **settings)  # its latest checkpoint is of step 14
    checkpoint = tmp_path / "killed" / "checkpoints" / "step=14.ckpt"
    before, module = ZO.passes, ZO(one_cycle)
    again = fit(tmp_path / "killed", module, ckpt=checkpoint, version=version, **settings)
    assert all(equal(again[step], whole[step]) for step in range(15, 26))
    batches = settings.get("accumulate_grad_batches", 1)
    # Four passes a batch, but none for the six steps of the log that are not also logged as metrics.
    logged = sum((batch + 1) % 4 == 0 for batch in range(14 * batches, 20 * batches))
    assert ZO.passes - before == 4 * (11 * batches - 6 * batches + logged)
    assert module.forward_passes == 4 * 25 * batches
    log = list(read_steps(tmp_path / "killed" / f"version_{version}" / "trajectory" / "steps.log"))
    assert [r.step for r in log if isinstance(r, Step) and r.stepped] == list(range(25))
    assert equal(rebuild(tmp_path / "killed" / f"version_{version}").tensors, whole[25])


def test_what_leaves_more_than_its_loss_is_run_again(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", ZO(norm=True))
    fit(tmp_path / "killed", ZO(norm=True), steps=20)
    before = ZO.passes
    again = fit(tmp_path / "killed", ZO(norm=True), ckpt=tmp_path / "killed" / "checkpoints" / "step=14.ckpt")
    assert equal(again[25], whole[25])  # BatchNorm's statistics too
    assert ZO.passes - before == 4 * 11


def test_other_losses_than_those_that_were_logged_are_noticed(tmp_path: Path) -> None:
    class Other(ZO):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 2 * super().training_step(batch, batch_idx)

    fit(tmp_path, ZO(), steps=20)
    with pytest.warns(UserWarning, match="came out otherwise than TrajectoryLog has it"):
        history = fit(tmp_path, Other(), ckpt=tmp_path / "checkpoints" / "step=14.ckpt")
    assert set(history) == set(range(14, 26))
    assert equal(rebuild(tmp_path / "version_0").tensors, history[25])


def test_nothing_is_taken_from_the_log_of_another_run(tmp_path: Path) -> None:
    class Other(ZO):
        estimator = zo.ZerothOrder(zo.Rademacher(), samples=2, seed=8)

    whole = fit(tmp_path / "whole", ZO())
    fit(tmp_path, ZO(), steps=20)
    (tmp_path / "checkpoints" / "step=14.ckpt").rename(tmp_path / "of_the_first.ckpt")
    fit(tmp_path, Other(), steps=20)  # in the same folder
    with pytest.warns(UserWarning, match="is another run's, or ends before the checkpoint's step 14"):
        again = fit(tmp_path, ZO(), ckpt=tmp_path / "of_the_first.ckpt")
    assert equal(again[25], whole[25])


OTHERS = [zo.ZerothOrder(zo.Rademacher(), seed=8), zo.ZerothOrder(zo.Gaussian(), seed=7), zo.Backprop()]


@pytest.mark.parametrize("other", OTHERS[:2], ids=["seed", "directions"])
def test_a_log_is_not_continued_with_other_directions(
    other: zo.ZerothOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "_said", set())
    history = fit(tmp_path, ZO(), steps=20)
    module = ZO()
    module.estimator = other
    with pytest.warns(UserWarning, match="stops at step 14: directions or seed are not those of its start"):
        fit(tmp_path, module, ckpt=tmp_path / "checkpoints" / "step=14.ckpt")
    assert equal(rebuild(tmp_path / "version_0").tensors, history[20])


@pytest.mark.parametrize("other", OTHERS, ids=["seed", "directions", "no_slopes"])
def test_a_log_ends_where_directions_change(other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Switches(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 9:
                pl_module.estimator = other

    monkeypatch.setattr(reporting, "_said", set())
    with pytest.warns(UserWarning, match="stops at step 9: directions or seed are not those of its start"):
        history = fit(tmp_path, ZO(), callbacks=[Switches()])
    assert rebuild(tmp_path / "version_0").step == 9
    assert equal(rebuild(tmp_path / "version_0").tensors, history[9])


def test_another_number_of_directions_keeps_the_log(tmp_path: Path) -> None:
    fit(tmp_path, ZO(), steps=14)
    module = ZO()
    module.estimator = zo.ZerothOrder(zo.Rademacher(), samples=4, seed=7)
    history = fit(tmp_path, module, ckpt=tmp_path / "checkpoints" / "step=14.ckpt", version=1)
    assert equal(rebuild(tmp_path / "version_1").tensors, history[25])


def test_a_group_that_is_added_ends_the_log_and_not_the_run(tmp_path: Path) -> None:
    class Unfreezes(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 9:
                last = pl_module.net[3].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(last.parameters()), "lr": 0.05})

    module = ZO(lambda params: torch.optim.SGD([p for p in params if p.requires_grad], lr=0.1))
    module.net[3].requires_grad_(False)
    with pytest.warns(UserWarning, match="stops at step 9: the optimizer has other groups of weights than before"):
        history = fit(tmp_path, module, callbacks=[Unfreezes()])
    assert 25 in history
    assert equal(rebuild(tmp_path / "version_0").tensors, history[9])


def test_a_second_fit_of_a_trainer_is_no_part_of_the_log(tmp_path: Path) -> None:
    module = ZO(lambda params: torch.optim.Adam(params, lr=0.01))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=5,
        callbacks=[TrajectoryLog(), weights := Weights()],
        logger=CSVLogger(tmp_path, name="", version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    trainer.fit_loop.epoch_loop.max_steps = 10
    with pytest.warns(UserWarning, match="begins at step 5, and no checkpoint says where the log"):
        trainer.fit(module)  # with another optimizer, that has no averages yet
    assert set(weights.history) == set(range(11))
    assert equal(rebuild(tmp_path / "version_0").tensors, weights.history[5])


def test_batches_left_out_are_left_out_again(tmp_path: Path) -> None:
    class Choosy(ZO):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 5 == 3 else loss

    settings: dict[str, Any] = {"accumulate_grad_batches": 2}
    whole = fit(tmp_path / "whole", Choosy(), **settings)
    fit(tmp_path, Choosy(), steps=20, **settings)
    again = fit(tmp_path, Choosy(), ckpt=tmp_path / "checkpoints" / "step=14.ckpt", **settings)
    assert equal(again[25], whole[25])
    assert equal(rebuild(tmp_path / "version_0").tensors, whole[25])


def test_a_module_that_is_logged_can_be_copied(tmp_path: Path) -> None:
    class Copies(Callback):
        copies: list[Any] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
            self.copies.append(copy.deepcopy(pl_module))

    history = fit(tmp_path / "copied", ZO(), steps=3, callbacks=[Copies()])
    assert equal(rebuild(tmp_path / "copied" / "version_0").tensors, history[3])
    fit(tmp_path / "again", Copies.copies[-1], steps=3)  # it is trained by itself
    assert not equal(Copies.copies[-1].state_dict(), history[3])


def test_estimators_that_scalars_do_not_make_are_not_logged(tmp_path: Path) -> None:
    class Both(zo.EstimatedGradient, Lit):
        estimator = zo.Backprop()

    fit(tmp_path, Both())
    with pytest.raises(CannotReplay, match="train with the callback TrajectoryLog"):
        rebuild(tmp_path / "version_0")


def test_weights_that_a_callback_writes_are_noticed(tmp_path: Path) -> None:
    class Decays(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
            for p in pl_module.parameters():
                p.data.mul_(0.9)

    fit(tmp_path, ZO(), callbacks=[Decays()])
    with pytest.raises(CannotReplay, match="the weights are not those of the run"):
        rebuild(tmp_path / "version_0")


def test_many_groups_and_passes_are_logged(tmp_path: Path) -> None:
    module = ZO(lambda params: torch.optim.SGD([{"params": [p], "lr": 0.01} for p in params]))
    module.net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(150)))  # a group for each of 300 weights
    history = fit(tmp_path, module, steps=2)
    assert equal(rebuild(tmp_path / "version_0").tensors, history[2])
    path = tmp_path / "steps.log"
    log = StepLog(path)
    log.append(step := Step(0, 1.0, (0.5,) * 70_000, (0.1,) * 300, 1e-3, passes=140_000))
    log.close()
    assert list(read_steps(path)) == [step]
