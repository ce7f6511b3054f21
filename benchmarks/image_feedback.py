"""Estimators that send errors straight to layers, on a deep convolutional net: cosines by layer, and accuracies.

    python benchmarks/image_feedback.py --root data [--only cosines accuracy] [--steps 300] [--width 8]

``--root`` holds ``cifar10_images.tar.gz``. Cosines are those between each estimate and the gradient of its own batch,
for each convolution, along a run of backpropagation, means over its last quarter. Accuracies are on 1,000 images held
out of the training set. ``SmallVGG``, with and without batch normalisation, batches of 64, Adam, one seed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning import Backprop, DirectFeedbackAlignment, GradientEstimator, Objective, PerExample, SmallVGG
from zo_lightning.data.cifar10_images import ARCHIVE, decoded

BATCH, HELD_OUT, TESTED = 64, 5000, 1000
ESTIMATORS: dict[str, tuple[GradientEstimator, float]] = {  # each with its learning rate
    "backpropagation": (Backprop(), 3e-3),
    "PerExample": (PerExample(seed=0), 3e-3),
    "PerExample, no correction": (PerExample(correction=0, seed=0), 3e-3),
    "the same, feedback 1": (PerExample(correction=0, feedback=1.0, seed=0), 3e-3),
    "the same, patches of 4": (PerExample(correction=0, patch=4, seed=0), 3e-3),
    "direct feedback alignment": (DirectFeedbackAlignment(seed=0), 1e-3),
    "node perturbation": (PerExample(feedback=0, space="activations", seed=0), 3e-4),
    "the last layer alone": (Backprop(), 3e-3),
}


def prepared(images: Tensor) -> Tensor:
    """Pictures with about mean 0 and variance 1."""
    return (images.float() / 255 - 0.47) / 0.25


def made(width: int, batch_norm: bool, lr: float, last_alone: bool = False) -> tuple[SmallVGG, torch.optim.Optimizer]:
    """The net, and Adam."""
    torch.manual_seed(0)
    net = SmallVGG(width, batch_norm)
    for name, p in net.named_parameters():
        p.requires_grad_(not last_alone or name.startswith("fc"))
    return net, torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.99))


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """The losses of a batch's examples."""
    return lambda: F.cross_entropy(net(x), y, reduction="none")


def cosines(images: Tensor, labels: Tensor, width: int, batch_norm: bool, steps: int) -> dict[str, list[float]]:
    """By estimator, the mean cosine of each convolution's gradient."""
    net, optimizer = made(width, batch_norm, 1e-3)
    compared = {name: (one, one.init(net)) for name, (one, _) in ESTIMATORS.items() if not one.is_exact}
    filters = [conv.weight for conv in net.convs]
    sums, counted = {name: torch.zeros(len(filters)) for name in compared}, 0
    draws = torch.Generator().manual_seed(1)
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=draws)
        loss = loss_of(net, prepared(images[chosen]), labels[chosen])
        found: dict[str, list[Tensor]] = {}
        for name, (estimator, state) in compared.items():
            net.zero_grad()
            estimator.backward(loss, net, step, state)
            found[name] = [w.grad.flatten() for w in filters]  # type: ignore[union-attr,operator]
        net.zero_grad()
        Backprop().backward(loss, net, step)
        if step >= steps * 3 // 4:
            counted += 1
            for name, gradients in found.items():
                pairs = zip(gradients, filters, strict=True)
                sums[name] += torch.stack([F.cosine_similarity(g, w.grad.flatten(), 0) for g, w in pairs])  # type: ignore[union-attr,operator]
        optimizer.step()
    return {name: (total / counted).tolist() for name, total in sums.items()}


def accuracy(images: Tensor, labels: Tensor, name: str, width: int, batch_norm: bool, steps: int) -> float:
    """Of held-out images, after some steps."""
    estimator, lr = ESTIMATORS[name]
    net, optimizer = made(width, batch_norm, lr, name == "the last layer alone")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held, rest = order[:TESTED], order[HELD_OUT:]
    state, draws = estimator.init(net), torch.Generator().manual_seed(1)
    for step in range(steps):
        chosen = rest[torch.randint(len(rest), (BATCH,), generator=draws)]
        objective = Objective(loss_of(net, prepared(images[chosen]), labels[chosen]), net)
        optimizer.zero_grad()
        estimator.backward(objective, net, step, state)
        with torch.no_grad():
            objective.commit()  # the running statistics
        optimizer.step()
    net.eval()
    with torch.no_grad():
        found = torch.cat([net(x).argmax(1) for x in prepared(images[held]).split(250)])
    return float((found == labels[held]).float().mean())


def main() -> None:
    """Print a line for each net and estimator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--only", nargs="+", choices=["cosines", "accuracy"], default=["cosines", "accuracy"])
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--steps", type=int, default=300, help="of a training; cosines take 160")
    parser.add_argument("--width", type=int, default=8)
    options = parser.parse_args()
    images, labels = decoded(Path(options.root) / ARCHIVE)["train"]
    for batch_norm in (True, False):
        net = f"batch normalisation: {'yes' if batch_norm else 'no'}"
        if "cosines" in options.only:
            steps = min(options.steps, 160)
            for name, values in cosines(images, labels, options.width, batch_norm, steps).items():
                print(f"{net} | {name} | cosines {' '.join(f'{value:.2f}' for value in values)}", flush=True)
        for name in options.estimators if "accuracy" in options.only else ():
            found = accuracy(images, labels, name, options.width, batch_norm, options.steps)
            print(f"{net} | {name} | accuracy {found:.3f}", flush=True)


if __name__ == "__main__":
    main()
