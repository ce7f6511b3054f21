"""With an estimator all else is Lightning's automatic optimization: hooks, schedulers, accumulation, clipping."""

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from tests.modules.ways import WAYS, Net, batches, driver, fitted, made, trainer, weights
from zo_lightning import (
    Backprop,
    CentralDifference,
    DirectFeedbackAlignment,
    EstimatedGradient,
    ForwardGradient,
    GradientFree,
    PerExample,
    ZerothOrder,
)

every_way = pytest.mark.parametrize("way", WAYS)
ZO = ZerothOrder(samples=2, seed=0)

HOOKS = [name for owner in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(owner) if name[0] != "_"]
HOOKS.remove("configure_sharded_model")  # which may not stand beside configure_model
STEPS = ["training_step", "validation_step", "configure_optimizers", "configure_callbacks", "lr_scheduler_step"]
STEPS += ["backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"]
OF_A_CALLBACK = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]


def recorder(base: type, names: list[str], calls: list[Any]) -> type:
    """A class that writes down each call of its hooks, with the kinds of what it was given."""

    def recorded(name: str) -> Any:
        inherited = getattr(base, name)

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((base is Callback, name, [*map(kind, args), *map(kind, kwargs.values())]))
            return inherited(self, *args, **kwargs)

        hook.__signature__ = signature(inherited)  # type: ignore[attr-defined]
        return hook

    return type("Recorder", (base,), {name: recorded(name) for name in names if hasattr(base, name)})


def kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, list | tuple):
        return [kind(one) for one in value]
    if isinstance(value, LightningModule):
        return "module"
    if callable(value):
        return "callable"
    return value if isinstance(value, int | float | str) else type(value).__name__


class Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"},
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "val_loss"},
        ]


@pytest.mark.parametrize("estimator", [Backprop(), ZO], ids=lambda e: type(e).__name__)
@every_way
def test_every_hook_is_called_as_in_automatic_optimization(way: str, estimator: Any, tmp_path: Path) -> None:
    """Under zeroth order only the training step is called more often; its first call stands where it always does."""
    runs = []
    for one in ("plain", way):
        calls: list[Any] = []
        module, callbacks = made(recorder(Scheduled, HOOKS + STEPS, calls), one, estimator)
        checkpoint = ModelCheckpoint(tmp_path / one / str(estimator.is_exact), every_n_train_steps=2)
        seen = recorder(Callback, OF_A_CALLBACK, calls)()
        torch.manual_seed(7)
        trainer(
            tmp_path,
            *callbacks,
            seen,
            checkpoint,
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
        ).fit(module)
        runs.append((calls, module))
    (plain, automatic), (ours, estimated) = runs
    if estimator.is_exact:
        assert torch.equal(weights(automatic), weights(estimated))
    else:
        of_steps = [call for call in ours if call[1] == "training_step"]
        assert len(of_steps) == 4 * sum(call[1] == "training_step" for call in plain)
        ours = [call for before, call in zip([None, *ours], ours, strict=False) if call != before or not_a_step(call)]
    assert [call[:2] for call in ours] == [call[:2] for call in plain]
    assert ours == plain


def not_a_step(call: Any) -> bool:
    return call[1] != "training_step"


def schedules(optimizer: Any) -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler
    plateau = scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)
    watched = {"scheduler": plateau, "monitor": "val_loss", "strict": False}
    step = scheduler.StepLR(optimizer, 1, 0.5)
    return {
        "single": optimizer,
        "list": [optimizer],
        "tuple": (optimizer,),
        "two lists": ([optimizer], [step]),
        "list of configs": [{"optimizer": optimizer, "lr_scheduler": watched}],
        "dict": {"optimizer": optimizer},
        "dict with a schedule": {"optimizer": optimizer, "lr_scheduler": step},
        "dict with a plateau": {"optimizer": optimizer, "lr_scheduler": watched},
        "monitor beside": {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "train_loss"},
        "plateau by step": {"optimizer": optimizer, "lr_scheduler": {**watched, "interval": "step", "frequency": 2}},
        "every third step": {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": step, "interval": "step", "frequency": 3},
        },
        "every second epoch": {"optimizer": optimizer, "lr_scheduler": {"scheduler": step, "frequency": 2}},
    }


