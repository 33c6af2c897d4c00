"""What a plan does not name is found by what a model does."""

import torch
from torch import nn

from mist.plans.workload import Attention, Precision
from mist.trace import trace_model
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import TraceSetting
from mist.trace.runs import sharding_rules

HIDDEN, HEADS, VOCAB = 32, 4, 64
SETTING = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH)
PLAN = {"table": "embedding_rowwise", "layers.*.up": "colwise", "layers.*.down": "rowwise"}


class HandAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        weights = self.softmax(q @ k.transpose(-1, -2))
        result: torch.Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return result


class PlannedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = HandAttention()
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        result: torch.Tensor = x + self.down(self.up(x).relu())
        return result


class PlannedModel(nn.Module):
    """Its plan names neither the attention nor the head."""

    tp_plan = PLAN

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(PlannedLayer() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.head(x)
        return result


def test_a_plan_is_completed_by_the_operations() -> None:
    with torch.device("meta"):
        model = PlannedModel()
    loaded = LoadedModel(module=model, name="planned", make_batch=None, loss=None)
    sharding = sharding_rules(loaded, SETTING)
    layer = model.layers[0]
    assert isinstance(layer, PlannedLayer)
    assert {id(m) for m in (layer.attention.out, layer.down)} <= sharding.ends
    assert {id(model.table.weight), id(model.head.weight)} <= sharding.params.keys()
    assert {limit.size for limit in sharding.limits} == {HEADS, 2 * HIDDEN}
    assert (sharding.whole, sharding.notes) == (frozenset(), ())


class JoiningLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.out = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.left(x).relu(), self.right(x).relu()], dim=-1)
        result: torch.Tensor = x + self.out(both)
        return result


def test_shards_side_by_side_are_priced_but_not_applied() -> None:
    """A rank has halves of left and right, the rows of `out` for one of them."""
    with torch.device("meta"):
        layers = [JoiningLayer() for _ in range(2)]
        model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN), *layers, nn.Linear(HIDDEN, VOCAB))
    graph = trace_model(model, SETTING)
    assert graph.tp_limits is not None
    assert graph.undivided is not None
    assert graph.undivided.endswith(
        "puts parts of several matrices side by side, which a rank orders otherwise"
    )
