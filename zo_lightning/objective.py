"""The loss as a function that is safe to ask again: the same weights give the same value, and no trace is left."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from zo_lightning.buffers import Buffers
from zo_lightning.parameters import Parameters, as_module
from zo_lightning.random_states import GlobalState, seed_all

T = TypeVar("T")

_COPIED = 4 << 20  # bytes of inputs: a fraction of what a pass takes that has read them


class NonFiniteLoss(ArithmeticError):
    """A loss came out NaN or infinite, so that no gradient can be estimated from it."""

    def __init__(self, value: float) -> None:
        super().__init__(f"the loss is {value}")
        self.value = value


class Objective:
    """A loss closure over a module's weights that can be asked many times in one training step.

    Each call (a *probe*) sees the same random numbers, since the global generators of PyTorch, NumPy and Python are set
    from ``seed`` for its duration: the same dropout masks, the same augmentation. A ``torch.Generator`` or NumPy
    ``Generator`` of the loss's own cannot be known here: seed it in the closure. Afterwards the global generators and
    the module's buffers (BatchNorm's statistics) are bit-identical to before. TF32 is off and autocast's cache of
    weight casts is empty, since either drowns a finite difference of small ``mu``.

    Args:
        loss: returns the loss at the module's present weights, or the loss of each example, [B], whose mean it is:
            a tensor, or a number or array of Python or NumPy.
        module: owns the weights and buffers; or tensors of one's own (``zo_lightning.parameters``).
        seed: of the random numbers that ``loss`` itself draws, such as dropout masks.
        inputs: tensors that a pass may write into, and that the next one must find as they were.

    Attributes:
        forward_passes: what the calls so far cost, in forward passes of the batch.
        values: the losses that the passes of one estimate gave.
        seen: the losses [B] that they gave, where they were asked by ``losses``.
        estimate: tells the present estimate from others.
    """

    def __init__(
        self, loss: Callable[[], Any], module: Parameters, seed: int = 0, inputs: Sequence[Tensor] = ()
    ) -> None:
        self.loss = loss
        self.inputs = inputs
        self.module = module = as_module(module)
        self.seed = seed
        self.estimate = object()
        self.forward_passes = 0
        self.values: list[float] = []
        self.seen: list[Tensor] = []
        self._cost = 0
        self._buffers = Buffers(module)
        self._after_first: Buffers | None = None
        self._kept: dict[int, list[Tensor]] | None = None  # frozen weights and inputs, by the address of their memory
        self._written: dict[int, tuple[Tensor, Tensor]] = {}  # those that the loss has changed, as they were
        self._moved: list[tuple[Tensor, Tensor]] = []  # as the first probe left them
        self._copies: list[tuple[Tensor, int, Tensor]] | None = None  # inputs, with their versions
        self._guarded = False
        self._generators = [torch.default_generator]
        if torch.cuda.is_initialized():
            devices = {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}
            self._generators += [torch.cuda.default_generators[index] for index in sorted(devices)]

    @classmethod
    def of(cls, loss: "Callable[[], Any] | Objective", module: Parameters) -> "Objective":
        """Make an objective of a plain closure; one that is an objective already is kept, with its own guards."""
        return loss if isinstance(loss, Objective) else cls(loss, module)

    def begin(self, seed: int) -> None:
        """Begin an estimate: all its probes draw their random numbers from ``seed``."""
        self.seed, self.values, self.seen, self.estimate = seed, [], [], object()
        self._copies = None  # inputs may have other numbers than in an earlier estimate

    def __call__(self, within: AbstractContextManager[Any] | None = None) -> float:
        """Ask for the loss once, in a context such as one that displaces the weights.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        return self.read([self.unread(within)])[0]

    def unread(self, within: AbstractContextManager[Any] | None = None) -> Any:
        """Ask for the loss once and leave it where it is: so a GPU has the next pass before it is done with this one.

        Raises:
            NonFiniteLoss: the loss is on the CPU, and NaN or infinite.
        """
        loss = self.ask(self.loss, within)
        if not isinstance(loss, Tensor) or _is_read_at_once(loss) or (loss.ndim != 1 and loss.numel() != 1):
            return check_loss(loss)
        return loss.detach().mean() if loss.ndim == 1 else loss.detach().view(()).clone()

    def read(self, unread: Sequence[Any]) -> list[float]:
        """The values of losses that ``unread`` gave: the only moment at which a step has to wait for a GPU.

        Raises:
            NonFiniteLoss: one is NaN or infinite.
        """
        together = unread and all(isinstance(loss, Tensor) for loss in unread)
        losses = torch.stack(list(unread)).tolist() if together else [float(loss) for loss in unread]
        self.values += map(check_loss, losses)
        return losses

    def ask(self, function: Callable[[], T], within: AbstractContextManager[Any] | None = None, cost: int = 1) -> T:
        """Run the loss or a part of it as a ``probe``, in a context."""
        with self.probe(cost), within or nullcontext():
            return function()

    def losses(self) -> Tensor:
        """Ask for the loss of each example, [B], within a ``probe``; their mean is the loss.

        Raises:
            NonFiniteLoss: one is NaN or infinite.
            ValueError: there is one loss for the whole batch.
        """
        losses = as_tensor(self.per_example())
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                "this estimator needs the loss of each example, a tensor [B], as from reduction='none' "
                f"(a LightningModule returns it as 'losses' beside 'loss'), got {got}"
            )
        losses = losses.detach().to(next(self.module.parameters(), losses).device)
        check_loss(losses)
        if self._cost:
            self.seen.append(losses)
        return losses

    def per_example(self) -> Any:
        """Run the closure for the losses of the examples."""
        return self.loss()

    def initialize(self) -> None:
        """Give lazy weights and buffers their shapes, in one pass in evaluation mode, which leaves statistics alone."""
        training = [one for one in self.module.modules() if one.training]
        for one in training:
            one.training = False
        try:
            with self.probe():
                self.loss()
        finally:
            for one in training:
                one.training = True
        self._buffers, self._after_first = Buffers(self.module), None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Keep the global random state and full float32 for all probes of an estimate; nested it does nothing."""
        if self._guarded:
            yield
            return
        before = GlobalState(self._generators)
        self._guarded = True
        try:
            with torch.no_grad(), tf32(False):
                yield
        finally:
            self._guarded = False
            before.restore()

    @contextmanager
    def probe(self, cost: int = 1) -> Iterator[None]:
        """Guard one forward pass, for estimators that call ``loss`` themselves; it counts as ``cost``."""
        self._cost = cost
        with nullcontext() if self._guarded else self.guard():
            try:
                seed_all(self._generators, self.seed)
                torch.clear_autocast_cache()
                yield
            finally:
                torch.clear_autocast_cache()
                self._after_probe()
                self.forward_passes += cost

    @contextmanager
    def differentiated(self) -> Iterator[None]:
        """Guard the loss's one pass with a graph, whose side effects stay: an error undoes those on PyTorch's state."""
        states = [generator.get_state() for generator in self._generators]
        try:
            with torch.enable_grad():
                yield
        except BaseException:
            self._buffers.restore()
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            raise

    def differentiable(self) -> Tensor:
        """Ask for the loss as PyTorch would, with its graph and its side effects: for estimators that use autograd.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
            ValueError: no graph leads to it.
        """
        loss = self.loss()
        check_loss(loss)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(
                f"backpropagation needs the graph of the loss, and the loss is a {type(loss).__name__} without one: "
                "something on the way (NumPy, .item(), no_grad) drops it, or no weight is used; ZerothOrder needs "
                "values alone"
            )
        return loss.mean() if loss.ndim == 1 else loss

    def commit(self) -> None:
        """Keep what the first probe did to buffers, frozen weights and inputs, as if it had been the only pass."""
        if self._after_first is not None:
            self._after_first.restore()
        for p, value in self._moved:
            p.copy_(value)

    @property
    def has_written(self) -> bool:
        """Whether a probe has changed a frozen weight or an input."""
        return bool(self._written)

    def keeps_inputs(self) -> bool:
        """Keep copies of the inputs, for probes that nobody watches; False where they are too large for that."""
        if self._copies is None:
            if any(t.is_inference() or t.layout != torch.strided for t in self.inputs):
                return False
            if sum(t.numel() * t.element_size() for t in self.inputs) > _COPIED:
                return False
            self._copies = [(t, t._version, t.detach().clone()) for t in self.inputs]
        return True

    @property
    def moves_state(self) -> bool:
        """Whether the first probe has changed a buffer, a frozen weight or an input."""
        return bool(self._moved) or (self._after_first is not None and not self._buffers.equals(self._after_first))

    def before_write(self, tensor: Any) -> None:
        """Note that the loss is about to write into a tensor: frozen weights and inputs are put back later."""
        if not isinstance(tensor, Tensor):
            return
        if self._kept is None:
            self._kept = {}
            for kept in (*(p for p in self.module.parameters() if not p.requires_grad), *self.inputs):
                self._kept.setdefault(_address(kept), []).append(kept)
        for kept in self._kept.get(_address(tensor), ()) if self._kept else ():
            self._written.setdefault(id(kept), (kept, kept.detach().clone()))

    def _after_probe(self) -> None:
        first = self._after_first is None
        for t, version, copy in self._copies or ():
            if t._version != version:
                self._written.setdefault(id(t), (t, copy))
        if first:
            self._after_first = Buffers(self.module) if self._buffers else self._buffers
            self._moved = [(p.data, p.detach().clone()) for p, _ in self._written.values()]
        if self._buffers:
            self._buffers.restore()
        for p, before in self._written.values():
            p.data.copy_(before)


def as_tensor(loss: Any) -> Any:
    """A number of Python, NumPy or another library of arrays as a tensor, and an array too; else what was given."""
    if isinstance(loss, Tensor) or not (isinstance(loss, Real) or hasattr(loss, "__array__")):
        return loss
    array = np.asarray(loss)
    return torch.from_numpy(array.astype(np.float64)) if array.dtype.kind in "biuf" else loss


def check_loss(loss: Any) -> float:
    """The value of a loss: a number, a tensor or array with one element, or the mean of one with a loss per example.

    Raises:
        ValueError: it is none of these.
        NonFiniteLoss: it is NaN or infinite.
    """
    if isinstance(loss, float):
        value = float(loss)
    else:
        tensor = as_tensor(loss)
        if isinstance(tensor, Tensor) and tensor.is_complex():
            raise ValueError(f"the loss must be real, got {tensor.dtype}: take its modulus or its real part")
        if not isinstance(tensor, Tensor) or (tensor.numel() != 1 and tensor.ndim != 1) or tensor.numel() == 0:
            got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(loss).__name__
            raise ValueError(
                f"the loss must be a number, or a tensor or array of one element or one per example, got {got}"
            )
        value = float(tensor.detach() if tensor.ndim == 0 else tensor.detach().mean())
    if not math.isfinite(value):
        raise NonFiniteLoss(value)
    return value


def _is_read_at_once(loss: Tensor) -> bool:
    """Whether nothing is to be waited for."""
    return loss.device.type == "cpu"


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or of a transform: not the memory of a weight
        return -1


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether a GPU may round the factors of float32 products to TF32, which drowns a finite difference of small μ."""
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
