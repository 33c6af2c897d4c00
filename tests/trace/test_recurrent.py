"""Recurrent networks as cuDNN's kernels, against torch's own loop over the tokens on this CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.dispatch_call import key_of
from mist.trace.recording.shim import runs_as
from mist.trace.runs import RECURRENCES
from tests.trace.test_scans import Products

SETTING = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH)
INPUTS, HIDDEN = 12, 8
POINTS = [(1, 5), (2, 9), (3, 16)]

Network = Callable[[], nn.RNNBase]
NETWORKS = [
    pytest.param(lambda: nn.LSTM(INPUTS, HIDDEN, 2, batch_first=True), 5, id="lstm"),
    pytest.param(lambda: nn.LSTM(INPUTS, HIDDEN, bidirectional=True), 5, id="lstm both ways"),
    pytest.param(lambda: nn.GRU(INPUTS, HIDDEN, bias=False, batch_first=True), 4, id="gru"),
    pytest.param(lambda: nn.RNN(INPUTS, HIDDEN, 3, nonlinearity="relu"), 0, id="rnn"),
]


def run(network: nn.RNNBase, b: int, s: int) -> tuple[int, int, list[torch.Tensor | None]]:
    """Bytes kept beyond the parameters, samples and tokens, and the gradients."""
    shape = (b, s, INPUTS) if network.batch_first else (s, b, INPUTS)
    x = torch.ones(shape, dtype=network.weight_ih_l0.dtype, requires_grad=True)
    own = {key_of(parameter) for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[key_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = network(x)
    out.sum().backward()
    gradients = [each.grad for each in (x, *network.parameters())]
    return sum(size for key, size in kept.items() if key not in own), 4 * b * s, gradients


@pytest.mark.parametrize(("make", "kept_of_gates"), NETWORKS)
def test_a_recurrent_network_costs_what_its_equations_say(
    make: Network, kept_of_gates: int
) -> None:
    for b, s in POINTS:
        with FlopCounterMode(display=False) as counter:
            run(make().double(), b, s)  # which no fused kernel of this CPU takes
        with FakeTensorMode():
            network = make()
            with runs_as(SETTING), Products() as products:
                kept, each, gradients = run(network, b, s)
        directions = 2 if network.bidirectional else 1
        first_states = network.num_layers * directions * b * HIDDEN
        gates = {"LSTM": 4, "GRU": 3}.get(network.mode, 1)
        # The first step's states are zeros, to which torch's loop has no gradient.
        spared = 2 * first_states * gates * HIDDEN
        assert products.flop == counter.get_total_flops() + spared
        layer = directions * HIDDEN * (1 + kept_of_gates)
        cells = 2 if network.mode == "LSTM" else 1
        assert kept == each * (INPUTS + network.num_layers * layer) + 4 * cells * first_states
        expected = [(b, s, INPUTS) if network.batch_first else (s, b, INPUTS)]
        expected += [tuple(parameter.shape) for parameter in network.parameters()]
        assert [None if g is None else tuple(g.shape) for g in gradients] == expected


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, INPUTS)
        self.network = nn.LSTM(INPUTS, HIDDEN, 2, batch_first=True)
        self.head = nn.Linear(HIDDEN, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.network(self.table(ids))[0])  # type: ignore[no-any-return]


def test_its_parameters_are_read_and_its_price_is_named() -> None:
    with torch.device("meta"):
        model = Tagger()
    graph = trace_model(model, SETTING)
    assert RECURRENCES in graph.notes
    assert not any("that nothing reads" in note for note in graph.notes)
    assert graph.blocks[0].domain == ()
