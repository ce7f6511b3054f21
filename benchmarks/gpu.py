"""All that is to be known of a GPU, in one run of some minutes and one table: what is equal, how fast, how much memory.

    python -m benchmarks.gpu [--device cuda] [--root ../shared/data] [--only directions slopes] [--json FILE]

Each part is measured by itself; one that fails is named, and the others go on. With ``--device cpu`` sizes are small:
that only shows that everything runs. TF32 is off where nothing else is said, as it is in every estimate.
"""

import argparse
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from pytorch_lightning import Trainer, seed_everything
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import memory, step_cost
from benchmarks.step_cost import SCALES, SGD, SIGNS, SPHERE, Step, bare, lean, machine, ours, seconds, task
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
from zo_lightning.counter import Stream, philox
from zo_lightning.data import MNIST, Digits
from zo_lightning.data.batches import TensorBatches
from zo_lightning.objective import Objective, tf32

Rows = Iterator[tuple[str, str]]
"""What was measured, and what came out."""


class Run:
    """Where to measure.

    Attributes:
        device: the GPU, or the CPU.
        small: whether it is only to be shown that everything runs.
        scales: of ScalableCNN.
        repeats: of each timing.
        root: of MNIST.
    """

    def __init__(self, device: str, root: Path) -> None:
        self.device, self.root = device, root
        self.small = device == "cpu"
        self.scales = SCALES[:1] if self.small else SCALES
        self.repeats = 3 if self.small else 30

    def milliseconds(self, *steps: Step) -> list[list[float]]:
        """Times of steps that take turns, the first few left out."""
        times = [[seconds(step, index) * 1e3 for step in steps] for index in range(3 + self.repeats)][3:]
        return [list(column) for column in zip(*times, strict=True)]


def directions(run: Run) -> Rows:
    """Whether directions are those of the CPU; the large tensor's numbers are computed on the device itself."""
    key, block = (123, 45), 2**40
    counters = torch.stack([torch.arange(block, block + 100), *(torch.tensor(one).expand(100) for one in (7, 0, 0))])
    words = philox(counters.to(run.device), key).T.reshape(-1).cpu()
    yield "random words", equal(words, Stream(*key, 7).words(block, 400, torch.device("cpu")))
    large = 3000 if run.small else 4200  # 17 million signs are 276,000 words, more than the CPU computes for others
    weights = [torch.empty(large, large), torch.empty(3, 5), torch.empty(7)]
    there = [w.to(run.device) for w in weights]
    kinds: list[Directions] = [Rademacher(), Gaussian(), Sphere(), LowRank(2), Coordinate()]
    for u in kinds:
        pairs = zip(u.draw(weights, 0, 1, 2).tensors(), u.draw(there, 0, 1, 2).tensors(), strict=True)
        yield type(u).__name__, "; ".join(equal(a, b.cpu()) for a, b in pairs)


def equal(a: Tensor, b: Tensor) -> str:
    """Whether two tensors are equal to the last bit, or by how much they differ at most, over the largest number."""
    if torch.equal(a, b):
        return "equal, bit for bit"
    return f"differs by {float((a - b).abs().max() / a.abs().max()):.1e}"


def slopes_of(task: step_cost.Task, mu: float, count: int = 8, **autocast: Any) -> Tensor:
    """Central differences along some signs, without an estimator: at the precision that holds outside."""
    net, images, labels = task
    weights = dict(net.named_parameters())
    first = next(iter(weights.values()))
    images = images.to(first.dtype)
    found = []
    with torch.no_grad(), torch.autocast(first.device.type, **{"enabled": False, **autocast}):
        for index in range(count):
            u = Rademacher().draw(list(weights.values()), 0, 0, index).tensors()
            losses = []
            for sign in (1, -1):
                moved = {name: w + sign * mu * d for (name, w), d in zip(weights.items(), u, strict=True)}
                losses.append(float(F.cross_entropy(functional_call(net, moved, (images,)), labels)))
            found.append((losses[0] - losses[1]) / (2 * mu))
    return torch.tensor(found, dtype=torch.float64)


