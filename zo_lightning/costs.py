"""What a training step costs in floating-point operations, counted once for each shape of batch."""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, fields, is_dataclass
from math import isnan, nan, prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_PATIENCE = 8


class FlopMeter:
    """Counts the floating-point operations of training steps, exactly, without slowing them down.

    Steps of one kind cost the same: equal shapes and dtypes of all tensors of the batch (in lists, tuples, mappings and
    dataclasses), the same weights trainable, the same modules in training mode, the same ``context``. A kind is
    measured with ``torch.utils.flop_counter`` until two of its steps in a row agree, as the first may hold one more
    look at the net; from then on the number is added, and nothing is in the way. Where eight steps found no agreement,
    as with layers that choose their work by the data, their mean is added. A step that raises is counted as well.

    Counted is what multiplies matrices: products, convolutions, attention, recurrent layers, forward and backward, and
    linear systems. Arithmetic number by number is not, nor are random numbers, nor decompositions but QR, Cholesky.
    Modules that are added later are noticed when something else has changed too.

    The module keeps its meter, and its state in checkpoints, so that a continued run counts as an uninterrupted one:

        loss = self._flops.run(lambda: estimator.backward(objective, self, step), self, batch)
        self.log("budget/flops", self._flops.total)       # where it is finite
        checkpoint["flops"] = self._flops.state_dict()

    Measuring does not change what a step computes, with one exception: PyTorch's forward-mode derivatives choose other
    formulas while anything watches, and their last bits may differ in the measured steps.

    Attributes:
        total: floating-point operations so far; NaN once a step could not be measured.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._known: dict[Hashable, _Kind] = {}
        self._params: list[nn.Parameter] = []
        self._modules: list[nn.Module] = []

    def run(self, step: Callable[[], _T], module: nn.Module, batch: Any, *context: Hashable) -> _T:
        """Call ``step`` and count it. A step that fails only because it is watched runs again, and is never counted.

        Args:
            step: the work; where the first call fails, a second must be harmless.
            module: its weights and modes.
            batch: what the step is about.
            context: what else a step's cost depends on, such as the number of directions.

        Returns:
            What ``step`` returned.
        """
        kind = self._kind(module, batch, context)
        watched = self._is_open(kind)
        try:
            with self._counted(kind):
                return step()
        except (RuntimeError, TypeError, AssertionError) as error:
            if not watched:
                raise
            result = step()  # an error of its own comes out here
            self.total = nan
            _log.warning("floating-point operations stay unknown, as this step cannot be watched: %s", error)
            return result

    def repeat(self, module: nn.Module, batch: Any, *context: Hashable) -> bool:
        """Count a step as ``run`` would, without running it; return whether its cost is known already."""
        kind = self._kind(module, batch, context)
        if self._is_open(kind):
            return False
        self.total += kind.flops
        return True

    def step(self, module: nn.Module, batch: Any, *context: Hashable) -> AbstractContextManager[None]:
        """Count what happens inside, as ``run`` does, but without a second try."""
        return self._counted(self._kind(module, batch, context))

    def state_dict(self) -> dict[str, Any]:
        """The count so far, and the costs that are known."""
        return {"total": self.total, "known": {key: astuple(kind) for key, kind in self._known.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where ``state_dict`` left off."""
        self.total = state["total"]
        self._known = {key: _Kind(*kind) for key, kind in state["known"].items()}

    @contextmanager
    def _counted(self, kind: "_Kind") -> Iterator[None]:
        if not self._is_open(kind):
            try:
                yield
            finally:
                self.total += kind.flops
            return
        counter = _Counter()
        try:
            with counter:
                yield
            kind.learn(float(counter.get_total_flops()))
        finally:
            self.total += counter.get_total_flops()
            self._modules = []  # to be listed again, as weights or modules may be new

    def _is_open(self, kind: "_Kind") -> bool:
        """Whether it is still to be measured what such a step costs."""
        return not kind.settled and not isnan(self.total)

    def _kind(self, module: nn.Module, batch: Any, context: tuple[Hashable, ...]) -> "_Kind":
        if not self._modules or self._modules[0] is not module:
            self._modules, self._params = list(module.modules()), list(module.parameters())
        trainable, training = [p.requires_grad for p in self._params], [m.training for m in self._modules]
        key = _shapes(batch), tuple(trainable), tuple(training), context
        kind = self._known.get(key)
        if kind is None:
            kind = self._known[key] = _Kind()
        return kind


