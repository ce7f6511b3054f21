"""Forward passes in which every use of a weight is seen, and its output displaced."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zo_lightning.layers import COMPOSITES, RULES, BatchNormalization, Operation

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_MAX_POOL = {F.max_pool1d, F.max_pool2d, F.max_pool3d}


Displacement = Callable[[str, Operation, Tensor], Tensor | None]
"""From a use's key, operation and output to what is added to the output, [B, ...] like it; None leaves it alone."""


@dataclass(eq=False)
class Use:
    """One use of trainable weights in a pass.

    Attributes:
        key: the name of its first weight, with ``:1``, ``:2``, ... from the weight's second use on.
        operation: what used the weights.
        output: what the rest of the net saw, [B, ...].
        version: PyTorch's count of the changes to the output's memory, to tell a later change in place.
        visible: 1 where the loss can depend on the output, and 0 where a ReLU or a max-pooling hides it; None:
            everywhere.
        follower: the batch normalisation by the batch's own statistics that alone sees the output, if one does.
    """

    key: str
    operation: Operation
    output: Tensor
    version: int = 0
    visible: Tensor | None = None
    follower: BatchNormalization | None = None


@dataclass(eq=False)
class _Node:
    """A tensor on the way from a use's output through ReLUs and poolings, while nothing else has seen it."""

    tensor: Tensor  # kept, so that its id stays its own
    use: Use
    lift: Callable[[Tensor], Tensor]  # a mask of this tensor, as one of the use's output
    readers: int = 0
    gate: Tensor | None = None  # what the reader lets through, as a mask of this tensor; None: everything
    child: "_Node | None" = None
    normalized: BatchNormalization | None = None


class WatchedPass(TorchFunctionMode):
    """Context of one forward pass of a module.

    It sees PyTorch's functions as the pass calls them, so weights may belong to any module, be tied, or be used in
    ``F.linear`` directly. Every use of a weight by an operation with a rule is displaced. Weights that are used in
    another way are ``opaque``: no one may conclude their gradient from displacements.

    Args:
        module: owns the weights.
        displacement: what to add to outputs.
        offset: what it is multiplied by.
        statistics: of batch normalisations, by key, from the step's first pass; the first pass fills it.

    Attributes:
        uses: by key, in the order of the pass.
        opaque: names of weights that something without a rule has used.
        events: how often weights were used so far, one way or another.
    """

    def __init__(
        self, module: nn.Module, displacement: Displacement, offset: float, statistics: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        self.displacement = displacement
        self.offset = offset
        self.statistics = statistics
        self.uses: dict[str, Use] = {}
        self.opaque: set[str] = set()
        self.events = 0
        self._nodes: dict[int, list[_Node]] = {}
        self._roots: list[_Node] = []
        self._counts: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of PyTorch, displaced if it uses weights."""
        kwargs = kwargs or {}
        if func in COMPOSITES:
            try:
                with self:
                    return COMPOSITES[func](*args, **kwargs)
            except NotImplementedError:
                pass
        if (rule := RULES.get(func)) is not None and (name := self._weight(args, kwargs)) is not None:
            key = self._key(name)
            try:
                frozen = {"statistics": self.statistics.get(key)} if rule is BatchNormalization else {}
                operation = rule(*args, **kwargs, **frozen)
            except (NotImplementedError, TypeError):  # TypeError: an argument, such as ``out``, that the rule lacks
                pass
            else:
                given = list(_tensors((args, kwargs.values())))
                own = {id(w) for w in operation.weights}
                self.opaque |= {self.names[id(t)] for t in given if id(t) in self.names and id(t) not in own}
                read = [t for t in given if id(t) in self._nodes]
                return self._displaced(key, operation, read, lambda: func(*args, **kwargs))
        watched = [t for t in _tensors((args, kwargs.values())) if id(t) in self._nodes or id(t) in self.names]
        if not watched:
            return func(*args, **kwargs)
        if func in _MAX_POOL and not kwargs.get("return_indices"):
            return self._pooled(watched[0], *func(*args, **{**kwargs, "return_indices": True}))
        output = func(*args, **kwargs)
        if func is Tensor.__setitem__ or any(True for _ in _tensors((output,))):
            opaque = {self.names[id(t)] for t in watched if id(t) in self.names}
            self.opaque |= opaque
            self.events += bool(opaque)
            self._read(watched, output if func in _RELU else None)
        return output

    def finish(self) -> None:
        """After the pass, work out what is visible and let go of its tensors."""
        for node in self._roots:
            use, at = node.use, node
            use.follower = node.normalized if node.readers == 1 else None
            while at is not None and at.readers == 1 and at.child is not None:
                if at.gate is not None:
                    gate = at.lift(at.gate)
                    use.visible = gate if use.visible is None else use.visible * gate
                at = at.child
        self._nodes, self._roots = {}, []

    def _weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The name of the first trainable weight among the arguments."""
        return next((self.names[id(t)] for t in (*args, *kwargs.values()) if id(t) in self.names), None)

    def _key(self, name: str) -> str:
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return f"{name}:{count}" if count else name

    def _displaced(self, key: str, operation: Operation, read: list[Tensor], original: Callable[[], Tensor]) -> Tensor:
        output = operation.output(original)
        delta = self.displacement(key, operation, output) if self.offset else None
        if delta is not None:
            output.add_(delta, alpha=self.offset)
        self.events += 1
        use = self.uses[key] = Use(key, operation, output, output._version)
        root = _Node(output, use, lambda mask: mask)
        self._roots.append(root)
        nodes = [root]
        if isinstance(operation, BatchNormalization):
            self.statistics.setdefault(key, operation.statistics)
            # With frozen statistics it maps number by number, so what hides its output hides its input.
            for node in self._nodes.get(id(operation.input), []):
                node.readers += 1
                node.child = _Node(output, node.use, node.lift)
                node.normalized = operation if operation.couples else None
                nodes.append(node.child)
        else:
            self._read(read, None)
        self._nodes[id(output)] = nodes
        return output

    def _read(self, tensors: list[Tensor], gated: Tensor | None) -> None:
        """Note that something has read tensors; ``gated`` is what came out if that was a ReLU."""
        for tensor in tensors:
            children = []
            for node in self._nodes.get(id(tensor), []):
                node.readers += 1
                if gated is not None:
                    node.gate = gated.sign()  # now: it may be changed in place later
                    node.child = _Node(gated, node.use, node.lift)
                    children.append(node.child)
            if gated is not None:
                self._nodes[id(gated)] = children

    def _pooled(self, tensor: Tensor, output: Tensor, indices: Tensor) -> Tensor:
        def unpool(mask: Tensor) -> Tensor:
            spatial = indices.ndim - tensor.ndim + tensor[0].ndim - 1
            flat = torch.zeros_like(tensor).flatten(-spatial)
            return flat.scatter_reduce_(-1, indices.flatten(-spatial), mask.flatten(-spatial), "amax").view_as(tensor)

        children = []
        ones = torch.ones_like(output) if id(tensor) in self._nodes else None
        for node in self._nodes.get(id(tensor), []):
            assert ones is not None
            node.readers += 1
            node.gate = unpool(ones)
            node.child = _Node(output, node.use, lambda mask, lift=node.lift: lift(unpool(mask)))
            children.append(node.child)
        self._nodes[id(output)] = children
        return output


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)) or type(value).__name__ == "dict_values":
            yield from _tensors(value)
