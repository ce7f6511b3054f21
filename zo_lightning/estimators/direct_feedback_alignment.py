"""Errors sent straight from the net's output to every layer, by random matrices that never change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from zo_lightning.counter import mix
from zo_lightning.directions import Gaussian
from zo_lightning.distributed import Distributed, finite_everywhere, world_size
from zo_lightning.estimators.base import Estimate, GradientEstimator, like_weight, resolve_seed, trained
from zo_lightning.estimators.per_example.output import summed
from zo_lightning.objective import Objective
from zo_lightning.parameters import Parameters
from zo_lightning.perturbed.cut import Cut, CutAtLayers
from zo_lightning.perturbed.layouts import Layout, layouts_of
from zo_lightning.perturbed.state import State
from zo_lightning.perturbed.weights import Weights

_NORMAL = Gaussian()


class FeedbackMaps(State):
    """The random matrices of one module, kept from step to step: the seed alone decides them, so none is saved."""

    def __init__(self) -> None:
        super().__init__()
        self._maps: dict[int, Tensor] = {}

    def of(self, stream: int, sizes: tuple[int, int], like: Tensor) -> Tensor:
        """``Bᵀ`` of a layer, [C, n], with entries of variance 1 / C: drawn when it is first asked for.

        Args:
            stream: the seed of its numbers.
            sizes: ``C`` and ``n``.
            like: says on which device, and of which type.
        """
        weight = self._maps.get(stream, like)
        if weight.shape != sizes or weight.device != like.device or weight.dtype != like.dtype:
            place = torch.empty(sizes, device=like.device, dtype=like.dtype)
            weight = _NORMAL.draw([place], stream, 0, 0)[0] / math.sqrt(sizes[0])
            self._maps[stream] = weight
        return weight


@dataclass(frozen=True)
class DirectFeedbackAlignment(GradientEstimator):
    """Every layer learns from the error at the net's output, which a fixed random matrix of its own sends to it.

    One forward pass gives the loss, and the loss alone its gradient ``e`` [B, C] by the net's output. A hidden layer
    ``l`` with pre-activations ``aₗ`` and inputs ``xₗ`` is told, in place of what backpropagation through all layers
    above would say,

    ``δₗ = (Bₗ e) ∘ f'(aₗ)``,  ``ĝₗ = δₗ xₗᵀ``,

    with ``Bₗ`` drawn once, entries independent and normal with variance ``1 / C``. The last layer gets its exact
    gradient. There is no transposed weight, no layer waits for the one above, and no noise is needed: a step is one
    pass, and as much again for the gradients by the weights. The estimate is *biased*: that it trains is because the
    weights come to be aligned with the feedback. So expect less than of backpropagation: near it in fully connected
    nets, far from it in deep convolutional ones (Launay, Poli & Krzakala, *Principled training of neural networks with
    direct feedback alignment*, 2019).

    ``f'`` is the derivative of all that is between two layers. Feedback arrives where the next layer takes its input,
    and autograd leads it back from there through activations, poolings, normalisations, dropout, attention and
    whatever else has no weights that mix numbers, as far as the layers that made it, and no further. A path around
    layers, as in a residual net, brings a layer the feedback of every layer that it leads to. All layers whose outputs
    the loss sees without another layer in between are last ones; ``C`` counts their outputs for one example, and where
    that is above 4,096 they are taken as 256 random sums (``summed``).

    Limits: frozen layers do not cut the graph, so feedback goes back through their transposed weights. A module that
    PyTorch sees as one function (an LSTM, ``F.multi_head_attention_forward``) is one layer, differentiated exactly
    within. Memory: that of backpropagation, and the matrices, ``C n`` numbers for a layer with ``n`` inputs. Source:
    Nøkland, *Direct feedback alignment provides learning in deep neural networks*, 2016; its matrices are uniform.

    Args:
        seed: of the matrices, and of the random numbers that the loss draws; None: as in ``ZerothOrder``.
        distributed: how several processes share a step: their estimates are averaged, each from a batch of its own, or
            from the same one with ``split="directions"``, where there is nothing to split.

    Raises:
        ValueError: in ``backward``: no graph leads to the loss, TorchScript hides layers, or the input of a layer
            has no dimension with the examples, which are the first dimension of the output.
    """

    seed: int | None = None
    distributed: Distributed = field(default_factory=Distributed)

    def expected_cosine(self, d: float, share: float = 1.0, examples: int = 1, spread: float = 1.0) -> float:
        """NaN: no theory says how well it is aligned."""
        return math.nan

    def init(self, module: Parameters) -> FeedbackMaps:
        """A state that has drawn nothing yet."""
        return FeedbackMaps()

    @torch.no_grad()
    def estimate(
        self, objective: Objective, module: nn.Module, step: int, state: State, lean: bool = False
    ) -> Estimate:
        """Run the loss once, with a graph that is cut at every layer, and send the error into each piece of it."""
        seed, maps = resolve_seed(self.seed), cast(FeedbackMaps, state)
        objective.begin(mix(seed, step, *self.distributed.stream))
        weights = trained(objective, module)
        if weights.opaque:
            name = weights.names[min(weights.opaque)]
            raise ValueError(
                f"DirectFeedbackAlignment cannot see the layer of {name}: TorchScript hides it. Leave the "
                "module as it is, or take ZerothOrder"
            )
        passed = CutAtLayers(module, weights, objective.before_write)
        with finite_everywhere(weights[0].device, step), objective.probe(cost=2), torch.enable_grad():
            with passed:
                loss = objective.differentiable()
            gradients = _gradients(loss, passed, weights, maps, seed)
        pairs = [(p, like_weight(p, g)) for p, g in zip(weights, gradients, strict=True)]
        estimate = Estimate(loss.detach(), pairs)
        means = [estimate.loss, *(gradient for _, gradient in pairs)]
        self.distributed.reduce(means, world_size(), weights, seed, step)
        return estimate


def _gradients(
    loss: Tensor, passed: CutAtLayers, weights: Weights, maps: FeedbackMaps, seed: int
) -> Sequence[Tensor | None]:
    """The gradients by the weights, where each layer's input is given random feedback for its own."""
    ends, feedback = [loss], [torch.ones_like(loss)]
    if passed.cuts:
        errors = torch.autograd.grad(loss, passed.outputs, retain_graph=True, allow_unused=True)
        exact = [error for error in errors if error is not None]  # of the last layers
        if not exact:
            raise ValueError("the loss depends on no layer's output: DirectFeedbackAlignment has no error to send")
        examples = len(exact[0]) if exact[0].ndim else 1
        error = summed(torch.cat([_rows(one, examples, "the output") for one in exact], 1))
        ends += [one.tensor for one in passed.cuts]
        for one in passed.cuts:
            feedback.append(_feedback(one, weights.names[one.position], error, maps, seed))
    return torch.autograd.grad(ends, weights.params, feedback, allow_unused=True)