def count_flops(work: Callable[[], object]) -> float:
    """The floating-point operations of one call of ``work``, counted as ``FlopMeter`` does."""
    with _Counter() as counter:
        work()
    return float(counter.get_total_flops())


@contextmanager
def uncounted() -> Iterator[None]:
    """Within a step that a ``FlopMeter`` measures: leave out what is no part of training, such as a diagnostic."""
    counters = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
    before = [(counter, dict(counter.flop_counts["Global"])) for counter in counters if isinstance(counter, _Counter)]
    try:
        yield
    finally:
        for counter, counts in before:
            counter.flop_counts["Global"].clear()
            counter.flop_counts["Global"].update(counts)


@dataclass
class _Kind:
    """What one kind of steps costs, as far as it is known."""

    flops: float = -1.0
    times: int = 0
    seen: float = 0.0
    settled: bool = False

    def learn(self, flops: float) -> None:
        self.times, self.seen = self.times + 1, self.seen + flops
        if self.times == _PATIENCE and flops != self.flops:
            self.flops, self.settled = self.seen / self.times, True
        else:
            self.flops, self.settled = flops, flops == self.flops


class _WholeStep(nullcontext[None]):
    """In place of what follows the modules of a net: it hooks into all modules of the process, which we do not need."""

    parents = ("Global",)


class _Counter(FlopCounterMode):
    """PyTorch's counter, for a step as a whole, with what it lacks."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)
        self.mod_tracker: Any = _WholeStep()


def _shapes(batch: Any) -> Hashable:
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype
    if isinstance(batch, Mapping):
        return tuple([_shapes(value) for value in batch.values()])
    if isinstance(batch, list | tuple):
        return tuple([_shapes(value) for value in batch])
    if is_dataclass(batch):
        return tuple([_shapes(getattr(batch, f.name)) for f in fields(batch)])
    return None


# What torch.utils.flop_counter has no formula for, though it multiplies matrices. Tensors come as their shapes.
def _product(out: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(a) * b[-1]


def _vector(a: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(a)


def _recurrent(inputs: Any, *rest: Any, **_: Any) -> int:
    """Every number of a weight matrix is used once for each example and moment."""
    weights = rest[0] if isinstance(rest[0][0], torch.Size) else rest[:4]
    return 2 * prod(inputs[:-1]) * sum(prod(w) for w in weights if len(w) == 2)


def _attention(query: Any, *weights: Any) -> int:
    """Of a sequence to itself: projections, scores, and their weighted sum."""
    return prod(query[:-1]) * (2 * sum(prod(w) for w in weights) + 4 * query[-2] * query[-1])


def _encoder(src: Any, width: int, heads: int, *rest: Any, **_: Any) -> int:
    return _attention(src, *[w for w in rest if isinstance(w, torch.Size) and len(w) == 2][:4])


aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((aten.addmm_, aten.baddbmm_, aten.addbmm, aten.addbmm_), _product),
    **dict.fromkeys((aten.mv, aten.dot, aten.vdot), _vector),
    **dict.fromkeys((aten.addmv, aten.addmv_), lambda out, a, v, **_: 2 * prod(a)),
    aten.linalg_cholesky_ex: lambda a, *_, **__: prod(a) * a[-1] // 3,
    aten.linalg_qr: lambda a, *_, **__: 4 * prod(a) * min(a[-2:]) - 4 * prod(a[:-2]) * min(a[-2:]) ** 3 // 3,
    aten.cholesky_solve: lambda b, *_, **__: 2 * prod(b) * b[-2],
    aten.linalg_solve_triangular: lambda a, b, *_, **__: prod(b) * a[-1],
    aten._linalg_solve_ex: lambda a, b, *_, **__: 2 * prod(a) * a[-1] // 3 + 2 * prod(b) * a[-1],
    **dict.fromkeys((aten.mkldnn_rnn_layer, aten._cudnn_rnn), _recurrent),
    **dict.fromkeys((aten.mkldnn_rnn_layer_backward, aten._cudnn_rnn_backward), lambda *a, **_: 2 * _recurrent(*a)),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
    aten._transformer_encoder_layer_fwd: _encoder,
    aten._native_multi_head_attention: (
        lambda q, k, v, width, heads, qkv, qkv_bias, proj, *_, **__: _attention(q, qkv, proj)
    ),
}
