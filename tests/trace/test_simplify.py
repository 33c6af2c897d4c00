"""Which guards say nothing at the lengths of a regime, and so are no part of its domain."""

from dataclasses import replace

import numpy as np
import pytest
import sympy
import torch
from torch import nn

from mist.model.graph import B, S, T
from mist.model.summary import Lengths
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.simplify import _always, simplify_graph

BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
CHUNKS = sympy.floor(S / 64 + sympy.Mod(63 * S, 64) / 64)


@pytest.mark.parametrize(
    ("guard", "holds"),
    [
        (32 * B * CHUNKS >= 2, True),
        (sympy.Eq(B * sympy.Mod(S, 64), 0), True),
        (sympy.Ne(B * CHUNKS, 6 * 100), False),  # at b = 100
        (B * S <= 4096, False),
        (B <= 64, False),
        (S * T >= 2, False),  # of t nothing is known
    ],
)
def test_a_guard_is_left_out_where_it_holds_for_every_batch(
    guard: sympy.Basic, holds: bool
) -> None:
    assert _always(guard, np.array([384])) is holds


def test_the_domain_of_a_regime_can_be_read() -> None:
    graph = trace_model(Tiny(), BF16)
    guards = (32 * B * CHUNKS >= 2, sympy.Eq(CHUNKS, 6), B <= 64, sympy.Ne(B * CHUNKS, B))
    rough = replace(graph, blocks=tuple(replace(each, domain=guards) for each in graph.blocks))
    found = simplify_graph(rough, 384)
    # Six chunks of 64 are 321 to 384 tokens, padded.
    assert found.lengths == Lengths(first=321, last=384)
    assert found.blocks[0].domain == (B <= 64, S <= 384, S >= 321)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