def _feedback(cut: Cut, name: str, error: Tensor, maps: FeedbackMaps, seed: int) -> Tensor:
    """``B e`` for the input of a layer, like it."""
    x, examples = cut.tensor, len(error)
    layout = _layout(x.shape, examples, f"the input of {name}'s layer")
    like = error.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    stream = mix(seed, cut.position, cut.use)
    rows = error.to(like.dtype) @ maps.of(stream, (error.shape[1], x.numel() // examples), like)
    rows = rows.to(x.dtype)
    return rows.view(x.shape) if layout is None else layout.restore(rows, x.shape)


def _rows(tensor: Tensor, examples: int, what: str) -> Tensor:
    layout = _layout(tensor.shape, examples, what)
    rows = tensor.reshape(examples, -1) if layout is None else layout.rows(tensor, examples)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _layout(shape: Sequence[int], examples: int, what: str) -> Layout | None:
    """Where a tensor has the examples; None: in its first few dimensions together."""
    for layout in layouts_of(shape, examples):
        if shape[layout.axis] == examples or layout.axis == 0:
            return layout
    if any(math.prod(shape[:k]) == examples for k in range(len(shape) + 1)):
        return None
    raise ValueError(
        f"{what}, {tuple(shape)}, does not hold the {examples} examples of the output in one dimension: "
        "DirectFeedbackAlignment cannot tell whose error is whose; take ZerothOrder"
    )
