"""A loop over the sequence is refused, by what it runs; chunks and long models are not."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from mist.errors import TraceError
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, runs, trace_model
from mist.trace.sequence_loops import refuse_loops

BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
WORDS = (
    "scan cannot be traced: layers.0.mix runs 7 operations for each token, in a loop over "
    "the sequence. A GPU runs such a scan as one kernel, which Mist has no costs for. Use a scan "
    "by chunks (as Mamba-2's) or attention instead."
)


def test_operations_that_grow_with_each_token_are_a_loop() -> None:
    with pytest.raises(TraceError) as raised:
        refuse_loops("scan", lambda tokens: Counter({"layers.0.mix": 7 * tokens + 30, "norm": 900}))
    assert str(raised.value) == WORDS


def test_chunks_and_long_forwards_are_none() -> None:
    refuse_loops("chunks", lambda tokens: Counter({"mix": 30 * -(-tokens // 64)}))
    refuse_loops("long", lambda tokens: Counter({"": 5000}))


def test_a_length_that_the_model_does_not_take_tells_nothing() -> None:
    def at(tokens: int, *, least: int) -> Counter[str]:
        if tokens < least:
            raise TraceError(f"{tokens} tokens are too few")
        return Counter({"mix": 7 * tokens})

    refuse_loops("picky", lambda tokens: at(tokens, least=1000))
    with pytest.raises(TraceError, match="mix runs 7 operations for each token"):
        refuse_loops("patches", lambda tokens: at(tokens, least=100))


class Scan(nn.Module):
    """An exponential mean, token by token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for index in range(x.shape[1]):
            state = 0.9 * state + x[:, index] * torch.sigmoid(state)
            states.append(state)
        return torch.stack(states, 1)


class Cells(nn.Module):
    """Two cells in turn, token by token: no operation of the loop runs in its own module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = []
        for token in x.unbind(1):
            states.append(self.second(self.first(token)))
        return torch.stack(states, 1)


class Recurrent(nn.Module):
    def __init__(self, mix: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), mix(), nn.Linear(8, 8)) for _ in range(2)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        # Two products, a sigmoid, a sum.
        (Scan, "1 runs 4 operations for each token, in a loop"),
        (Cells, "runs 2 operations for each token, in a loop"),
    ],
)
def test_a_model_that_scans_token_by_token_is_refused_early(
    monkeypatch: pytest.MonkeyPatch, mix: Callable[[], nn.Module], words: str
) -> None:
    monkeypatch.setattr(runs, "LONG_OPS", 50)  # reached sooner
    run_at: list[int | None] = []
    session = runs.RunSubject.session

    def counted(subject: runs.RunSubject, point: runs.Point) -> runs.RecordedRun:
        run_at.append(point.seq if subject.limit is None else None)
        return session(subject, point)

    monkeypatch.setattr(runs.RunSubject, "session", counted)
    with torch.device("meta"):
        model = Recurrent(mix)
    with pytest.raises(TraceError, match=words):
        trace_model(model, replace(BF16, seq_len=2048))
    # Its own length is never run to the end.
    assert run_at == [None, 32, 64]


def test_a_long_forward_without_a_loop_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LONG_OPS", 3)  # fewer than any layer has
    with torch.device("meta"):
        model = Recurrent(lambda: nn.Linear(8, 8))
    assert trace_model(model, BF16).num_layers == 2
