"""What no example enters, and what one does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.perturbed.exact import assert_exact, look

B = 4


class Net(nn.Module):
    """Adds to its input what a function makes of its table, a weight [5, 3]."""

    numbers: Tensor

    def __init__(self, function: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("numbers", torch.arange(5))
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.tanh() + self.function(self, x)).tanh().flatten(1).sum(1)


def problem(function: Callable[[Net, Tensor], Tensor]) -> tuple[Net, Callable[[], Tensor]]:
    torch.manual_seed(0)
    net, x = Net(function).double(), torch.randn(B, 5, 3, dtype=torch.float64)
    return net, lambda: net(x)


def filled(net: Net, x: Tensor) -> Tensor:
    numbers = torch.zeros_like(net.numbers)
    numbers[1:] = net.numbers[1:]
    return net.table[numbers]


PLACES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "buffer": lambda net, x: net.table[net.numbers],
    "slice": lambda net, x: torch.cat([net.table[net.numbers[:2]], net.table[net.numbers[2:]]]),
    "arange": lambda net, x: nn.functional.embedding(torch.arange(x.shape[1]), net.table),
    "arange for each": lambda net, x: nn.functional.embedding(torch.arange(5).expand(len(x), -1), net.table),
    "like the input": lambda net, x: nn.functional.embedding(torch.ones_like(x[..., 0], dtype=torch.long), net.table),
    "filled": filled,
    "dropout": lambda net, x: nn.functional.dropout(net.table, 0.5),
    "normalized": lambda net, x: nn.functional.normalize(net.table, dim=0),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_computed_from_weights_alone_stands_for_them(name: str) -> None:
    net, losses = problem(PLACES[name])
    assert_exact(net, losses)


def test_as_many_places_as_examples() -> None:
    """Nothing but its history tells a table of places from a layer's output."""
    torch.manual_seed(0)
    places, out = nn.Embedding(B, 3), nn.Linear(3, 2)
    net, x = nn.ModuleList([places, out]).double(), torch.randn(B, B, 3, dtype=torch.float64)
    assert_exact(net, lambda: out((x + places(torch.arange(B))).tanh()).flatten(1).square().sum(1))


def test_what_an_example_was_written_into_is_of_examples() -> None:
    def of_examples(net: Net, x: Tensor) -> Tensor:
        numbers = torch.zeros(len(x), 5, dtype=torch.long)
        view = numbers[:, 1:]
        view[:] = (x[:, 1:, 0] > 0).long()
        return nn.functional.embedding(numbers, net.table)

    net, losses = problem(of_examples)
    state = assert_exact(net, losses)
    assert "table" in state.layers, "the embedding is a layer of its own"


def test_random_numbers_are_of_examples() -> None:
    def noisy(net: Net, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 5, 1, dtype=x.dtype).bernoulli_(0.5) * net.table

    net, losses = problem(noisy)
    assert_exact(net, losses)


def test_a_whole_batch_in_a_buffer() -> None:
    """No argument shows what the examples are; the losses do."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    net.register_buffer("x", torch.randn(B, 3, dtype=torch.float64))
    assert_exact(net, lambda: net(net.x).square().sum(1))  # type: ignore[arg-type]


def test_losses_of_weights_alone_get_one_direction() -> None:
    net = nn.ParameterDict({"rows": torch.randn(B, 3)})
    state = look(net, lambda: net["rows"].square().sum(1))
    assert state.shared == {"rows": "the losses depend on nothing but weights"}