FORMS = list(schedules(torch.optim.SGD([torch.zeros(1, requires_grad=True)])))


CASES = [
    *((form, {}) for form in FORMS),
    ("dict with a plateau", {"val_check_interval": 3}),
    ("dict with a plateau", {"check_val_every_n_epoch": 2}),
    ("plateau by step", {"val_check_interval": 3}),
    ("every third step", {"accumulate_grad_batches": 3}),
]


@pytest.mark.parametrize(("form", "options"), CASES, ids=str)
def test_learning_rates_are_those_of_automatic_optimization(form: str, options: dict[str, Any], tmp_path: Path) -> None:
    class Formed(Net):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters(), "lr": 0.02}, {"params": self.net[1:].parameters()}]  # type: ignore[index]
            return schedules(torch.optim.SGD(groups, lr=0.01))[form]

    runs = [fitted(Formed, way, Backprop(), tmp_path, max_epochs=4, **options) for way in ("plain", *WAYS)]
    for run in runs[1:]:
        assert run.rates == runs[0].rates
        assert torch.equal(weights(run), weights(runs[0]))
    assert len(set(runs[0].rates)) == 1 or form not in ("single", "list", "tuple", "dict")
    module = fitted(Formed, "mixin", ZO, tmp_path, max_epochs=4, **options)
    if "plateau" not in form and "config" not in form and "monitor" not in form:  # which follow the loss
        assert module.rates == runs[0].rates


@every_way
def test_no_optimizer_is_refused(way: str, tmp_path: Path) -> None:
    class Without(Net):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(
        MisconfigurationException, match=r"Without.configure_optimizers gave no optimizer: nothing would"
    ):
        fitted(Without, way, ZO, tmp_path)


