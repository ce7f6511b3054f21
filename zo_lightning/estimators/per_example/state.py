"""What ``PerExample`` learns about one module."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zo_lightning.estimators.per_example.feedback import Feedback, Shrinkage
from zo_lightning.estimators.per_example.output import Output
from zo_lightning.estimators.per_example.sizes import Sizes
from zo_lightning.perturbed.gates import Gate
from zo_lightning.perturbed.layouts import Layout
from zo_lightning.perturbed.state import State


@dataclass
class Layer:
    """What is known of one use of weights.

    Attributes:
        in_weights: whether its noise is on the weights.
        dims: how many numbers its noise has that the loss can depend on, for one example.
        layout: where its output has the examples.
        joined: whether that dimension holds more than them.
        rectified: whether a ReLU hides its output.
        pooled: whether a max-pooling does.
        normalized_by: key of the batch normalisation that alone reads its output, or its own key.
        patch: side of the patches of its output that share their noise, at most a quarter of each length.
        scale: ``s`` of its noise, which gives its output a displacement of mean square 1; 0 until that is known.
    """

    in_weights: bool
    dims: float
    layout: Layout
    joined: bool
    rectified: bool
    pooled: bool
    normalized_by: str
    patch: int = 1
    scale: float = 0.0

    @property
    def gate(self) -> Gate:
        """What hides its output."""
        return Gate(self.rectified, self.pooled)

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """Whether its output may have some shape."""
        return self.layout.fits(shape, examples) and (self.joined or shape[self.layout.axis] == examples)

    def sides(self, shape: Sequence[int]) -> list[int]:
        """The lengths of a patch, for an output [B, C, ...] of some shape."""
        return [max(1, min(self.patch, n // 4)) for n in shape[2:]] if self.patch > 1 else [1]

    def begin(self, power: float) -> None:
        """Choose the scale for a displacement whose mean square at scale 1 is ``power``."""
        self.scale = 1 / math.sqrt(power)


class PerExampleState(State):
    """How a module uses its weights, and what was learned of it.

    Attributes:
        trained: names of the weights that this is for.
        layers: by key of a use, in the order of the net.
        used: keys of all uses.
        shared: names of the weights with one direction for the whole batch, and why.
        hidden: those of them that code reads where no function of PyTorch shows it.
        seen: names of weights of which it is known how they are used, or that they are not.
        alone: whether there was only one example to look at.
        buffers: whether no example enters the module's buffers.
        output: of the net, if there is one that the losses depend on alone.
        last: key of the use that makes it, if one does.
        is_smooth: whether autograd gives the loss's gradient by the net's output; None: not tried.
        steps: taken so far.
        feedback: the maps that predict gradients.
        shrinkage: how far the slopes are trusted.
        sizes: what larger weights do to the net's output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.feedback = Feedback()
        self.begin([])

    def begin(self, trained: list[str]) -> None:
        """Forget how weights are used; what feedback has learned stays."""
        self.trained = trained
        self.layers: dict[str, Layer] = {}
        self.used: set[str] = set()
        self.shared: dict[str, str] = {}
        self.hidden: set[str] = set()
        self.seen: set[str] = set()
        self.alone = False
        self.buffers = True
        self.output: Output | None = None
        self.last: str | None = None
        self.is_smooth: bool | None = None
        self.shrinkage = Shrinkage()
        self.sizes = Sizes()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how a run goes on."""
        return {
            **super().state_dict(),
            "steps": self.steps,
            "trained": list(self.trained),
            "layers": {key: {**asdict(one), "layout": list(one.layout)} for key, one in self.layers.items()},
            "used": sorted(self.used),
            "shared": dict(self.shared),
            "hidden": sorted(self.hidden),
            "seen": sorted(self.seen),
            "alone": self.alone,
            "buffers": self.buffers,
            "output": None if self.output is None else self.output.state_dict(),
            "last": self.last,
            "is_smooth": self.is_smooth,
            "feedback": self.feedback.state_dict(),
            "shrinkage": self.shrinkage.state_dict(),
            "sizes": self.sizes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.begin(list(state["trained"]))
        self.steps = state["steps"]
        self.layers = {
            key: Layer(**{**layer, "layout": Layout(*layer["layout"])}) for key, layer in state["layers"].items()
        }
        self.used, self.shared = set(state["used"]), dict(state["shared"])
        self.hidden, self.seen = set(state["hidden"]), set(state["seen"])
        self.alone, self.buffers = state["alone"], state["buffers"]
        self.output = Output.of_state(state["output"])
        self.last, self.is_smooth = state["last"], state["is_smooth"]
        self.feedback.load_state_dict(state["feedback"])
        self.shrinkage.load_state_dict(state["shrinkage"])
        self.sizes.load_state_dict(state["sizes"])
