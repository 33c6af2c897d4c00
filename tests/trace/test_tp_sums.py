"""Blocks with experts are one region only where what follows the experts is linear in them."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mist.plans.workload import Attention, Precision
from mist.trace import trace_model
from mist.trace.models.source import TraceSetting
from mist.trace.tensor_parallel.tp_sums import NOT_LINEAR as NOT_LINEAR_WORDS
from tests.fast_cases import first_fast

HIDDEN, WIDTH, EXPERTS, VOCAB = 32, 16, 4, 64
Behind = Callable[["Block", torch.Tensor, torch.Tensor], torch.Tensor]


class Experts(nn.Module):
    """One matrix for each expert; every token sees all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        every = x.reshape(1, batch * tokens, HIDDEN).expand(EXPERTS, -1, -1)
        inner = F.silu(torch.bmm(every, self.up.transpose(1, 2)))
        return torch.bmm(inner, self.down.transpose(1, 2)).sum(0).view(batch, tokens, HIDDEN)


class Block(nn.Module):
    def __init__(self, behind: Behind) -> None:
        super().__init__()
        self.experts = Experts()
        self.gate = nn.Linear(HIDDEN, 1)
        self.norm = nn.LayerNorm(HIDDEN)
        self.behind = behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.behind(self, x, self.experts(x))


class Layer(nn.Module):
    def __init__(self, behind: Behind) -> None:
        super().__init__()
        self.mlp = Block(behind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    tp_plan: Mapping[str, str] = {
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.experts.up": "colwise",
        "layers.*.mlp.experts.down": "rowwise",
    }

    def __init__(self, behind: Behind) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([Layer(behind), Layer(behind)])
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def undivided(behind: Behind) -> str | None:
    with torch.device("meta"):
        model = Model(behind)
    setting = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
    facts = trace_model(model, setting).facts
    assert [limit.label for limit in facts.tp_limits or ()] == ["expert width"], facts
    return facts.undivided


LINEAR: dict[str, Behind] = {
    "as it is": lambda block, x, y: y,
    "scaled": lambda block, x, y: y * 2.5,
    "scaled by the input": lambda block, x, y: y * torch.sigmoid(block.gate(x)),
    "added to itself": lambda block, x, y: y + y / 3,
    "into zeros": lambda block, x, y: torch.zeros_like(x).index_add_(
        1, torch.arange(x.shape[1], device=x.device), y
    ),
    "moved": lambda block, x, y: torch.cat([y[..., 8:], y[..., :8]], dim=-1),
}
NOT_LINEAR: dict[str, Behind] = {
    "the input is added": lambda block, x, y: y + x,
    "a number is added": lambda block, x, y: y + 1.0,
    "its norm": lambda block, x, y: block.norm(y),
    "its square": lambda block, x, y: y * y,
    "into the input": lambda block, x, y: x.clone().index_add_(
        1, torch.arange(x.shape[1], device=x.device), y
    ),
    "an activation": lambda block, x, y: F.gelu(y),
}


@pytest.mark.parametrize("name", first_fast(LINEAR, 2))
def test_what_is_linear_can_be_summed_behind_the_block(name: str) -> None:
    assert undivided(LINEAR[name]) is None


@pytest.mark.parametrize("name", first_fast(NOT_LINEAR, 2))
def test_what_is_not_linear_is_refused(name: str) -> None:
    assert NOT_LINEAR_WORDS in str(undivided(NOT_LINEAR[name]))


def test_a_block_that_gives_something_else_is_refused() -> None:
    words = undivided(lambda block, x, y: x * 2)
    assert words == "Block does not give the sum over the ranks first"