class Smooth(Net):
    """In float64, without what couples the examples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def train_dataloader(self) -> Any:
        return batches(32, self.size, torch.float64)

    def val_dataloader(self) -> Any:
        return batches(8, 4, torch.float64)

    size = 4


@pytest.mark.parametrize(
    "estimator",
    [
        Backprop(),
        DirectFeedbackAlignment(seed=0),
        ZerothOrder(stencil=CentralDifference(1e-4), samples=2, seed=0),
        ForwardGradient(seed=0),
    ],
    ids=lambda e: type(e).__name__,
)
@every_way
def test_accumulated_batches_are_one_step_on_their_mean_loss(way: str, estimator: Any, tmp_path: Path) -> None:
    """The batches of one optimizer step share its directions; in float64, as slopes are differences of losses."""

    class Whole(Smooth):
        size = 16

    parts = fitted(Smooth, way, estimator, tmp_path, accumulate_grad_batches=4)
    whole = fitted(Whole, way, estimator, tmp_path)
    assert parts.global_step == whole.global_step == 4
    # A loss near 1 is rounded to 1e-16, and divided by mu; the steps amplify that a little.
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-9, atol=1e-9)


@every_way
def test_hooks_of_parameters_see_the_estimate(way: str, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Hooked(Smooth):
        def __init__(self) -> None:
            super().__init__()
            first: Any = self.net[0]
            first.weight.register_hook(lambda g: seen.append(g.clone()) or g * 0.0)

    start = Hooked()
    module = fitted(Hooked, way, ZO, tmp_path, max_steps=1)
    assert seen[0].abs().sum() > 0
    assert torch.equal(module.net[0].weight, start.net[0].weight)  # type: ignore[union-attr]
    assert not torch.equal(module.net[2].weight, start.net[2].weight)  # type: ignore[union-attr]


@every_way
def test_the_estimate_becomes_grad_without_a_copy(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    estimate = ForwardGradient.estimate

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = estimate(*args, **kwargs)
        pairs = list(result.gradients)
        given[:] = [gradient.data_ptr() for _, gradient in pairs]
        return result._replace(gradients=iter(pairs))

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            assert [p.grad.data_ptr() for p in pl_module.parameters()] == given

    monkeypatch.setattr(ForwardGradient, "estimate", watched)
    fitted(Net, way, ForwardGradient(seed=0), tmp_path, Watch())
    assert given


@every_way
def test_a_loss_is_differentiated_once(way: str, tmp_path: Path) -> None:
    class Twice(Smooth):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward(retain_graph=True)
            loss.backward()

    with pytest.raises(RuntimeError, match="this loss has handed its gradient over already"):
        fitted(Twice, way, ZO, tmp_path)


@every_way
def test_a_backward_of_ones_own_may_scale_the_loss(way: str, tmp_path: Path) -> None:
    class Doubled(Smooth):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            (loss * 2).backward()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.005)

    class Usual(Smooth):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    ends = [weights(fitted(kind, way, ZO, tmp_path, max_steps=1)) for kind in (Doubled, Usual)]
    torch.testing.assert_close(*ends, rtol=1e-15, atol=1e-15)  # twice the gradient, half the rate


@every_way
def test_clipping_is_lightnings_own(way: str, tmp_path: Path) -> None:
    class Plain(Smooth):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    start = weights(Plain())
    module = fitted(Plain, way, ZO, tmp_path, max_steps=1, gradient_clip_val=1e-3)
    moved = (weights(module) - start).norm()
    assert float(moved) == pytest.approx(0.5e-3, rel=1e-2)  # lr times the norm; Lightning adds 1e-6 to the norm
    module = fitted(Plain, way, ZO, tmp_path, max_steps=1, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert float((weights(module) - start).abs().max()) == pytest.approx(0.5e-3, rel=1e-9)


@every_way
def test_warm_up_in_optimizer_step(way: str, tmp_path: Path) -> None:
    """The recipe of Lightning's documentation."""

    class WarmUp(Smooth):
        def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            if self.trainer.global_step < 5:
                for group in optimizer.param_groups:
                    group["lr"] = min(1.0, float(self.trainer.global_step + 1) / 5) * 0.01

    rates = [fitted(WarmUp, one, ZO, tmp_path).rates for one in ("plain", way)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 5


@every_way
def test_several_optimizers_are_refused(way: str, tmp_path: Path) -> None:
    class Two(Net):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net.parameters(), lr=0.1) for _ in range(2)], []

    with pytest.raises(MisconfigurationException, match=r"by one optimizer, \w*Two.configure_optimizers gave 2: make"):
        fitted(Two, way, ZO, tmp_path)


