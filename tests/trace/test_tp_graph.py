"""What a plan does not name is found by what a model does."""

import pytest
import torch
from torch import nn

from mist.plans.workload import Attention, Precision
from mist.trace import trace_model
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import TraceSetting
from mist.trace.runs import sharding_rules
from mist.trace.tensor_parallel.tp_sharding import Sharding, UnsupportedRules

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


@pytest.mark.slow
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


class TorchLayer(nn.Module):
    """Torch's own attention, asked for weights: all heads in one matrix, or three matrices."""

    def __init__(self, key_dim: int | None, *, returns: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            HIDDEN, HEADS, kdim=key_dim, vdim=key_dim, batch_first=True
        )
        self.returns = returns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = x[..., : self.attention.kdim] if self.attention.kdim < HIDDEN else x
        result, weights = self.attention(x, memory, memory)
        total: torch.Tensor = result + weights.sum() if self.returns else result
        return x + total


def torch_sharding(
    key_dim: int | None = None, *, returns: bool = False
) -> tuple[nn.Module, Sharding]:
    with torch.device("meta"):
        layers = (TorchLayer(key_dim, returns=returns) for _ in range(2))
        model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN), *layers, nn.Linear(HIDDEN, VOCAB))
    loaded = LoadedModel(module=model, name="torch", make_batch=None, loss=None)
    return model[1].get_submodule("attention"), sharding_rules(loaded, SETTING)


def test_torchs_attention_divides_its_heads() -> None:
    """Its forward reads all matrices: it is entered, and ends the region, as a whole."""
    attention, sharding = torch_sharding()
    assert isinstance(attention, nn.MultiheadAttention)
    region = sharding.regions[0]
    assert region.columns == region.rows == region.entered == region.ends == {id(attention)}
    packed = sharding.params[id(attention.in_proj_weight)]
    assert (packed.unit, packed.pieces, packed.dim) == (HEADS, 3, 0)
    assert sharding.params[id(attention.out_proj.weight)].dim == 1
    assert id(attention.out_proj.bias) not in sharding.params
    assert (sharding.limits[0].size, sharding.notes) == (HEADS, ())


def test_matrices_of_torchs_attention_share_one_bias() -> None:
    attention, sharding = torch_sharding(HIDDEN // 2)
    assert isinstance(attention, nn.MultiheadAttention)
    for weight in (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight):
        assert sharding.params[id(weight)].pieces == 1
    assert sharding.params[id(attention.in_proj_bias)].pieces == 3


def test_weights_of_attention_that_are_read_keep_it_whole() -> None:
    """Torch gives their mean over the heads, of which a rank has only its own."""
    with pytest.raises(UnsupportedRules) as refusal:
        torch_sharding(returns=True)
    assert str(refusal.value) == (
        "no shard can run aten.mean in attention: goes over a divided dimension; t = 1 only"
    )


class Classifier(nn.Module):
    """As many kinds of tokens as classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.kinds, self.table = nn.Embedding(classes, HIDDEN), nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(PlannedLayer() for _ in range(2))
        self.head = nn.Linear(HIDDEN, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.kinds(torch.zeros_like(ids))
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.head(x)
        return result


@pytest.mark.slow
def test_a_table_of_kinds_of_tokens_is_no_vocabulary() -> None:
    with torch.device("meta"):
        model = Classifier(classes=2)
    loaded = LoadedModel(module=model, name="classifier", make_batch=None, loss=None)
    sharding = sharding_rules(loaded, SETTING)
    tables = {id(each.weight) for each in (model.kinds, model.table, model.head)}
    assert (sharding.vocab_size, tables & sharding.params.keys()) == (None, set())


class GatedLayer(nn.Module):
    """Its last matrices scale what each layer was given for itself (Gemma 3n and 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.gate, self.back = nn.Linear(HIDDEN, HEADS), nn.Linear(HEADS, HIDDEN)

    def forward(self, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        x = x + self.down(self.up(x).relu())
        result: torch.Tensor = x + self.back(self.gate(x).relu() * own)
        return result


class GatedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.own = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(VOCAB, HEADS)
        self.layers = nn.ModuleList(GatedLayer() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, own = self.table(ids), self.own(ids)
        for layer in self.layers:
            x = layer(x, own)
        result: torch.Tensor = self.head(x)
        return result


def test_what_meets_an_activation_of_another_width_stays_whole() -> None:
    """A rank that read a part of `own` would give a part of its gradient."""
    with torch.device("meta"):
        model = GatedModel()
    loaded = LoadedModel(module=model, name="gated", make_batch=None, loss=None)
    sharding = sharding_rules(loaded, SETTING)
    layer = model.layers[0]
    assert isinstance(layer, GatedLayer)
    assert {id(layer.up.weight), id(layer.down.weight)} <= sharding.params.keys()
    assert not {id(layer.gate.weight), id(layer.back.weight)} & sharding.params.keys()
