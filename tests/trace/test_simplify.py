"""Which guards say nothing at the lengths of a regime, and so are no part of its domain."""

import numpy as np
import pytest
import sympy
import torch
from torch import nn

from mist.model.graph import B, S, T
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.simplify import _always

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


class Chunks(nn.Module):
    """Means over chunks of 16 tokens, one chunk after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        chunks = nn.functional.pad(self.linear(x), (0, 0, 0, (16 - s % 16) % 16))
        chunks = chunks.reshape(b, -1, 16, h)
        means = [chunks[:, index].mean(1, keepdim=True) for index in range(chunks.shape[1])]
        return x + torch.cat(means, 1).repeat_interleave(16, 1)[:, :s]


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.layers = nn.ModuleList(Chunks() for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_loop_over_chunks_has_a_regime_that_can_be_read() -> None:
    (layer,) = trace_model(Chunked(), BF16).blocks
    assert all(relation.free_symbols == {S} for relation in layer.domain)
    assert len(layer.domain) <= 2
    assert all(relation.subs(S, 384) is sympy.true for relation in layer.domain)
