"""Graphs as `make_batch` gives them: torch_geometric takes no edges out of them by value.

Layers take loops out of a graph before they add one for each node. How many there are depends on
values, which a trace does not have; a batch of edges per node has none.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final
from unittest.mock import patch

import torch
from torch import nn

LIBRARY: Final = "torch_geometric"
LOOPS: Final = "torch_geometric.utils.loop"


def passes_messages(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules works on the edges of a graph."""
    return any(type(module).__module__.partition(".")[0] == LIBRARY for module in modules)


@contextmanager
def edges_as_given() -> Iterator[None]:
    """Within: no edge is taken for a loop."""
    loops = sys.modules.get(LOOPS)
    if loops is None:
        yield
        return
    stand_ins = {
        id(loops.remove_self_loops): _all_edges,
        id(loops.add_remaining_self_loops): loops.add_self_loops,
    }
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == LIBRARY]
    with ExitStack() as stack:
        for module in modules:  # each has the functions that it imported
            for name in [n for n, value in vars(module).items() if id(value) in stand_ins]:
                stand_in = stand_ins[id(getattr(module, name))]
                stack.enter_context(patch.object(module, name, stand_in))
        yield


def _all_edges(
    edge_index: torch.Tensor, edge_attr: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return edge_index, edge_attr