def slopes(run: Run) -> Rows:
    """How far slopes are from those in float64: on the CPU, on the device, with TF32, under autocast."""
    for scale in run.scales[:2]:
        net, images, labels = task(scale, 128)
        name = f"d={sum(p.numel() for p in net.parameters()):,}, mu=1e-3"
        exact = slopes_of((net.double(), images, labels), 1e-3)
        cpu, there = task(scale, 128), task(scale, 128, run.device)
        estimated = estimated_slopes(cpu)
        yield f"{name}: on the CPU", error(slopes_of(cpu, 1e-3), exact)
        with tf32(False):
            yield f"{name}: TF32 off", error(slopes_of(there, 1e-3), exact)
            half = slopes_of(there, 1e-3, enabled=True, dtype=torch.bfloat16)
            yield f"{name}: bfloat16 autocast", error(half, exact)
        with tf32(True):
            yield f"{name}: TF32 on", error(slopes_of(there, 1e-3), exact)
            yield f"{name}: of ZerothOrder, TF32 on outside, from the CPU's", error(estimated_slopes(there), estimated)


def error(found: Tensor, exact: Tensor) -> str:
    """The root mean square of the differences over that of the numbers."""
    return f"relative error {float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt()):.1e}"


def estimated_slopes(task: step_cost.Task) -> Tensor:
    """Along the signs of four steps, as ``ZerothOrder`` finds them."""
    net, images, labels = task
    estimator, found = ZerothOrder(seed=0), []
    for step in range(4):
        objective = Objective(lambda: F.cross_entropy(net(images), labels), net)
        found += estimator.estimate(objective, net, step, estimator.init(net)).slopes
    return torch.tensor(found, dtype=torch.float64)


def estimate(estimator: GradientEstimator, task: step_cost.Task, step: int) -> Tensor:
    """The estimated gradient as one vector of the CPU."""
    net, images, labels = task
    net.zero_grad()
    estimator.backward(lambda: F.cross_entropy(net(images), labels, reduction="none"), net, step, estimator.init(net))
    return torch.cat([cast(Tensor, p.grad).flatten() for p in net.parameters()]).cpu()


def mixed_precision(run: Run) -> Rows:
    """Training by the mixin in half precision: losses, and seconds over those in float32."""
    x, y = task(SCALES[0], 32 * 128)[1:]
    took: dict[str, float] = {}
    precisions: list[Any] = ["32-true", "bf16-mixed", *([] if run.small else ["16-mixed"])]
    for precision in precisions:
        seed_everything(0, verbose=False)
        watch = step_cost.Stopwatch()
        net = ScalableCNN(run.scales[-1])
        before = flat(net)
        trainer = Trainer(**quiet(run), precision=precision, max_steps=30, callbacks=[watch])
        estimator = ZerothOrder(stencil=CentralDifference(1e-2), seed=0)
        trainer.fit(Classifier(net, estimator, SGD), TensorBatches(x, y, 128))
        took[precision] = median(watch.steps[8:])
        moved = flat(net) - before
        finite = "finite" if moved.isfinite().all() else "NOT FINITE"
        yield precision, f"{took[precision] * 1e3:.2f} ms a step, weights {finite}, moved by {float(moved.norm()):.2e}"


def adamm(run: Run) -> Rows:
    """AdaMM's step by the fused kernel, and by ``torch._foreach``."""
    for scale in run.scales:
        steps = []
        for foreach in (False, True):
            weights = list(ScalableCNN(scale).to(run.device).parameters())
            for w in weights:
                w.grad = torch.randn_like(w)
            steps.append(partial(lambda optimizer, _: optimizer.step(), AdaMM(weights, foreach=foreach)))
        fused, foreach = map(median, run.milliseconds(*steps))
        yield f"scale {scale:.2f}", f"fused {fused:.3f} ms, foreach {foreach:.3f} ms, {foreach / fused:.1f} times"


def batched(run: Run) -> Rows:
    """32 directions at batch 32 in one pass, over one by one; 15 times is the aim."""
    for scale in run.scales:
        for u in (Rademacher(), LowRank()):
            steps = [
                ours(ZerothOrder(u, evaluation=evaluation, samples=32, seed=0), SGD, task(scale, 32, run.device))
                for evaluation in (OneByOne(), Batched())
            ]
            one, many = run.milliseconds(*steps)
            gain = median(a / b for a, b in zip(one, many, strict=True))
            yield (
                f"scale {scale:.2f}, {type(u).__name__}",
                f"{median(one):.1f} ms, {median(many):.1f} ms: {gain:.1f} times",
            )


