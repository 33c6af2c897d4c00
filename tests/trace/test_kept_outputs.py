"""A result that a layer keeps and passes on: the next layer keeps it as its input, once."""

import pytest
import torch
from torch import nn

from mist.model.graph import B, S, T
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from tests.tokens import tokens
from tests.trace.test_repeated_blocks import WIDTH, Model

NUM_LAYERS = 3


class Layer(nn.Module):
    """Relu keeps its result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.matrix(x))


def net() -> Model:
    return Model([Layer(WIDTH) for _ in range(NUM_LAYERS)])


def saved_in_layers(b: int, s: int) -> int:
    """Bytes that a real forward pass saves from the first layer to the last, weights left out."""
    torch.manual_seed(0)
    model = net()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    x = model.embed(torch.zeros(b, s, dtype=torch.int64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in model.layers:
            x = layer(x)
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in weights)


@pytest.mark.parametrize("b", [1, 3])
def test_a_stack_keeps_each_activation_once(b: int) -> None:
    graph = trace_model(net(), TraceSetting(precision=Precision.FP32, attention=Attention.FLASH))
    (block,) = graph.blocks
    activation, at = 4 * b * 32 * WIDTH, {B: b, S: 32, T: 1} | tokens(1, b)
    saved = block.saved_single if b == 1 else block.saved
    assert [tensor.bytes.subs(at) for tensor in saved] == [activation]
    # The last result is no input of another layer. In its own backward pass it counts.
    assert saved_in_layers(b, 32) == (NUM_LAYERS + 1) * activation
    assert max(size.subs(at) for size in block.transient_bytes) >= 2 * activation
