"""Layers that hand tensors on through a mapping: each is saved once, whoever reads it."""

from collections import UserDict
from collections.abc import MutableMapping

import pytest
import torch
from torch import nn

from mist.model.graph import B, ModelGraph, S, T
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.recording.written_mappings import mappings_in, opened, with_leaves, written
from tests.tokens import tokens

WIDTH = 16
SEQ = 32
WRITES = (True, True, False, False, False)  # layers 3 and 4 read what layer 1 wrote

Shared = MutableMapping[str, tuple[torch.Tensor]]


class Layer(nn.Module):
    """Scales what it makes by values of its own, which it hands on, or by those of another."""

    def __init__(self, *, writes: bool, reads: bool) -> None:
        super().__init__()
        self.writes, self.reads = writes, reads
        self.up, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.values = None if reads else nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, shared: Shared) -> torch.Tensor:
        values = shared["values"][0] if self.values is None else self.values(x)
        if self.writes:
            shared["values"] = (values,)
        result: torch.Tensor = x + self.out(torch.tanh(self.up(x)) * values)
        return result


class Net(nn.Module):
    def __init__(self, kind: type[Shared]) -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(8, WIDTH)
        self.layers = nn.ModuleList(
            Layer(writes=writes, reads=i > WRITES.index(False)) for i, writes in enumerate(WRITES)
        )
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, shared = self.words(ids), self.kind()
        for layer in self.layers:
            x = layer(x, shared)
        result: torch.Tensor = self.head(x)
        return result


def saved_in_layers(model: Net, b: int) -> int:
    """Bytes that a real forward pass saves from the first layer to the last, weights left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    x, shared = model.words(torch.zeros(b, SEQ, dtype=torch.int64)), model.kind()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in model.layers:
            x = layer(x, shared)
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in weights)


def traced_bytes(graph: ModelGraph, b: int) -> int:
    at = {B: b, S: SEQ, T: 1} | tokens(1, b)
    blocks = [graph.blocks[kind] for kind in graph.layer_kinds()]
    each = [block.saved_single if b == 1 else block.saved for block in blocks]
    shared = graph.shared_single if b == 1 else graph.shared
    return sum(int(t.bytes.subs(at)) for tensors in (*each, shared) for t in tensors)


@pytest.mark.parametrize("kind", [pytest.param(dict, marks=pytest.mark.slow), UserDict])
def test_what_layers_hand_on_is_saved_once(kind: type[Shared]) -> None:
    graph = trace_model(
        Net(kind), TraceSetting(precision=Precision.FP32, attention=Attention.FLASH)
    )
    assert [run.count for run in graph.layers] == [1, 1, 1, 2]  # the second is given the first's
    assert len(graph.shared) == 2
    assert graph.sequential
    assert "layer before it gives" in str(graph.unstaged)  # values of another layer
    for b in (1, 3):
        assert traced_bytes(graph, b) == saved_in_layers(Net(kind), b)


def test_what_a_call_writes_is_told_from_what_it_was_given() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    given = ((x,), {"shared": UserDict(a=(x,)), "plain": {"b": x}})
    copies = with_leaves(lambda leaf: leaf, given)
    mappings = mappings_in(copies)
    assert mappings == [UserDict(a=(x,)), {"b": x}]
    assert opened(given) == ((x,), {"shared": {"a": (x,)}, "plain": {"b": x}})
    before = tuple(map(dict, mappings))
    mappings[0]["c"] = (y,)
    assert written(mappings, before) == ({"c": (y,)}, {})
    assert "c" not in given[1]["shared"]
