"""Recurrent networks (nn.LSTM, nn.GRU, nn.RNN) as cuDNN runs them: one kernel a layer.

On a CPU torch goes through the tokens one by one. What such a layer keeps for the backward pass,
cuDNN's reserve, is not documented: it is taken as what its equations need, the gates after their
activation and the cell states. Letters of sizes: p and q tokens and samples in the order of the
input, t both, s tokens, b samples, i inputs, h hidden, g gates times hidden, d directions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch

from mist.trace.operations.scan_kernels import scan_kernel
from mist.trace.operations.scans import Gradients, ScanContext

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class RecurrentKind:
    """How many times its hidden size a network has gates, keeps, and whether it has cell states."""

    gates: int
    kept: int
    has_cells: bool = False


LSTM: Final = RecurrentKind(4, 5, has_cells=True)
GRU: Final = RecurrentKind(3, 4)
RNN: Final = RecurrentKind(1, 0)


class RecurrentLayer(torch.autograd.Function):
    """One layer in all its directions: x, first states, weights [g, i], [g, h] and biases [g]."""

    @staticmethod
    def forward(ctx: ScanContext, *inputs: Any) -> Any:  # noqa: ANN401 (tensors, or None)
        """The hidden states of all tokens, the last ones, and the last cell states."""
        kind, batch_first, x, hidden, cells, *weights = inputs
        directions, batch, size = hidden.shape
        outer, inner = x.shape[:2]
        sizes = dict(zip("pqidbh", (outer, inner, x.shape[2], *hidden.shape), strict=True))
        tokens = inner if batch_first else outer
        sizes |= {"s": tokens, "t": batch * tokens, "g": kind.gates * size, "o": directions * size}
        sizes["r"] = directions * kind.kept * size
        out, *last, kept = scan_kernel("recurrent_layer", [x, hidden, cells, *weights], sizes)
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, hidden, cells, out, kept, *weights)
        return out, last[0], last[1]

    @staticmethod
    def backward(ctx: ScanContext, *grads: torch.Tensor | None) -> Gradients:
        """The gradients, token after token from the last, then those of the weights."""
        x, hidden, cells, out, kept, *weights = ctx.saved_tensors
        inputs = [x, hidden, cells, out, kept, *weights, *grads]
        of_x, of_hidden, of_cells, of_gates = scan_kernel(
            "recurrent_layer_backward", inputs, ctx.sizes
        )
        directions = ctx.sizes["d"]
        assert isinstance(directions, int)
        of_weights: list[torch.Tensor] = []
        for _ in range(directions):
            made = scan_kernel("recurrent_weights", [x, out, of_gates], {**ctx.sizes, "d": 1})
            of_weights += made[: len(weights) // directions]
        of_first = (of_hidden, None if cells is None else of_cells)
        return (None, None, of_x, *of_first, *of_weights)


def run(
    kind: RecurrentKind,
    default: Callable[..., Any],
    *arguments: Any,  # noqa: ANN401 (those of torch's function)
) -> tuple[torch.Tensor, ...]:
    """In the place of torch's function of the network: layer after layer."""
    x, states, params, has_biases, num_layers, dropout, train, bidirectional, batch_first = (
        arguments
    )
    directions = 2 if bidirectional else 1
    each = directions * (4 if has_biases else 2)
    if len(params) != num_layers * each:  # with a projection of the hidden states
        return tuple(default(*arguments))
    hidden, cells = states if kind.has_cells else (states, None)
    out, last = x, []
    for layer in range(num_layers):
        own = slice(layer * directions, (layer + 1) * directions)
        first = (hidden[own], None if cells is None else cells[own])
        weights = params[layer * each : (layer + 1) * each]
        out = torch.native_dropout(out, dropout, True)[0] if layer and train * dropout else out
        out, *ends = RecurrentLayer.apply(kind, batch_first, out, *first, *weights)  # type: ignore[no-untyped-call]
        last.append(ends)
    hidden, cells = map(torch.cat, zip(*last, strict=True))
    return (out, hidden, cells)[: 3 if kind.has_cells else 2]


RECURRENT: Final[Mapping[str, Callable[..., tuple[torch.Tensor, ...]]]] = MappingProxyType(
    {
        "aten::lstm.input": partial(run, LSTM, aten.lstm.input),
        "aten::gru.input": partial(run, GRU, aten.gru.input),
        "aten::rnn_tanh.input": partial(run, RNN, aten.rnn_tanh.input),
        "aten::rnn_relu.input": partial(run, RNN, aten.rnn_relu.input),
    }
)
