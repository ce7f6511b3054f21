"""What a use of weights is: how noise on the weights reaches its output, and the way back; a registry of fast ways."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zo_lightning.perturbed.layouts import FIRST, Layout

Noise = tuple[Tensor, ...]
"""Of one weight, for each example: its entries [B, m n], or rows [B, m] and columns [B, n], of which they are products.

``m`` is the length of the weight, ``n`` the numbers in one of its rows. Random signs have the same first two moments in
both forms, ``E[u uᵀ] = I``; entries are independent, rows and columns are ``m + n`` numbers in place of ``m n``.
"""

_CHUNK = 2**24
"""Numbers of noise on weights that the generic way holds at once."""


class Operation:
    """One call of a function of PyTorch that uses weights, examples being dimension 0 of its output.

    This class knows nothing of the function. The change of the output by changes of the weights is a forward-mode
    derivative of this one call (``torch.func.jvp`` under ``vmap``), the way back the call's own adjoint
    (``torch.func.vjp``). A rule is a subclass for some functions with a cheaper way; what it does not override stays
    generic.

    Args:
        func: the function.
        args: of the call, with weights, or tensors computed from weights alone, among them.
        kwargs: of the call.
        made: by id of such a computed tensor, how it was made.

    Attributes:
        weights: those that are trained here, in the order of ``weight_jvp`` and ``weight_vjp``.
        couples: whether the examples of the batch act on each other.
        in_place: whether the output may be displaced in place: it is a tensor of its own, or the function writes to it.
        is_ruled: whether examples are known to be apart; or else that is tried out.
        costly_noise: whether noise on the weights costs as much as the call.
        few_weights: whether noise belongs on the weights, since they are few and repeated all over the output.
        uses_all: whether every number of the weights is known to be used for every example, unlike rows of a table.

    Raises:
        NotImplementedError: the rule does not cover this call.
    """

    couples = False
    in_place = False
    is_ruled = False
    costly_noise = False
    few_weights = False
    uses_all = False

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        made: Mapping[int, "Made"] | None = None,
    ) -> None:
        self.func, self.args, self.kwargs, self.made = func, args, kwargs, made or {}
        self.weights: list[nn.Parameter] = []
        self.bind(*args, **kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> None:
        """Take what the rule needs from the call's arguments, and name its ``weights``; generic: all there are.

        Raises:
            NotImplementedError: the rule does not cover this call.
        """
        self.weights = list(dict.fromkeys(weights_in((args, kwargs), self.made)))

    def begin(self, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Take the statistics of the batch from the step's first pass, or give them to the others; mostly none."""
        return None

    def output(self, original: Callable[[], Tensor]) -> Tensor:
        """What the operation computes in this pass, by default just that."""
        return original()

    def weight_jvp(self, noise: Sequence[Noise]) -> Tensor:
        """The change of the output [B, ...] when each example has its own change of each weight."""
        examples = len(noise[0][0])
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        sliced = [k for k, leaf in enumerate(leaves) if self._is_by_example(leaf, examples)]
        if any(id(leaves[k]) in self.made and leaves[k].stride(0) for k in sliced):  # it would be made for each example
            raise NotImplementedError

        def of_one(xs: list[Tensor], *of_weights: Noise) -> Tensor:
            tangents = tuple(entries(n, w) for n, w in zip(of_weights, self.weights, strict=True))
            at = tuple(w.detach() for w in self.weights)
            own = dict(zip(sliced, (x.unsqueeze(0) for x in xs), strict=True))
            return torch.func.jvp(lambda *w: self._call(w, leaves, spec, own, slice(1)), at, tangents)[1].squeeze(0)

        chunk = max(1, _CHUNK // sum(w.numel() for w in self.weights))
        each = torch.func.vmap(of_one, randomness="same", chunk_size=chunk)
        return each([leaves[k] for k in sliced], *noise)

    def takes(self, layout: Layout) -> bool:
        """Whether noise on the weights can be given to examples that are there; generic: as dimension 0."""
        return layout == FIRST

    def weight_jvp_in(self, layout: Layout, noise: Sequence[Noise]) -> Tensor:
        """The same as ``weight_jvp`` of an output that has the examples elsewhere, in a layout that it takes."""
        raise NotImplementedError

    def weight_vjp(self, delta: Tensor) -> list[Tensor]:
        """The gradient of each weight, from the gradients [B, ...] of each example's loss by its own output.

        It is the adjoint of ``weight_jvp`` summed over the examples: ``Σᵢ <jvp(U)ᵢ, δᵢ> = Σᵢ <Uᵢ, vjp(δ) of i>``.
        """
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        wide = [
            leaf.to(delta.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() and not is_weight(leaf)
            else leaf
            for leaf in leaves
        ]  # fmt: skip
        back = {id(b): self.made[id(a)] for a, b in zip(leaves, wide, strict=True) if id(a) in self.made}
        at = tuple(w.detach() for w in self.weights)
        vjp = torch.func.vjp(lambda *w: self._call(w, wide, spec, {}, made=back), *at)[1]
        return list(vjp(delta))

    def is_by_example(self, output: Tensor, examples: int) -> bool:
        """Whether the call on one example gives that example's part of ``output`` [B, ...], as tried on a few."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        sliced = [k for k, leaf in enumerate(leaves) if self._is_by_example(leaf, len(output))]
        tolerance = torch.finfo(output.dtype).eps ** 0.5 * float(output.abs().max())
        for i in sorted({0, examples // 2, examples - 1}):
            part = output[i : i + 1]
            try:
                rows = slice(i, i + 1)
                one = self._call(tuple(self.weights), leaves, spec, {k: leaves[k][rows] for k in sliced}, rows)
            except (RuntimeError, ValueError, IndexError):
                return False
            if one.shape != part.shape or not torch.allclose(one, part, rtol=0, atol=tolerance):
                return False
        return bool(sliced) and self.can(self.weight_vjp, torch.zeros_like(output))

    def can(self, derivative: Callable[[Any], Any], argument: Any) -> bool:
        """Whether one of the derivatives, applied to an argument, exists for this call."""
        try:
            derivative(argument)
        except (RuntimeError, NotImplementedError, ValueError):
            return False
        return True

    def _is_by_example(self, leaf: Any, examples: int) -> bool:
        return isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter) and leaf.shape[:1] == (examples,)

    def _call(
        self,
        values: Sequence[Tensor],
        leaves: list[Any],
        spec: Any,
        own: Mapping[int, Tensor],
        rows: slice | None = None,
        made: Mapping[int, "Made"] | None = None,
    ) -> Tensor:
        """The function at other values of the weights, and for some rows, which some leaves of its arguments are of."""
        made = self.made if made is None else made
        at = {id(w): value for w, value in zip(self.weights, values, strict=True)}
        changed = [
            made[id(leaf)].again(at)[rows] if k in own and id(leaf) in made
            else own[k] if k in own
            else made[id(leaf)].again(at) if id(leaf) in made
            else at.get(id(leaf), leaf)
            for k, leaf in enumerate(leaves)
        ]  # fmt: skip
        args, kwargs = pytree.tree_unflatten(changed, spec)
        return self.func(*args, **kwargs)


class Made:
    """How a tensor was computed from weights alone: a transposed weight, its exponential, a normalised one."""

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        made: Mapping[int, "Made"],
        index: int | None = None,
    ) -> None:
        self.func, self.index = func, index
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.of = [made.get(id(leaf)) for leaf in self.leaves]

    def again(self, values: Mapping[int, Tensor]) -> Tensor:
        """The same at other values of the weights, given by id."""
        leaves = [
            one.again(values) if one is not None else values.get(id(leaf), leaf)
            for leaf, one in zip(self.leaves, self.of, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        output = self.func(*args, **kwargs)
        return output if self.index is None else output[self.index]

    def weights(self) -> Iterator[nn.Parameter]:
        """The weights that it was computed from."""
        for leaf, one in zip(self.leaves, self.of, strict=True):
            if one is not None:
                yield from one.weights()
            elif is_weight(leaf):
                yield leaf


RULES: dict[Callable[..., Any], type[Operation]] = {}
"""The functions with a rule of their own, as PyTorch's modules call them. All others are served by ``Operation``."""

COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Functions that use weights inside, and the same in terms of functions that can be displaced."""

_Rule = TypeVar("_Rule", bound=type[Operation])
_Function = TypeVar("_Function", bound=Callable[..., Any])


def register_rule(*functions: Callable[..., Any]) -> Callable[[_Rule], _Rule]:
    """Class decorator: the operation to use for some functions of PyTorch, in place of the one registered before."""

    def register(rule: _Rule) -> _Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def register_composite(*functions: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Function decorator: takes the place of some functions of PyTorch; may raise NotImplementedError."""

    def register(composite: _Function) -> _Function:
        COMPOSITES.update(dict.fromkeys(functions, composite))
        return composite

    return register


def operation(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], made: Mapping[int, Made] | None = None
) -> Operation:
    """The use of weights by one call: by the function's rule, where there is one that covers it, else generic."""
    rule = RULES.get(func)
    if rule is not None:
        try:
            found = rule(func, args, kwargs, made)
            if {id(w) for w in found.weights} == {id(w) for w in weights_in((args, kwargs), made or {})}:
                return found
        except (NotImplementedError, TypeError):  # TypeError: an argument, such as ``out``, that the rule lacks
            pass
    return Operation(func, args, kwargs, made)


def is_weight(value: Any) -> bool:
    """Whether a value is a trainable weight."""
    return isinstance(value, nn.Parameter) and value.requires_grad


def weights_in(values: Iterable[Any], made: Mapping[int, Made]) -> Iterator[nn.Parameter]:
    """The trainable weights among arguments, and those that arguments were made of."""
    for leaf in tensors_in(values):
        if id(leaf) in made:
            yield from made[id(leaf)].weights()
        elif is_weight(leaf):
            yield leaf  # type: ignore[misc]


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, and in tuples, lists and dictionaries among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found


def noise_sizes(weight: Tensor, per_example: int) -> list[int]:
    """The numbers in the parts of one example's noise on a weight: entries, but rows and columns of a large matrix.

    Args:
        weight: that the noise is on.
        per_example: numbers in the output of one example; a larger matrix is a large one.
    """
    if weight.ndim < 2 or weight.numel() <= per_example:
        return [weight.numel()]
    return [len(weight), weight[0].numel()]


def entries(noise: Noise, weight: Tensor) -> Tensor:
    """One example's noise in the shape of the weight."""
    return (noise[0] if len(noise) == 1 else torch.outer(*noise)).view(weight.shape).to(weight.dtype)


def weigh(noise: Noise, slope: Tensor, weight: Tensor) -> Tensor:
    """``Σᵢ cᵢ Uᵢ`` in the shape of a weight, from the noise of each example and its slope [B]."""
    if len(noise) == 1:
        return (slope @ noise[0]).view(weight.shape)
    rows, columns = noise
    return ((rows * slope[:, None]).T @ columns).view(weight.shape)


def count(weights: Sequence[Tensor]) -> int:
    """The numbers in some tensors."""
    return sum(math.prod(w.shape) for w in weights)
