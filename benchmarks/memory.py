"""What training needs in memory beside the weights: peak resident memory above the start, each mode in its own process.

Two nets: a transformer of 97 million weights (8,000 tokens, width 768, 12 layers, batches of 2 x 32 tokens), and
ScalableCNN with 2,806,751 (batches of 128 images). On request (``--nets gpt2 gpt2_blocks``) the smallest GPT-2, 124
million weights at random (the same batches), with and without its embeddings trained. Float32, SGD. The modes are
inference (the loss without a graph), backpropagation, zeroth order with ``.grad`` in between (``estimator.backward``,
``optimizer.step``), and the same with one tensor's estimate at a time (``estimator.update``).

    python benchmarks/memory.py [--preset tiny] [--nets transformer] [--threads 2] [--csv FILE]

The start is when the weights exist and a small net of the same layers has taken a step, so that libraries, their pages
and the pool of threads do not count: without that step they are 9 MB for inference and 160 MB for backpropagation. The
peak is the kernel's own (VmHWM), reset at the start: Linux only. With the weights counted in, it is what a machine must
have for the run beside Python and PyTorch themselves.

The allocator is left as it is. glibc keeps tensors below 32 MB for later use, where ``MALLOC_MMAP_THRESHOLD_=131072``
gives them back at once: peaks of the transformer are then lower by 4 MB for inference and 50 MB for backpropagation.
"""

import argparse
import csv
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from zo_lightning import Backprop, GradientEstimator, Rademacher, ScalableCNN, ZerothOrder


class Transformer(nn.Module):
    """A language model: pre-norm encoder layers under a causal mask, with an output layer of its own."""

    def __init__(self, tokens: int, width: int, layers: int, length: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens) + self.position, self.mask, is_causal=True))


class Task(NamedTuple):
    """A net with a batch."""

    net: nn.Module
    inputs: Tensor
    labels: Tensor

    def loss(self) -> Tensor:
        """The mean cross-entropy."""
        return F.cross_entropy(self.net(self.inputs).flatten(0, -2), self.labels.flatten())


def transformer(tokens: int = 8000, width: int = 768, layers: int = 12) -> Task:
    """97 million weights by default."""
    sequence = torch.randint(tokens, (2, 33))
    return Task(Transformer(tokens, width, layers), sequence[:, :-1].clone(), sequence[:, 1:].clone())


def cnn(scale: float = 120 - 1 / 9, batch: int = 128) -> Task:
    """2,806,751 weights by default."""
    return Task(ScalableCNN(scale), torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,)))


class GPT2(nn.Module):
    """The net of ``transformers``, whose embedding is its output layer too: a third of the published one's weights."""

    def __init__(self, tokens: int, width: int, layers: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes: dict[str, Any] = {"vocab_size": tokens, "n_embd": width, "n_layer": layers}
        self.net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(input_ids=tokens, use_cache=False).logits


def gpt2(tokens: int = 50257, width: int = 768, layers: int = 12, frozen: tuple[str, ...] = ()) -> Task:
    """The smallest of the published ones by default."""
    sequence = torch.randint(tokens, (2, 33))
    task = Task(GPT2(tokens, width, layers), sequence[:, :-1].clone(), sequence[:, 1:].clone())
    for name, p in task.net.named_parameters():
        p.requires_grad_(not name.endswith(frozen))
    return task


EMBEDDINGS = "wte.weight", "wpe.weight"
TASKS: dict[str, dict[str, Callable[[], Task]]] = {
    "full": {"transformer": transformer, "cnn": cnn, "gpt2": gpt2, "gpt2_blocks": lambda: gpt2(frozen=EMBEDDINGS)},
    "tiny": {
        "transformer": lambda: transformer(100, 64, 2),
        "cnn": lambda: cnn(1, 8),
        "gpt2": lambda: gpt2(100, 48, 2),
        "gpt2_blocks": lambda: gpt2(100, 48, 2, EMBEDDINGS),
    },
}
MODES = ("inference", "backpropagation", "zeroth order", "zeroth order, lean")
STEPS = 3


def stepper(mode: str, task: Task) -> Callable[[int], object]:
    """One step of a mode."""
    if mode == "inference":
        return torch.no_grad()(lambda step: task.loss())
    estimator: GradientEstimator = Backprop() if mode == "backpropagation" else ZerothOrder(Rademacher(), seed=0)
    optimizer, state = (
        torch.optim.SGD([p for p in task.net.parameters() if p.requires_grad], 1e-4),
        estimator.init(task.net),
    )
    if mode == "zeroth order, lean":
        return lambda step: estimator.update(optimizer, task.loss, task.net, step, state)

    def step(index: int) -> None:
        estimator.backward(task.loss, task.net, index, state)
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory(field: str) -> int:
    """The process's resident memory in bytes: VmRSS now, or VmHWM, the most since ``start``."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def measure(preset: str, net: str, mode: str, threads: int) -> dict[str, int]:
    """In a process of its own: weights, memory at the start and at its peak, in bytes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    task = TASKS[preset][net]()
    small = stepper(mode, TASKS["tiny"][net]())
    for index in range(2):
        small(index)
    del small
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what making the weights has freed would be used again, and not be seen
    begun = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step = stepper(mode, task)
    for index in range(STEPS):
        step(index)
    return {"d": sum(p.numel() for p in task.net.parameters()), "start": begun, "peak": memory("VmHWM")}


def main() -> None:
    """Print a table, and the same as CSV on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(TASKS), default="full", help="tiny: a few seconds, to try it")
    parser.add_argument("--nets", nargs="+", choices=list(TASKS["full"]), default=["transformer", "cnn"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    parser.add_argument("--one", nargs=2, metavar=("NET", "MODE"), help="measure in this process, and print JSON")
    options = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        parser.error("only Linux tells a process's peak memory since a moment")
    if options.one:
        net, mode = options.one
        print(json.dumps(measure(options.preset, net, mode, options.threads)))
        return

    rows: list[tuple[object, ...]] = []
    wanted = [(net, mode) for net in options.nets for mode in options.modes]
    reference: dict[str, tuple[float, float]] = {}
    header = ("net", "d", "mode", "above_start_mb", "over_inference", "with_weights_mb", "with_weights_over_inference")
    print(f"{'net':<13}{'d':>11}  {'mode':<20}{'above the start':>18}{'ratio':>7}{'with weights':>16}{'ratio':>7}")
    for net, mode in tqdm(wanted, disable=not sys.stderr.isatty()):
        command = [sys.executable, __file__, "--preset", options.preset, "--threads", str(options.threads)]
        done = subprocess.run([*command, "--one", net, mode], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{net}, {mode}: the process that measures it failed")
        found = json.loads(done.stdout.splitlines()[-1])
        above, weights = (found["peak"] - found["start"]) / 2**20, found["d"] * 4 / 2**20
        if mode == "inference":
            reference[net] = above, above + weights
        least = reference.get(net, (float("nan"),) * 2)
        ratios = above / least[0] if least[0] else float("nan"), (above + weights) / least[1]
        rows.append((net, found["d"], mode, above, ratios[0], above + weights, ratios[1]))
        tqdm.write(
            f"{net:<13}{found['d']:>11,}  {mode:<20}{above:>15.1f} MB{ratios[0]:>7.2f}{above + weights:>13.1f} MB"
            f"{ratios[1]:>7.2f}"
        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows(
                [header, *([f"{v:.3f}" if isinstance(v, float) else v for v in row] for row in rows)]
            )


if __name__ == "__main__":
    sys.exit(main())
