"""Two training loops on a whole data set: by the value of a loss alone, and by its gradient."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import zo_lightning as zo
from zo_lightning.costs import count_flops


def by_value(net: nn.Module, loss: Callable[[], float], lr: float, mu: float, steps: int) -> float:
    """All that is ours. Returns what it cost in GFLOP."""
    optimizer = zo.NormalizedSGD(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    estimator = zo.ZerothOrder(stencil=zo.CentralDifference(mu), samples=8)
    for step in range(steps):
        estimator.backward(loss, net, step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return steps * 16 * count_flops(loss) / 1e9


def by_backprop(net: nn.Module, loss: Callable[[], Tensor], lr: float, steps: int = 300) -> float:
    """Where the loss has a gradient. Returns what it cost in GFLOP."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return steps * count_flops(lambda: loss().backward()) / 1e9
