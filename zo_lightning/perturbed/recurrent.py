"""Recurrent layers step by step, in terms of linear layers, whose outputs have the example as dimension 0."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_lightning.perturbed.rules import register_composite

State = tuple[Tensor, ...]
"""The output ``h`` [B, H], and what else a cell remembers."""

Cell = Callable[[Tensor, Tensor, State], State]
"""From what the input and the last output contribute to the gates, and the last state, to the next state."""


def _lstm_cell(of_input: Tensor, of_output: Tensor, state: State) -> State:
    i, f, g, o = (of_input + of_output).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(of_input: Tensor, of_output: Tensor, state: State) -> State:
    (r, z, n), (r_h, z_h, n_h) = of_input.chunk(3, 1), of_output.chunk(3, 1)
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (n + (z + z_h).sigmoid() * (state[0] - n),)


def _plain_cell(activation: Callable[[Tensor], Tensor], of_input: Tensor, of_output: Tensor, state: State) -> State:
    return (activation(of_input + of_output),)


_CELLS: dict[str, Cell] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": partial(_plain_cell, torch.tanh),
    "rnn_relu": partial(_plain_cell, torch.relu),
}


def _layers(
    cell: Cell,
    input: Tensor,
    first: Tensor | Sequence[Tensor],
    weights: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """``torch.lstm`` and its kin, of [T, B, E] or [B, T, E].

    Raises:
        NotImplementedError: a packed sequence, whose rows are not of examples in their order.
    """
    if isinstance(first, Tensor) and not first.is_floating_point():  # sizes, the second argument for packed sequences
        raise NotImplementedError
    first = (first,) if isinstance(first, Tensor) else first
    ways = 2 if bidirectional else 1
    each = len(weights) // (num_layers * ways)
    x, ends = input if batch_first else input.transpose(0, 1), []
    for layer in range(num_layers):
        outputs = []
        for k in range(layer * ways, (layer + 1) * ways):
            w_ih, w_hh, *rest = weights[k * each : (k + 1) * each]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            projection = rest[-1] if len(rest) % 2 else None
            of_input = F.linear(x, w_ih, b_ih).unbind(1)
            state = tuple(s[k].to(of_input[0].dtype) for s in first)  # autocast
            steps: list[Tensor] = []
            for one in reversed(of_input) if k % ways else of_input:
                state = cell(one, F.linear(state[0], w_hh, b_hh), state)
                if projection is not None:
                    state = F.linear(state[0], projection), *state[1:]
                steps.append(state[0])
            outputs.append(torch.stack(steps[::-1] if k % ways else steps, 1))
            ends.append(state)
        x = torch.cat(outputs, 2) if bidirectional else outputs[0]
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, train)
    return x if batch_first else x.transpose(0, 1), *(torch.stack(parts) for parts in zip(*ends, strict=True))


def _one_step(
    cell: Cell,
    input: Tensor,
    state: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | State:
    """``torch.lstm_cell`` and its kin."""
    of_input = F.linear(input, w_ih, b_ih)
    last = tuple(s.to(of_input.dtype) for s in ((state,) if isinstance(state, Tensor) else state))
    after = cell(of_input, F.linear(last[0], w_hh, b_hh), last)
    return after[0] if isinstance(state, Tensor) else after


for _name, _cell in _CELLS.items():
    register_composite(getattr(torch, _name))(partial(_layers, _cell))
    register_composite(getattr(torch, f"{_name}_cell"))(partial(_one_step, _cell))