class Adversarial(Net):
    """A GAN, as one must write it: two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), lr=0.1) for _ in range(2)], []


class TakesIterator(Net):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return F.mse_loss(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Adversarial, "steps its optimizers itself.*call estimator.backward.* in place of manual_backward"),
        (TakesIterator, "takes a dataloader_iter, which cannot be asked twice"),
    ],
)
@every_way
def test_what_has_no_one_loss_of_a_batch_is_refused(kind: Any, message: str, way: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fitted(kind, way, ZO, tmp_path)


def test_a_class_whose_own_hook_forgets_the_mixin_is_trained_by_its_estimator(tmp_path: Path) -> None:
    class Forgets(EstimatedGradient, Net):
        estimator = ZO

        def setup(self, stage: str) -> None:
            pass

        def on_fit_start(self) -> None:
            pass

    module = Forgets()
    trainer(tmp_path).fit(module)
    assert module.forward_passes == 16 * 4

    class Steps(Adversarial):
        def on_fit_start(self) -> None:
            pass

    class ByHand(EstimatedGradient, Steps):
        def on_fit_start(self) -> None:
            pass

    with pytest.raises(MisconfigurationException, match="ByHand steps its optimizers itself"):
        trainer(tmp_path).fit(ByHand())


@every_way
def test_the_module_is_given_back(way: str, tmp_path: Path) -> None:
    module, callbacks = made(Net, way, ZO)
    before = set(vars(module))
    trainer(tmp_path, *callbacks).fit(module)
    assert set(vars(module)) - before <= {"_step_arity", "_hparams"}


@every_way
def test_no_loss_leaves_the_batch_out(way: str, tmp_path: Path) -> None:
    class Half(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module, callbacks = made(Half, way, ZO)
    trainer(tmp_path, *callbacks).fit(module)
    assert module.global_step == 16
    assert driver(module, callbacks).forward_passes == 8 * 4 + 8


@every_way
@pytest.mark.parametrize(
    "options",
    [{"fast_dev_run": True}, {"log_every_n_steps": 0}, {"barebones": True, "default": False}, {"overfit_batches": 2}],
    ids=str,
)
def test_ways_to_run_a_trainer(way: str, options: dict[str, Any], tmp_path: Path) -> None:
    from pytorch_lightning import Trainer

    module, callbacks = made(Net, way, ZO)
    if options.pop("default", True):
        fit = trainer(tmp_path, *callbacks, **{"max_epochs": 1, **options})
    else:
        fit = Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=callbacks, default_root_dir=tmp_path)
    fit.fit(module)
    assert driver(module, callbacks).forward_passes == 4 * fit.global_step > 0


@every_way
def test_validate_test_and_predict_are_untouched(way: str, tmp_path: Path) -> None:
    class All(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", F.mse_loss(self.net(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0])

    module, callbacks = made(All, way, ZO)
    fit = trainer(tmp_path, *callbacks)
    before = weights(module)
    fit.validate(module, batches(8), verbose=False)
    fit.test(module, batches(8), verbose=False)
    fit.predict(module, batches(8))
    assert torch.equal(weights(module), before)
    assert driver(module, callbacks).forward_passes == 0
    fit.fit(module)
    fit.test(module, batches(8), verbose=False)
    assert driver(module, callbacks).forward_passes == 64


def test_lean_memory_through_the_callback_gives_the_same_weights(tmp_path: Path) -> None:
    ends = []
    for memory in ("full", "lean"):
        module = Net()
        torch.manual_seed(7)
        trainer(tmp_path, GradientFree(ZO, memory=memory)).fit(module)  # type: ignore[arg-type]
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_mu_follows_the_learning_rate_through_the_callback(tmp_path: Path) -> None:
    callback = GradientFree(ZerothOrder(stencil=CentralDifference(1e-3), seed=0), mu_follows_lr=True)

    class Halves(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    trainer(tmp_path, callback).fit(Halves())
    assert callback.mu_in_use == pytest.approx(1e-3 / 4)


class Physics(Smooth):
    """A loss of the derivative of the net's output by its input."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x)[:, 0].sum(), x, create_graph=True)
        losses = (slope - 1).square().mean(1)
        return {"loss": losses.mean(), "losses": losses}


@pytest.mark.parametrize(
    "estimator", [ZerothOrder(samples=8, seed=0), ForwardGradient(samples=8, seed=0)], ids=lambda e: type(e).__name__
)
@every_way
def test_a_loss_of_derivatives_by_the_input(way: str, estimator: Any, tmp_path: Path) -> None:
    losses: list[float] = []

    class Watched(Physics):
        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:  # type: ignore[override]
            losses.append(float(outputs["loss"]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    module, callbacks = made(Watched, way, estimator)
    trainer(tmp_path, *callbacks, max_epochs=4).fit(module)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert all(p.grad is None or not p.grad.requires_grad for p in module.parameters())


def test_derivatives_by_the_input_are_refused_where_there_is_no_graph_to_be_had(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no graph under PerExample .*: for derivatives by the inputs take ZerothOr"):
        fitted(Physics, "mixin", PerExample(seed=0), tmp_path)
