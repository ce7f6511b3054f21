"""What has to hold on a CUDA device; skipped where there is none."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import (
    AdaMM,
    Backprop,
    Batched,
    CentralDifference,
    Classifier,
    Coordinate,
    Directions,
    Gaussian,
    GradientEstimator,
    LowRank,
    OneByOne,
    PerExample,
    Rademacher,
    ScalableCNN,
    Sphere,
    ZerothOrder,
)
from zo_lightning.callbacks import LastCheckpoint, TrajectoryLog
from zo_lightning.checkpoint_io import AtomicCheckpointIO
from zo_lightning.counter import Stream, philox
from zo_lightning.data import Digits
from zo_lightning.data.batches import TensorBatches
from zo_lightning.replay.rebuild import FOLDER, STEPS, replay_steps
from zo_lightning.replay.start import Start
from zo_lightning.step_log import Step, read_steps

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]
QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False),
    "accelerator": "gpu" if DEVICE == "cuda" else "cpu",
    "devices": 1,
    "max_epochs": -1,
}


def task(device: str, batch: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net, images, labels = ScalableCNN(1), torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
    return net.to(device), images.to(device), labels.to(device)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().cpu().flatten() for t in tensors])


def estimate(estimator: GradientEstimator, device: str, step: int = 0) -> Tensor:
    net, images, labels = task(device)
    loss = partial(lambda: F.cross_entropy(net(images), labels, reduction="none"))
    estimator.backward(loss, net, step, estimator.init(net))
    return flat(p.grad for p in net.parameters())


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def fit(module: LightningModule, *callbacks: Callback, batch: int = 64, size: int = 512, **options: Any) -> Trainer:
    torch.manual_seed(1)
    images, labels = torch.rand(size, 1, 28, 28), torch.randint(10, (size,))
    trainer = Trainer(**{**QUIET, "max_steps": 12, **options}, callbacks=list(callbacks))
    trainer.fit(module, TensorBatches(images, labels, batch))
    return trainer


@pytest.mark.parametrize("u", [Rademacher(), Gaussian(), Coordinate()])
def test_directions_are_those_of_the_cpu_to_the_last_bit(u: Directions) -> None:
    # 17 million signs are 276,000 words of 64 bits: more than the CPU computes for other devices.
    weights = [torch.empty(4200, 4200), torch.empty(3, 5)]
    there = [w.to(DEVICE) for w in weights]
    for a, b in zip(u.draw(weights, 3, 1, 2).tensors(), u.draw(there, 3, 1, 2).tensors(), strict=True):
        assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("u", [Sphere(), LowRank(2)])
def test_directions_of_which_sums_are_taken_are_those_of_the_cpu_to_rounding(u: Directions) -> None:
    weights = [torch.empty(300, 200), torch.empty(3, 5)]
    there = [w.to(DEVICE) for w in weights]
    for a, b in zip(u.draw(weights, 3, 1, 2).tensors(), u.draw(there, 3, 1, 2).tensors(), strict=True):
        # The norm of 60,015 numbers, and sums of two products: some roundings of 6e-8 each.
        assert torch.allclose(a, b.cpu(), rtol=1e-5, atol=1e-6)


def test_random_words_are_numpys() -> None:
    blocks = torch.arange(2**40, 2**40 + 1000, device=DEVICE)
    counters = torch.stack([blocks, *(torch.full_like(blocks, one) for one in (7, 0, 0))])
    words = philox(counters, (123, -45)).T.reshape(-1)
    assert torch.equal(words.cpu(), Stream(123, -45, 7).words(2**40, 4000, torch.device("cpu")))


@pytest.mark.parametrize("allowed", [False, True])
def test_first_slopes_are_those_of_the_cpu_whether_tf32_is_on_outside(allowed: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        for step in range(4):
            # A loss of 2.3 is rounded by some 1e-7, a slope by that over 2 mu: 1e-4 of one about 1. Losses in TF32 are
            # off by 1e-3, and their slopes by their own size.
            assert (
                distance(estimate(ZerothOrder(seed=0), DEVICE, step), estimate(ZerothOrder(seed=0), "cpu", step)) < 0.03
            )
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_the_mixin_trains_in_mixed_precision(precision: str) -> None:
    if DEVICE == "cpu" and precision == "16-mixed":
        pytest.skip("Lightning has no GradScaler for the CPU")
    net = ScalableCNN(1)
    before = flat(net.parameters())
    module = Classifier(net, ZerothOrder(stencil=CentralDifference(1e-2), seed=0), partial(torch.optim.SGD, lr=1e-3))
    trainer = fit(module, precision=precision)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    assert (scaler is not None) == (precision == "16-mixed")
    moved = flat(net.parameters()) - before
    assert module.skipped_steps == 0 and moved.isfinite().all() and moved.norm() > 0
    # Scaled by 65,536 and back: twelve steps of lr |slope| each, of slopes below 100, along directions of norm √d.
    assert moved.norm() < 12 * 1e-3 * 100 * len(moved) ** 0.5


@pytest.mark.parametrize("u", [Rademacher(), LowRank()])
def test_batched_finds_what_one_by_one_does(u: Directions) -> None:
    one, many = (
        estimate(ZerothOrder(u, evaluation=evaluation, samples=8, seed=0), DEVICE)
        for evaluation in (OneByOne(), Batched())
    )
    assert distance(many, one) < 0.03  # of slopes, whose losses are rounded differently; as above


def test_lean_training_takes_the_memory_of_inference_and_gives_the_same_weights() -> None:
    if DEVICE == "cpu":
        pytest.skip("only CUDA knows its peak")

    def peak(step: Callable[[nn.Module, torch.optim.Optimizer, Tensor], object]) -> tuple[int, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16))).to(DEVICE)
        optimizer, x = torch.optim.SGD(net.parameters(), 1e-3), torch.rand(4, 1024, device=DEVICE)
        F.linear(x, x)  # the workspace of cuBLAS
        gc.collect()  # of the one before
        begun = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(net, optimizer, x)
        return torch.cuda.max_memory_allocated() - begun, flat(net.parameters())

    def full(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        ZerothOrder(seed=0).backward(lambda: net(x).square().mean(), net, 0)
        optimizer.step()

    def exact(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        net(x).square().mean().backward()
        optimizer.step()

    used, weights = peak(
        lambda net, optimizer, x: ZerothOrder(seed=0).update(optimizer, lambda: net(x).square().mean(), net, 0)
    )
    _, same = peak(full)
    backpropagation, _ = peak(exact)
    assert torch.equal(weights, same)
    largest = 4 * 1024**2  # bytes of one of the sixteen weights; a few of those are alive at a time
    assert used < 6 * largest < 16 * largest <= backpropagation


def test_per_examples_estimate_is_that_of_the_cpu() -> None:
    there, here = (estimate(PerExample(seed=0), device) for device in (DEVICE, "cpu"))
    assert distance(there, here) < 0.03


@pytest.mark.parametrize("foreach", [False, True])
def test_adamm_moves_weights_as_on_the_cpu(foreach: bool) -> None:
    found = []
    for device in ("cpu", DEVICE):
        w = torch.linspace(-1, 1, 1000).to(device).requires_grad_()
        # 1 − β₂ is the same in float32, in which CUDA's kernel takes it: 0.999 would be off by 5e-5 there.
        optimizer = AdaMM([w], lr=1e-2, betas=(0.875, 1 - 2**-10), weight_decay=0.1, foreach=foreach)
        for step in range(10):
            w.grad = torch.sin(torch.arange(1000.0) * (step + 1)).to(device)
            optimizer.step()
        found.append(w.detach().cpu())
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6)  # ten steps of some roundings of 6e-8


def test_a_run_on_the_device_is_replayed_on_the_cpu(tmp_path: Path) -> None:
    module = Classifier(ScalableCNN(1 / 9), ZerothOrder(seed=0), partial(torch.optim.SGD, lr=1e-2))
    fit(module, TrajectoryLog(), default_root_dir=tmp_path)
    folder = next(tmp_path.rglob(STEPS)).parent
    assert folder.name == FOLDER
    # Without the hash at the end: the optimizer may round otherwise here.
    steps = [record for record in read_steps(folder / STEPS) if isinstance(record, Step)]
    rebuilt = replay_steps(Start.read(folder), steps)
    assert rebuilt.step == len(steps) == 12
    for name, value in module.state_dict().items():
        assert torch.allclose(rebuilt.tensors[name], value.cpu(), rtol=1e-5, atol=1e-6), name  # as many roundings


@pytest.mark.parametrize("estimator", [Backprop(), ZerothOrder(seed=0)], ids=["backprop", "zeroth_order"])
def test_a_run_with_dropout_goes_on_as_if_it_had_never_stopped(tmp_path: Path, estimator: GradientEstimator) -> None:
    def module() -> Classifier:
        seed_everything(3, verbose=False)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Dropout(0.5), nn.Linear(16, 10))
        return Classifier(net, estimator, partial(torch.optim.SGD, lr=1e-2))

    def run(name: str, steps: int, resume: Path | None = None) -> Classifier:
        own = {"save_dir": tmp_path, "name": "", "version": name}
        options = {**QUIET, "enable_checkpointing": True, "logger": CSVLogger(**own), "limit_val_batches": 0}
        trainer = Trainer(
            **options,
            max_steps=steps,
            callbacks=[LastCheckpoint(every_seconds=None)],
            plugins=[AtomicCheckpointIO()],
        )
        trained = module()
        if resume is not None:
            torch.rand(5, device=DEVICE)  # a new process is elsewhere in its numbers
        trainer.fit(trained, Digits(batch_size=256, val_size=600, seed=0), ckpt_path=resume)
        return trained

    whole, half = run("whole", 12), run("half", 6)
    assert not torch.equal(flat(half.parameters()), flat(whole.parameters()))
    rest = run("rest", 12, tmp_path / "half" / "checkpoints" / "last.ckpt")
    assert torch.equal(flat(rest.parameters()), flat(whole.parameters()))