def throughput(run: Run) -> Rows:
    """Examples a second of 32 low-rank directions in one pass, over those of a plain pass; 60 % is the aim."""
    width, batch, samples = (64, 4, 4) if run.small else (4096, 128, 32)
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU()))).to(run.device)
    wide = net, torch.rand(batch, width, device=run.device), torch.randint(10, (batch,), device=run.device)
    tasks = {f"4 linear layers of {width}": wide, "ScalableCNN": task(run.scales[-1], batch, run.device)}
    for name, (net, x, labels) in tasks.items():
        many, their_labels = x.repeat(2 * samples, *[1] * (x.ndim - 1)), labels.repeat(2 * samples)

        @torch.no_grad()
        def plain(_: int, net: nn.Module = net, many: Tensor = many, labels: Tensor = their_labels) -> object:
            return F.cross_entropy(net(many), labels).item()

        estimator = ZerothOrder(LowRank(), evaluation=Batched(), samples=samples, seed=0)
        step, one = run.milliseconds(ours(estimator, SGD, (net, x, labels)), plain)
        share = median(b / a for a, b in zip(step, one, strict=True))
        yield (
            f"{name}, {samples} directions, batch {batch}",
            f"{median(step):.1f} ms, plain pass {median(one):.1f} ms: {share:.0%}",
        )


def memory_of(run: Run) -> Rows:
    """Peaks of allocated memory on a transformer, above the weights and with them, over those of inference."""
    inference = 0.0
    for mode in memory.MODES:
        torch.manual_seed(0)
        tasks = [memory.TASKS[size]["transformer"]() for size in ("tiny", "tiny" if run.small else "full")]
        small, large = (memory.Task(one.net.to(run.device), *(t.to(run.device) for t in one[1:])) for one in tasks)
        memory.stepper(mode, small)(0)  # what libraries allocate once, such as the workspace of cuBLAS
        del tasks, small
        step = memory.stepper(mode, large)
        if run.small:
            step(0)
            yield mode, "runs; memory is measured on CUDA alone"
            continue
        begun = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for index in range(memory.STEPS):
            step(index)
        above = torch.cuda.max_memory_allocated() - begun
        whole = above + sum(p.numel() * p.element_size() for p in large.net.parameters())
        inference = inference or whole
        yield mode, f"{above / 2**20:.1f} MB above, {whole / 2**20:.1f} MB with weights, {whole / inference:.2f} times"
        del large, step


def per_example(run: Run) -> Rows:
    """PerExample's estimate on both devices, and its step over one of backpropagation."""
    for scale in run.scales:
        a, b = (estimate(PerExample(seed=0), task(scale, 128, device), 0) for device in ("cpu", run.device))
        yield f"scale {scale:.2f}, estimate", f"{equal(a, b)}, cosine {float(F.cosine_similarity(a, b, 0)):.6f}"
        there = partial(task, scale, 128, run.device)
        step, other = run.milliseconds(
            ours(PerExample(seed=0), torch.optim.Adam, there()), step_cost.backpropagation(there())
        )
        ratio = median(x / y for x, y in zip(step, other, strict=True))
        yield f"scale {scale:.2f}, step", f"{median(step):.2f} ms, backpropagation {median(other):.2f} ms: {ratio:.2f}"


def step_costs(run: Run) -> Rows:
    """A whole step over two bare forward passes."""
    kinds: dict[str, Callable[[step_cost.Task], Step]] = {
        "backpropagation, Adam": step_cost.backpropagation,
        "MeZO, plain loop": step_cost.mezo,
        "signs, SGD": partial(ours, SIGNS, SGD),
        "signs, SGD, lean": partial(lean, SIGNS, SGD),
        "sphere, AdaMM": partial(ours, SPHERE, AdaMM),
        "PerExample, Adam": partial(ours, PerExample(seed=0), torch.optim.Adam),
    }
    for scale in run.scales:
        there = partial(task, scale, 128, run.device)
        passes, *times = run.milliseconds(bare(there()), *(make(there()) for make in kinds.values()))
        for name, found in zip(kinds, times, strict=True):
            ratio = median(a / b for a, b in zip(found, passes, strict=True))
            yield f"scale {scale:.2f}, {name}", f"{median(found):.2f} ms, {ratio:.2f} times two passes"


