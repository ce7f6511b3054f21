"""A forward pass in which every use of a weight sees another tensor in its place, while the weight stays untouched."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from zo_lightning.compiled import as_written
from zo_lightning.parameters import submodules
from zo_lightning.perturbed.pooling import POOLINGS, FastPooling, maxima

Value = Callable[[int], Tensor]
"""From the position of a weight to what its uses see."""


@dataclass(frozen=True)
class Weights(Sequence[nn.Parameter]):
    """The weights of a module that require a gradient, each once: a tied weight is one weight.

    Attributes:
        names: of the weights, in their order.
        params: the weights.
        still: by position, a row that no direction moves, since no use of it is trained: an embedding's padding.
        opaque: positions of weights that TorchScript reads, where no pass can be displaced.
        frozen: whether the module also has weights that do not require a gradient.
    """

    names: list[str]
    params: list[nn.Parameter]
    still: dict[int, int] = field(default_factory=dict)
    opaque: frozenset[int] = frozenset()
    frozen: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> "Weights":
        """The trainable weights of a module.

        Raises:
            ValueError: there is none.
        """
        names: list[str] = []
        params: list[nn.Parameter] = []
        padded: list[tuple[int, int]] = []
        opaque: set[int] = set()
        frozen = False
        owners: dict[int, int] = {}  # by a weight's id
        for prefix, owner in submodules(module):
            for name, p in owner._parameters.items():
                if p is None:
                    continue
                if not p.requires_grad:
                    frozen = True
                elif id(p) not in owners:
                    names.append(f"{prefix}.{name}" if prefix else name)
                    params.append(p)
                owners[id(p)] = owners.get(id(p), 0) + 1
            if isinstance(owner, _EMBEDDINGS):
                if owner.padding_idx is not None:
                    padded.append((id(owner.weight), owner.padding_idx))
            elif isinstance(owner, torch.jit.ScriptModule):
                opaque |= set(map(id, owner.parameters()))
        if not params:
            kind = type(module).__name__
            raise ValueError(f"{kind} has no parameter with requires_grad=True: there is nothing to train")
        if not padded and not opaque:
            return cls(names, params, frozen=frozen)
        positions = {id(p): position for position, p in enumerate(params)}
        # A weight that another layer shares is trained there, the padding row too.
        still = {positions[i]: row for i, row in padded if i in positions and owners[i] == 1}
        return cls(names, params, still, frozenset(positions[i] for i in opaque if i in positions), frozen)

    @cached_property
    def kinds(self) -> list[tuple[Any, ...]]:
        """What has to be alike for a tensor to hold the numbers of a weight."""
        return [(p.shape, p.dtype, p.device, p.stride()) for p in self.params]

    def __len__(self) -> int:
        return len(self.params)

    def __getitem__(self, position: Any) -> Any:
        return self.params[position]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.params)


_EMBEDDINGS = nn.Embedding, nn.EmbeddingBag


class DisplacedWeights(TorchFunctionMode):
    """Context of a forward pass in which uses of weights see other tensors: no weight is written, whatever happens.

    It sees PyTorch's functions as the pass calls them, so weights may belong to any module, be tied, or be used by any
    function directly. What a function only asks about a weight, such as its shape, is answered by the weight itself.
    Compiled code runs as it was written. Code that reads weights where no function of PyTorch shows it, as TorchScript
    does, needs them ``in_place``: those are moved themselves, and put back bit for bit at the end.

    Args:
        weights: those whose uses are displaced.
        value: what the uses of one of them see.
        in_place: positions of weights that are moved themselves.
        before_write: called with each tensor that a function is about to write into.

    Attributes:
        seen: positions of weights that the pass has used so far.
        reads_gradients: whether the pass has asked for the ``.grad`` of one.
        pools: whether the pass has called a max-pooling that ``FastPooling`` makes faster.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        value: Value,
        in_place: Collection[int] = (),
        before_write: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.value, self.in_place, self.before_write = weights, value, in_place, before_write
        self.positions = {id(w): position for position, w in enumerate(weights) if position not in in_place}
        self.seen: set[int] = set()
        self.reads_gradients = self.pools = False
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._written: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> Self:
        """Begin the pass."""
        self._saved = [
            (self.weights[position].data, self.weights[position].detach().clone()) for position in self.in_place
        ]
        try:
            for position in self.in_place:
                self.weights[position].data.copy_(self.value(position))
            self._written = as_written()
            self._written.__enter__()
        except BaseException:
            self._put_back()
            raise
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End the pass."""
        try:
            super().__exit__(*error)
            self._written.__exit__(*error)
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for weight, before in self._saved:
            weight.copy_(before)
        self._saved = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of PyTorch on the displaced weights."""
        return self.run(func, args, kwargs or {})

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function with displaced weights among its arguments, lists and dictionaries of them included."""
        if func in ASKS:
            if func == _GRADIENT and id(args[0]) in self.positions:
                self.reads_gradients = True
            return func(*args, **kwargs)
        if args and self.before_write is not None and writes(func):
            for tensor in args[0] if isinstance(args[0], list | tuple) else args[:1]:
                self.before_write(tensor)
        positions, given = self.positions, []
        for argument in args:  # as _displaced does, in the loop that every function of a pass goes through
            if id(argument) in positions or type(argument) in _CONTAINERS:
                argument = self._displaced(argument)
            given.append(argument)
        for name, argument in kwargs.items():
            if id(argument) in positions or type(argument) in _CONTAINERS:
                kwargs = {**kwargs, name: self._displaced(argument)}
        if func in POOLINGS and (pooled := maxima(func, given, kwargs)) is not None:
            self.pools = True
            return pooled
        return func(*given, **kwargs)

    def _displaced(self, argument: Any) -> Any:
        position = self.positions.get(id(argument))
        if position is not None:
            self.seen.add(position)
            return self.value(position)
        if type(argument) in (list, tuple):
            if {*map(type, argument)} <= _NUMBERS:  # a stride, a shape
                return argument
            return type(argument)(map(self._displaced, argument))
        if type(argument) is dict:
            return {key: self._displaced(value) for key, value in argument.items()}
        return argument


class Points(list[Tensor]):
    """What the uses of all weights see, held as a whole: a ``Value``."""

    def __call__(self, position: int) -> Tensor:
        """What the uses of one weight see."""
        return self[position]


class ExchangedWeights:
    """Context of a forward pass in which the weights are other tensors: their ``data`` is exchanged, and put back.

    No number is written. No function of PyTorch is watched, which costs half as much as all that a step of a small net
    does beside its passes, unless poolings gain more. It is right where an earlier pass with ``DisplacedWeights`` has
    shown that the uses of all weights are seen, and that the pass neither writes into anything that would have to be
    put back nor reads ``.grad``, which is None here. It computes the same, bit for bit: attention's path for
    evaluation, which PyTorch does not take where functions are watched, is off.

    Args:
        weights: plain ones.
        points: what they are during the pass.
        pools: whether the pass calls a max-pooling that ``FastPooling`` makes faster.
    """

    def __init__(self, weights: Sequence[Tensor], points: Sequence[Tensor], pools: bool = False) -> None:
        self.weights, self.points = weights, points
        self._pooling: AbstractContextManager[Any] = FastPooling() if pools else nullcontext()
        self._before: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._fast_attention = False

    def __enter__(self) -> Self:
        """Begin the pass."""
        self._before = [(w, w.data, w.grad) for w in self.weights]
        self._fast_attention = mha.get_fastpath_enabled()
        try:
            mha.set_fastpath_enabled(False)
            for (weight, _, gradient), point in zip(self._before, self.points, strict=True):
                weight.data = point
                if gradient is not None:  # a loss that differentiates itself would add to it
                    weight.grad = None
            self._pooling.__enter__()
        except BaseException:
            self._put_back()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        """End the pass."""
        try:
            self._pooling.__exit__(*error)
            self._put_back()
        except BaseException:  # an interrupt amid it
            self._put_back()
            raise

    def _put_back(self) -> None:
        mha.set_fastpath_enabled(self._fast_attention)
        for weight, data, gradient in self._before:
            weight.data = data
            if weight.grad is not gradient:
                weight.grad = gradient


_CONTAINERS = {list, tuple, dict}
_NUMBERS = {int, float, bool}
_ATTRIBUTES = (
    *(
        "shape",
        "dtype",
        "device",
        "layout",
        "requires_grad",
        "ndim",
        "is_leaf",
        "grad",
        "grad_fn",
        "nbytes",
        "itemsize",
    ),
    *("is_cuda", "is_cpu", "is_mps", "is_sparse", "is_meta", "is_quantized", "is_nested", "_version"),
)
_METHODS = (
    *("size", "dim", "numel", "nelement", "ndimension", "stride", "element_size", "storage_offset", "__len__"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "get_device", "type", "__hash__", "dim_order"),
    *("requires_grad_", "register_hook", "retain_grad", "is_inference", "is_shared", "is_pinned"),
)
ASKS: set[Any] = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES} | {getattr(Tensor, m) for m in _METHODS}
"""What asks about a tensor without reading its numbers."""
_GRADIENT: Any = Tensor.grad.__get__  # type: ignore[attr-defined]


_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_OPERATORS |= {"__setitem__", "__set__"}


@lru_cache(1024)
def writes(func: Callable[..., Any]) -> bool:
    """Whether a function writes into its first argument, by PyTorch's convention of names."""
    name = getattr(func, "__name__", "")
    return name.endswith("_") and (not name.endswith("__") or name in _OPERATORS)


class Recent:
    """Values of weights that are computed when they are asked for; the latest are kept, in little memory.

    Of large weights only one is, so that memory is that of the largest; of small ones, such as biases, an eighth of
    that. A weight that is used again before another large one, as in a recurrence, is then computed once.

    Args:
        weights: that the values are of.
        compute: the value of one weight.
    """

    def __init__(self, weights: Sequence[Tensor], compute: Value) -> None:
        self.compute = compute
        self.sizes = [w.numel() * w.element_size() for w in weights]
        self.small = max(self.sizes) / 8
        self._kept: dict[int, Tensor] = {}  # from the oldest to the latest

    def __call__(self, position: int) -> Tensor:
        """The value of one weight."""
        value = self._kept.pop(position, None)
        if value is None:
            large = self.sizes[position] > self.small
            alike = [k for k in self._kept if (self.sizes[k] > self.small) is large]
            while alike and (large or sum(self.sizes[k] for k in (*alike, position)) > self.small):
                del self._kept[alike.pop(0)]
            value = self.compute(position)
        self._kept[position] = value
        return value
