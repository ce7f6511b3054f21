"""A forward pass in which the output of every use of weights is displaced, for each example on its own."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zo_lightning.perturbed import affine, attention, recurrent  # noqa: F401  # they register rules
from zo_lightning.perturbed.constants import DROPOUTS, Constants
from zo_lightning.perturbed.gates import MAX_POOL, RELU, Gate, Tracked, are_separate
from zo_lightning.perturbed.rules import COMPOSITES, Made, Operation, operation, tensors_in, weights_in
from zo_lightning.perturbed.weights import ASKS, DisplacedWeights, Value, Weights, writes

READS = {Tensor.numpy, Tensor.__array__, Tensor.tolist}
"""What gives the numbers of a tensor to code that no pass can watch."""


@dataclass(eq=False)
class Use:
    """One use of trainable weights in a pass.

    Attributes:
        key: the name of its first weight, with ``:1``, ``:2``, ... from the weight's second use on.
        operation: what used the weights.
        output: what the rest of the net saw, [B, ...]; empty after ``release``.
        shape: of the output.
        version: PyTorch's count of the changes to the output's memory, to tell a later change in place.
        positive: where the loss can depend on the output, within its windows if it is pooled; None: everywhere.
        indices: of the largest output in each window of the max-pooling that alone saw the output.
        tracked: what has read the output, if the pass keeps track.
        first: the output as it came out, if the pass keeps track and it may change in place.
    """

    key: str
    operation: Operation
    output: Tensor
    shape: torch.Size
    version: int = 0
    positive: Tensor | None = None
    indices: Tensor | None = None
    tracked: Tracked | None = None
    first: Tensor | None = None

    def visible(self, dense: Tensor) -> Tensor:
        """A tensor like the output as the loss can see it: one number for each window of a pooling."""
        if self.indices is not None:
            dense = dense.flatten(2).gather(2, self.indices.flatten(2)).view(self.indices.shape)
        return dense if self.positive is None else dense * self.positive

    def dense(self, visible: Tensor) -> Tensor:
        """The adjoint of ``visible``, of numbers that are 0 where the loss does not see the output."""
        if self.indices is None:
            return visible
        place = visible.new_zeros(self.shape)
        place.flatten(2).scatter_(2, self.indices.flatten(2), visible.flatten(2))
        return place

    def release(self) -> None:
        """Let go of the output: what is left leads from gradients by it to those by weights."""
        self.output = self.output.new_empty(0)

    def is_by_example(self, examples: int) -> bool:
        """Whether dimension 0 of the output is the example, by a rule or as tried."""
        if self.output.ndim < 2 or len(self.output) != examples:
            return False
        return self.first is None or self.operation.is_by_example(self.first, examples)


Displacement = Callable[[Use], Tensor | None]
"""From a use to what is added to its output, like it; None leaves it alone."""


class DisplacedOutputs(DisplacedWeights):
    """Context of one forward pass of a module, whose weights stay as they are.

    It sees PyTorch's functions as the pass calls them, so weights may belong to any module, be tied, or be used by any
    function directly. A call with weights and other tensors that gives one tensor is a use of them, and its output is
    displaced. A tensor that is computed from weights alone stands for these weights. Weights that are used in another
    way, such as an LSTM's, are ``opaque``: no one may conclude their gradient from displaced outputs.

    Args:
        module: owns the weights.
        weights: of the module.
        displacement: what to add to outputs; None: nothing, and keep track of what reads them.
        offset: what it is multiplied by.
        statistics: of batch normalisations, by key, from the step's first pass; the first pass fills it.
        shared: positions of weights that are displaced themselves, for all examples alike.
        value: what the uses of these see.
        in_place: positions of those among them that are moved themselves, since no use shows.
        before_write: as for ``DisplacedWeights``.
        gates: by key of a use, what hides its output, where that is wanted.
        buffers: whether no example enters the module's buffers.

    Attributes:
        uses: by key, in the order of the pass.
        opaque: names of weights that were used in another way, and in which.
        events: how often weights were used so far, one way or another.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Weights,
        displacement: Displacement | None = None,
        offset: float = 0.0,
        statistics: dict[str, tuple[Tensor, Tensor]] | None = None,
        shared: Collection[int] = (),
        value: Value | None = None,
        in_place: Collection[int] = (),
        before_write: Callable[[Tensor], None] | None = None,
        gates: Mapping[str, Gate] | None = None,
        buffers: bool = True,
    ) -> None:
        moved = weights.__getitem__ if value is None else lambda k: value(k) if k in shared else weights[k]
        super().__init__(weights, moved, in_place, before_write)
        self.module, self.displacement, self.offset = module, displacement, offset
        self.gates = gates or {}
        self.statistics = {} if statistics is None else statistics
        self.names = {id(p): name for name, p in zip(weights.names, weights.params, strict=True)}
        self.ruled = {id(p) for p in weights.params} - {id(weights[k]) for k in weights.opaque.union(shared)}
        self.uses: dict[str, Use] = {}
        self.opaque = {weights.names[k]: "TorchScript reads it" for k in weights.opaque}
        self.events = 0
        self._constants = Constants(module, buffers)
        self._made: dict[int, Made] = {}
        self._tracked: dict[int, Tracked] = {}
        self._gated: dict[int, Use] = {}
        self._kept: list[Any] = []  # so that the ids of tensors in these dictionaries stay their own
        self._counts: dict[str, int] = {}

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether no example has entered a tensor of this pass."""
        return self._constants.has(tensor)

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function of PyTorch, displaced if it uses weights."""
        if func in ASKS:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        if func in COMPOSITES and any(id(t) in self.ruled or id(t) in self._made for t in given):
            TorchFunctionMode.__enter__(self)
            try:
                return COMPOSITES[func](*args, **kwargs)
            except NotImplementedError:
                pass
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)
        if func in DROPOUTS and args and (id(args[0]) in self.ruled or id(args[0]) in self._made):
            return self._dropped(func, args, kwargs)
        constant = self._constants.hold(func, given)
        use = None
        if kwargs.get("out") is not None:  # no gradient goes through it in PyTorch either: a spectral norm's iteration
            output = super().run(func, args, kwargs)
            for tensor in tensors_in((output,)):
                self._made.pop(id(tensor), None)
                if not constant:
                    self._constants.drop(tensor)
        elif not any(id(t) in self.ruled or id(t) in self._made for t in given):
            output = self._gate(func, args, kwargs)
            self.events += any(id(t) in self.positions for t in given)
        else:
            self.events += 1
            one = operation(func, args, kwargs, self._made)
            if not constant and (one.in_place or not writes(func)):
                use, output = self._use(one, lambda: super(DisplacedOutputs, self).run(func, args, kwargs))
            else:
                output = super().run(func, args, kwargs)
            if func in READS:
                self.opaque |= {
                    self.names[id(w)]: "NumPy or Python reads it" for w in weights_in((args, kwargs), self._made)
                }
            elif use is None and constant and not writes(func):
                self._make(func, args, kwargs, output)
            elif use is None and (func is Tensor.__setitem__ or tensors_in((output,))):
                name = getattr(func, "__name__", str(func))
                used = f"{name} writes it into a tensor" if writes(func) else f"{name} gives more than one tensor"
                self.opaque |= {self.names[id(w)]: used for w in weights_in((args, kwargs), self._made)}
        self._constants.note(func, args, output, constant)
        if self.displacement is None:
            self._track(func, args, kwargs, given, use, output)
        return output

    def _dropped(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Dropout of what is made of weights, as a product with a mask, so that it can be computed again."""
        mask = func(torch.ones_like(args[0]), *args[1:], **kwargs)
        self._constants.add(mask)
        return self.run(torch.mul, (args[0], mask), {})

    def _use(self, one: Operation, original: Callable[[], Any]) -> tuple[Use | None, Any]:
        """Run an operation and displace its output; a result that is not one tensor of numbers is no use."""
        name = self.names[id(one.weights[0])]
        count = self._counts[name] = self._counts.get(name, -1) + 1
        key = f"{name}:{count}" if count else name
        statistics = one.begin(self.statistics.get(key))
        output = one.output(original)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None, output
        if statistics is not None:
            self.statistics.setdefault(key, statistics)
        use = self.uses[key] = Use(key, one, output, output.shape)
        delta = self.displacement(use) if self.displacement is not None and self.offset else None
        if delta is not None and one.in_place:
            output.add_(delta, alpha=self.offset)
        elif delta is not None:
            output = use.output = torch.add(output, delta, alpha=self.offset)
        use.version = output._version
        gate = self.gates.get(key, Gate())
        if gate.pooled:
            self._gated[id(output)] = use
        elif gate.rectified:
            use.positive = output > 0
        return use, output

    def _gate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function without weights; a ReLU or pooling may tell what of a use's output it lets through."""
        use = self._gated.get(id(args[0])) if args else None
        if use is None or not (func in RELU or func in MAX_POOL):
            return super().run(func, args, kwargs)
        if func in RELU:
            output = super().run(func, args, kwargs)
            self._gated[id(output)] = use
            self._kept.append(output)
            return output
        output, use.indices = func(*args, **{**kwargs, "return_indices": True})
        if self.gates[use.key].rectified:
            use.positive = output > 0
        return output

    def _make(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note how tensors were computed from weights alone."""
        self._kept.append(output)
        for k, tensor in enumerate(output if isinstance(output, tuple | list) else (output,)):
            if isinstance(tensor, Tensor) and id(tensor) not in self.names:
                self._made[id(tensor)] = Made(func, args, kwargs, self._made, None if tensor is output else k)

    def _track(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        use: Use | None,
        output: Any,
    ) -> None:
        """Note what has read tensors."""
        for tracked in [self._tracked[id(t)] for t in given if id(t) in self._tracked]:
            then = None
            if func in RELU or (func in MAX_POOL and isinstance(output, Tensor) and are_separate(*args, **kwargs)):
                then = self._tracked[id(output)] = Tracked(output)
            tracked.reads.append((use or func, then))
        if use is not None:
            use.tracked = self._tracked[id(use.output)] = Tracked(use.output)
            use.first = None if use.operation.is_ruled else use.output.clone()
