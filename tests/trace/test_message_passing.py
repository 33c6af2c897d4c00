"""Edges of a graph are all kept, in every module of the library that has the functions."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from mist.trace.operations.message_passing import LOOPS, edges_as_given, passes_messages


def selects(edge_index: torch.Tensor, edge_attr: object = None) -> object:
    raise AssertionError


def selects_and_adds(edge_index: torch.Tensor, edge_attr: object = None) -> object:
    raise AssertionError


def adds(edge_index: torch.Tensor, edge_attr: object = None) -> tuple[torch.Tensor, object]:
    return torch.cat([edge_index, edge_index[:, :1]], dim=1), edge_attr


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the library that imported its functions."""
    loops, conv = ModuleType(LOOPS), ModuleType("torch_geometric.nn.conv")
    for module in (loops, conv):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(remove_self_loops=selects, add_remaining_self_loops=selects_and_adds)
    vars(loops).update(add_self_loops=adds)
    return conv


def test_no_edge_is_taken_for_a_loop(layer: ModuleType) -> None:
    edges = torch.zeros(2, 5, dtype=torch.int64)
    with edges_as_given():
        kept, _ = layer.remove_self_loops(edges)
        more, _ = layer.add_remaining_self_loops(edges)
    assert (kept.shape, more.shape) == ((2, 5), (2, 6))
    assert layer.remove_self_loops is selects
    assert layer.add_remaining_self_loops is selects_and_adds


def test_without_the_library_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, LOOPS, raising=False)
    with edges_as_given():
        assert not passes_messages(nn.Linear(1, 1).modules())


def test_layers_of_the_library_are_known() -> None:
    conv = type("Conv", (nn.Module,), {"__module__": "torch_geometric.nn.conv"})
    assert passes_messages([nn.Linear(1, 1), conv()])
