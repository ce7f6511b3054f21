"""Tuning leaves everything as it was, and asks for no more than it says."""

import random
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule

import zo_lightning as zo
from tests.tuning.modules import Bowl, Lit, ZOLit, loader, quiet
from zo_lightning.random_states import random_states
from zo_lightning.tuning.stage import Stage


def everything(module: LightningModule) -> Callable[[], None]:
    """Notes all about a module; what is returned asserts that it is the same."""
    objects = {
        name: (p, p.data_ptr(), p.detach().clone(), p.grad, p.requires_grad) for name, p in module.named_parameters()
    }
    buffers = {name: (b, b.clone()) for name, b in module.named_buffers()}
    attributes = {id(one): dict(vars(one)) for one in module.modules()}
    lists = {id(one): [(v, list(v)) for v in vars(one).values() if isinstance(v, list)] for one in module.modules()}
    modes = [one.training for one in module.modules()]
    states = random_states()

    def check() -> None:
        for name, p in module.named_parameters():
            was, address, numbers, grad, requires_grad = objects[name]
            assert p is was and p.data_ptr() == address and torch.equal(p, numbers)
            assert p.grad is grad and p.requires_grad == requires_grad
        for name, b in module.named_buffers():
            assert b is buffers[name][0] and torch.equal(b, buffers[name][1])
        for one in module.modules():
            held = attributes[id(one)]
            assert vars(one).keys() == held.keys()
            for key, value in vars(one).items():
                assert value is held[key] or key in ("sum_value", "weight", "mean_value"), (
                    key
                )  # a metric's, checked below
            assert all(value == content for value, content in lists[id(one)])
        assert [one.training for one in module.modules()] == modes
        now = random_states()
        assert torch.equal(now["torch"], states["torch"]) and now["python"] == states["python"]
        assert torch.equal(now["numpy"][1], states["numpy"][1])

    return check


def used(module: Any) -> Any:
    """A module in the middle of something."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    module.seen.append(0.5)
    module.mean.update(torch.tensor(2.0))
    module.net[0].weight.grad = torch.ones(8, 4)
    module.net[4].bias.requires_grad_(False)
    module.net[1].eval()
    return module


@pytest.mark.parametrize(
    ("make", "trainer", "estimator"),
    [
        (ZOLit, lambda: None, None),
        (Lit, lambda: None, None),
        (Lit, lambda: None, zo.ZerothOrder()),
        (Lit, lambda: quiet(callbacks=[zo.GradientFree(zo.ForwardGradient())], precision="bf16-true"), None),
        (Lit, lambda: quiet(accumulate_grad_batches=2, gradient_clip_val=1.0), zo.Backprop()),
    ],
)
def test_all_is_left_as_found(make: Any, trainer: Any, estimator: Any) -> None:
    module = used(make())
    trainer, data = trainer(), loader()
    generator = data.generator
    assert generator is not None
    check, order = everything(module), generator.get_state()
    optimizers, callbacks = (None, None) if trainer is None else (trainer.optimizers, list(trainer.callbacks))
    suggestion = zo.tune(module, data, trainer, estimator=estimator, steps=8, progress=False)
    check()
    assert float(module.mean.compute()) == 2 and float(module.moving) == 0
    assert torch.equal(generator.get_state(), order)
    assert suggestion.lr > 0
    if trainer is not None:
        assert trainer.optimizers == optimizers and trainer.callbacks == callbacks and trainer.global_step == 0


@pytest.mark.parametrize("make", [ZOLit, Lit])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("after", [3, 150])
def test_all_is_left_as_found_when_stopped(make: Any, error: type[BaseException], after: int) -> None:
    module = used(make())
    module.broken_after, module.error = after, error
    check, handler = everything(module), signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        zo.tune(module, loader(), estimator=zo.ZerothOrder() if make is Lit else None, steps=40, progress=False)
    check()
    assert signal.getsignal(signal.SIGINT) is handler


class Data(LightningDataModule):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def setup(self, stage: str) -> None:
        print("setup")

    def train_dataloader(self) -> Any:
        return loader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return 2 * x, 2 * y


def test_data_module_is_set_up_once_and_keeps_its_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    data, module = Data(), Bowl(5.0)
    seen: list[float] = []
    own = module.training_step
    module.training_step = lambda batch, batch_idx: (seen.append(float(batch[0].std())), own(batch, batch_idx))[1]  # type: ignore[method-assign]
    before = dict(vars(data))
    zo.tune(module, data, steps=4, progress=False)
    assert capsys.readouterr().out.count("setup") == 1
    assert vars(data) == before
    assert np.mean(seen) == pytest.approx(2, rel=0.1)  # standard normal, doubled


def test_passes_are_counted() -> None:
    """All of them: Lightning's own are counted by the module, three for each batch that is differentiated."""
    for estimator in (None, zo.ZerothOrder(seed=0)):
        module = Bowl(5.0)
        asked: list[bool] = []
        own = module.training_step
        module.training_step = lambda batch, batch_idx, own=own, asked=asked: (  # type: ignore[method-assign]
            asked.append(torch.is_grad_enabled()),
            own(batch, batch_idx),
        )[1]
        suggestion = zo.tune(module, loader(), estimator=estimator, steps=8, progress=False)
        # The looks at losses are under no_grad in both cases, and so are the passes of an estimator.
        assert suggestion.forward_passes == asked.count(False) + 3 * asked.count(True)


def test_nothing_is_trained_while_batches_are_drawn() -> None:
    module = Lit()
    module.broken_after = 1
    stage = Stage(module, loader(), quiet(limit_train_batches=7))
    assert len(stage.batches(100)) == 7 and stage.batches_in_run == 21
