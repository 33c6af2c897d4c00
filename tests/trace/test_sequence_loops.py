"""A Python loop over the sequence is refused, by what it runs; chunks and long models are not."""

import pytest
import torch
from torch import nn

from mist.errors import TraceError
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, runs, trace_model
from mist.trace.sequence_loops import refuse_loops

BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
WORDS = (
    "scan cannot be traced: layers.0.mix runs 7 operations for each token, in a Python loop over "
    "the sequence. A GPU runs such a scan as one kernel, which Mist has no costs for. Use a scan "
    "by chunks (as Mamba-2's) or attention instead."
)


def test_operations_that_grow_with_each_token_are_a_loop() -> None:
    with pytest.raises(TraceError) as raised:
        refuse_loops("scan", "layers.0.mix", lambda tokens: 7 * tokens + 30)
    assert str(raised.value) == WORDS


def test_chunks_and_long_forwards_are_none() -> None:
    refuse_loops("chunks", "mix", lambda tokens: 30 * -(-tokens // 64))
    refuse_loops("long", "", lambda tokens: 5000)


def test_a_length_that_the_model_does_not_take_tells_nothing() -> None:
    def refuse(tokens: int) -> int:
        raise TraceError(f"{tokens} tokens are too few")

    refuse_loops("picky", "mix", refuse)


class Scan(nn.Module):
    """An exponential mean, token by token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for index in range(x.shape[1]):
            state = 0.9 * state + x[:, index] * torch.sigmoid(state)
            states.append(state)
        return torch.stack(states, 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), Scan(), nn.Linear(8, 8)) for _ in range(2)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_a_model_that_scans_token_by_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four operations on numbers: two products, a sigmoid, a sum."""
    monkeypatch.setattr(runs, "LONG_OPS", 100)  # reached sooner
    with torch.device("meta"):
        model = Recurrent()
    with pytest.raises(TraceError, match="1 runs 4 operations for each token, in a Python loop"):
        trace_model(model, BF16)