class Reads(TorchDispatchMode):
    """Counts the numbers that the CPU reads from a tensor, for each of which it waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waits(run: Run) -> Rows:
    """How often a step waits for the device: reads of a number, and on CUDA what PyTorch itself reports."""
    for name, estimator in {"signs": SIGNS, "sphere": SPHERE, "backpropagation": Backprop()}.items():
        step = ours(estimator, SGD, task(run.scales[0], 128, run.device))
        step(0)
        with Reads() as reads:
            step(1)
        reported = ""
        if not run.small:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    step(2)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            reported = (
                f", {sum('synchroniz' in str(one.message) for one in caught)} synchronizing calls by CUDA's count"
            )
        yield f"{name}, plain loop", f"{reads.count} numbers read{reported}"


def training(run: Run) -> Rows:
    """The same short training on both devices, by one seed: the weights' distance, and test accuracies."""
    found: list[Tensor] = []
    for there in (Run("cpu", run.root), run):
        seed_everything(42, verbose=False)
        mnist = (run.root / "MNIST" / "raw").is_dir() and not run.small
        data = MNIST(root=str(run.root), val_size=0, seed=0, download=False) if mnist else Digits(val_size=0, seed=0)
        model = Classifier(ScalableCNN(SCALES[0]), ZerothOrder(seed=0), partial(AdaMM, lr=4e-3, betas=(0.9, 0.99)))
        trainer = Trainer(**quiet(there), max_steps=20 if run.small else 1500, limit_val_batches=0)
        began = time.perf_counter()
        trainer.fit(model, data)
        took = time.perf_counter() - began
        accuracy = trainer.test(model, data, verbose=False)[0]["test/acc"]
        yield f"{type(data).__name__} on {there.device}", f"test accuracy {accuracy:.4f}, {took:.1f} s"
        found.append(flat(model))
    yield "the weights' cosine", f"{float(F.cosine_similarity(found[0], found[1], 0)):.6f}"


def flat(net: nn.Module) -> Tensor:
    """All weights as one vector of the CPU."""
    return torch.cat([p.detach().cpu().flatten() for p in net.parameters()])


def quiet(run: Run) -> dict[str, Any]:
    """A trainer's settings."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    return {**off, "accelerator": "cpu" if run.device == "cpu" else "cuda", "devices": 1, "max_epochs": -1}


PARTS: dict[str, Callable[[Run], Rows]] = {
    "directions": directions,
    "slopes": slopes,
    "precision": mixed_precision,
    "adamm": adamm,
    "batched": batched,
    "throughput": throughput,
    "memory": memory_of,
    "per_example": per_example,
    "step_cost": step_costs,
    "waits": waits,
    "training": training,
}


def main() -> int:
    """Print the table as it comes to be, and the same as JSON on request; 1 if a part has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="(default: cuda)")
    parser.add_argument(
        "--root", type=Path, default=Path("../shared/data"), help="of MNIST; else scikit-learn's digits"
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--json", type=Path, help="also write the table, and what it belongs to, to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here: --device cpu shows that everything runs")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    run, rows, failed = Run(options.device, options.root), [], []
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "none"
    print(f"| part | what | {gpu if options.device == 'cuda' else 'CPU, small sizes'} |\n|---|---|---|")
    for part in options.only:
        began = time.perf_counter()
        try:
            for what, found in PARTS[part](run):
                rows.append({"part": part, "what": what, "found": found})
                print(f"| {part} | {what} | {found} |", flush=True)
        except Exception:
            failed.append(part)
            print(f"| {part} | FAILED | see below |", flush=True)
            traceback.print_exc()
        print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(
                json.dumps({**machine(), "gpu": gpu, "failed": failed, "rows": rows}, indent=1) + "\n"
            )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
