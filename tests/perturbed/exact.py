"""What noise for each example can know of a net, against autograd, exactly."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zo_lightning.estimators.per_example.look import Look
from zo_lightning.estimators.per_example.state import PerExampleState
from zo_lightning.objective import Objective
from zo_lightning.perturbed.layouts import FIRST
from zo_lightning.perturbed.outputs import DisplacedOutputs, Use
from zo_lightning.perturbed.rules import weigh
from zo_lightning.perturbed.weights import Weights


def look(net: nn.Module, losses: Callable[[], Tensor], space: str = "auto") -> PerExampleState:
    """What one look at a net shows."""
    state = PerExampleState()
    objective = Objective(losses, net)
    with objective.guard():
        Look(objective, net, Weights.of(net), 0, lambda name: space, False).take(state)
    return state


def assert_exact(net: nn.Module, losses: Callable[[], Tensor], space: str = "auto") -> PerExampleState:
    """For each example, its noise reaches its loss alone, and the gradients by layers' outputs give those by weights.

    ``dℓᵢ/dW = Σₗ vjpₗ(dℓᵢ/dzₗ)`` for each weight, over all its uses, and ``<jvpₗ(U)ᵢ, dℓᵢ/dzₗ> = <U, vjpₗ(dℓᵢ/dzₗ)>``
    for each use with noise on the weights; all in float64, for a net that is one.
    """
    state, weights = look(net, losses, space), Weights.of(net)
    assert not state.shared
    moved: dict[str, Tensor] = {}

    def zero(use: Use) -> Tensor:
        moved[use.key] = torch.zeros_like(use.output).requires_grad_()
        return moved[use.key]

    watched = DisplacedOutputs(net, weights, zero, 1.0, buffers=state.buffers)
    objective = Objective(losses, net)
    with objective.probe(), torch.enable_grad():
        with watched:
            of_examples = losses()
        _assert_exact(state, weights, watched, moved, of_examples)
    return state


def _assert_exact(
    state: PerExampleState, weights: Weights, watched: DisplacedOutputs, moved: dict[str, Tensor], of_examples: Tensor
) -> None:
    examples = len(of_examples)
    generator = torch.Generator().manual_seed(0)
    for i, loss in enumerate(of_examples):
        grads = torch.autograd.grad(loss, [*moved.values(), *weights], retain_graph=True, allow_unused=True)
        by_output = dict(zip(moved, grads, strict=False))
        total = {id(w): torch.zeros_like(w) for w in weights}
        for key, g in by_output.items():
            if g is None:
                continue
            layer, operation = state.layers[key], watched.uses[key].operation
            rows = layer.layout.rows(g, examples)
            assert not torch.cat([rows[:i], rows[i + 1 :]]).any(), f"{key}: example {i} is not there: {layer.layout}"
            with torch.no_grad():
                found = operation.weight_vjp(layer.layout.restore(rows, g.shape))
            for w, grad in zip(operation.weights, found, strict=True):
                total[id(w)] += grad
            if layer.in_weights:
                noise = [(torch.randn(examples, w.numel(), dtype=w.dtype, generator=generator),) for w in found]
                with torch.no_grad():
                    in_order = layer.layout == FIRST
                    jvp = operation.weight_jvp(noise) if in_order else operation.weight_jvp_in(layer.layout, noise)
                left = (layer.layout.rows(jvp, examples)[i] * rows[i]).sum()
                one = torch.eye(examples, dtype=rows.dtype)[i]
                right = sum((weigh(n, one, w) * w).sum() for n, w in zip(noise, found, strict=True))
                torch.testing.assert_close(left, right, msg=key)
        for name, w, exact in zip(weights.names, weights, grads[len(moved) :], strict=True):
            exact = torch.zeros_like(w) if exact is None else exact
            torch.testing.assert_close(total[id(w)], exact, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
