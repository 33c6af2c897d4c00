"""Plain modules: which list is the layers, what belongs to whom, what a rank holds."""

from dataclasses import replace
from typing import NoReturn

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mist.model.graph import B, ModelGraph, OpKind, S, T, TensorLayout
from mist.model.summary import LayerRun, TpLimit
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.repeated_blocks import find_layers
from mist.trace.tensor_parallel.tp_sharding import UnsupportedRules

FP32 = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH)
WIDTH, VOCAB = 32, 96


class Layer(nn.Module):
    def __init__(self, index: int, window: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer_idx, self.window, self.dropout = index, window, dropout
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, -self.window :] if self.window else x
        return x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training)


class Model(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Twice(Model):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return self.head(x)


def traced(model: nn.Module) -> ModelGraph:
    return trace_model(model, FP32)


def test_equal_layers_are_one_run() -> None:
    graph = traced(Model([Layer(i) for i in range(5)]))
    assert graph.layers == (LayerRun(block=0, count=5),)
    assert graph.notes == ()
    assert graph.tp_limits == (TpLimit(label="MLP width", size=4 * WIDTH),)


@pytest.mark.slow
def test_layers_alternate_by_a_setting() -> None:
    model = Model([Layer(i, dropout=0.1 * (i % 2)) for i in range(4)])
    assert traced(model).layers == tuple(LayerRun(block=i % 2, count=1) for i in range(4))


def test_dropout_rates_do_not_tell_layers_apart() -> None:
    layers = find_layers(Model([Layer(i, dropout=0.1 * (i + 1)) for i in range(3)]))
    assert layers is not None
    assert len(set(layers.signatures)) == 1


def test_layer_costs() -> None:
    (block,) = traced(Model([Layer(i) for i in range(2)])).blocks
    assert block.flop("forward") == 2 * 2 * 4 * WIDTH**2 * B * S / T
    assert block.flop("backward") == 2 * block.flop("forward")
    # x, and the inputs of gelu and of down, fp32.
    assert sum(t.bytes for t in block.saved).equals(4 * WIDTH * B * S * (1 + 8 / T))
    assert block.boundary_bytes == 4 * WIDTH * B * S
    assert [p.name for p in block.params] == ["up.weight", "up.bias", "down.weight", "down.bias"]


def test_unequal_children_are_runs_of_one() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB))
    graph = traced(model)
    assert graph.layers == tuple(LayerRun(block=i, count=1) for i in range(3))
    assert graph.embed.num_params == graph.head.num_params == 0
    assert sum(block.num_params for block in graph.blocks) == graph.num_params


def test_model_without_layers_is_one_block() -> None:
    graph = traced(Model([Layer(0)]))
    assert graph.layers == (LayerRun(block=0, count=1),)
    (block,) = graph.blocks
    assert block.name == "Model"
    assert block.num_params == graph.num_params
    assert (graph.embed.ops, graph.head.ops, graph.embed.params, graph.head.params) == ((),) * 4
    assert graph.notes[0] == (
        "no list of layers that are called once each in order: one block, one layer"
    )


def test_layers_called_twice_run_twice() -> None:
    graph = traced(Twice([Layer(i) for i in range(2)]))
    assert graph.num_layers == 4
    layers = [graph.blocks[kind] for kind in graph.layer_kinds()]
    assert {layer.flop("forward") for layer in layers} == {16 * WIDTH**2 * B * S / T}
    assert [layer.num_params > 0 for layer in layers] == [True, True, False, False]


def test_user_batch_and_loss() -> None:
    def make_batch(batch: int, seq: int) -> dict[str, torch.Tensor]:
        return {"ids": torch.zeros(batch, seq, 2, dtype=torch.int64)[..., 0]}

    def loss(output: torch.Tensor, batch: object) -> torch.Tensor:
        assert isinstance(batch, dict)
        return output.square().mean()

    graph = trace_model(Model([Layer(i) for i in range(2)]), FP32, make_batch=make_batch, loss=loss)
    assert "aten.nll_loss_forward" not in {op.name for op in graph.head.ops}
    assert "aten.pow" in {op.name for op in graph.head.ops}


def test_a_loss_that_is_a_pair_costs_what_its_mean_does() -> None:
    def mean(output: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.flatten(0, 1), ids.flatten())

    def pair(output: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = F.cross_entropy(output.flatten(0, 1), ids.flatten(), reduction="sum")
        return total, (ids != -100).sum()

    model = Model([Layer(i) for i in range(2)])
    heads = [trace_model(model, FP32, loss=loss).head for loss in (mean, pair)]
    flop = [(head.flop("forward"), head.flop("backward")) for head in heads]
    at = {B: 4, S: 64, T: 1}
    saved = [sum(int(each.bytes.subs(at)) for each in head.saved) for head in heads]
    assert flop[0] == flop[1]
    assert abs(saved[0] - saved[1]) <= 16  # the number itself


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cuda", "cpu"])
def test_math_attention_keeps_the_scores(policy: str) -> None:
    """4 heads: the probabilities [b, 4, s, s] in fp32 are kept for backward."""

    class Attend(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.view(*x.shape[:2], 4, 8).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            return out.transpose(1, 2).reshape(x.shape)

    setting = TraceSetting(precision=Precision.FP32, attention=Attention.MATH, policy=policy)
    (block,) = trace_model(Model([Attend(), Attend()]), setting).blocks
    assert not [op for op in block.ops if op.kind is OpKind.ATTENTION]
    assert 16 * B * S**2 in {tensor.bytes for tensor in block.saved}


class Sharded(Model):
    tp_plan = {"embed": "rowwise", "*.up": "colwise", "*.down": "rowwise", "head": "colwise"}  # noqa: RUF012


class Unknown(Model):
    tp_plan = {"layers.*": "diagonal"}  # noqa: RUF012 - a style that nobody knows


def test_found_pairs_are_those_of_a_plan() -> None:
    layers = [Layer(i) for i in range(2)]
    found, planned = traced(Model(layers)), traced(Sharded(layers))
    assert found == replace(planned, name="Model")


class Fused(nn.Module):
    """Attention by heads of 8, one matrix [q | k | v], with numbers that are smaller on a rank."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.num_heads, self.num_kv_heads = 4, kv_heads
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * 8 * kv_heads)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        heads, kv_heads = self.num_heads, self.num_kv_heads
        q, k, v = self.qkv(self.norm(x)).split([8 * heads, 8 * kv_heads, 8 * kv_heads], dim=-1)
        q, k, v = (each.view(b, s, -1, 8).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).reshape(b, s, -1))


@pytest.mark.slow
def test_fused_heads_are_found() -> None:
    graph = traced(Model([Fused(2), Fused(2)]))
    assert graph.tp_limits == (
        TpLimit(label="attention heads", size=4),
        TpLimit(label="key/value heads", size=2),
    )
    (block,) = graph.blocks
    assert [p.name for p in block.params if p.sharded] == ["qkv.weight", "qkv.bias", "out.weight"]
    assert block.flop("forward").equals(B * S * (2 * WIDTH * 96 + 4 * S * WIDTH) / T)
    assert (block.num_entries, block.num_exits, block.num_whole) == (1, 1, 0)


@pytest.mark.slow
def test_one_key_head_cannot_be_divided() -> None:
    """The attention of all heads runs on every rank, on all tokens, also of a divided sequence."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.mlp = Fused(1), Layer(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(self.attend(x))

    graph = traced(Model([Both(), Both()]))
    assert graph.tp_limits == (TpLimit(label="MLP width", size=4 * WIDTH),)
    assert graph.notes == (
        "attention stays whole on every tensor-parallel rank: its heads are not divided",
    )
    (block,) = graph.blocks
    assert (block.num_entries, block.num_exits, block.num_whole) == (1, 1, 1)
    kinds = {tensor.layout for tensor in block.saved if tensor.module.startswith("attend")}
    assert kinds == {TensorLayout.GATHERED}
    assert [c.count for c in block.collectives(sequence_parallel=True)] == [2, 1, 2, 1]


def test_a_norm_over_the_width_keeps_a_pair_whole() -> None:
    class Normed(Layer):
        def __init__(self) -> None:
            super().__init__(0)
            self.norm = nn.LayerNorm(4 * WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.norm(self.up(x)))

    graph = traced(Model([Normed(), Normed()]))
    assert graph.tp_limits is None
    assert graph.notes == ("no matrices that tensor parallelism could divide; t = 1 only",)


@pytest.mark.slow
def test_matrices_around_the_residual_stream_are_no_pair() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(x + self.first(x))

    assert traced(Model([Single(), Single()])).tp_limits is None


def test_shares_of_a_rank() -> None:
    graph = traced(Sharded([Layer(i) for i in range(2)]))
    assert graph.tp_limits == (TpLimit(label="MLP width", size=4 * WIDTH),)
    assert graph.notes == ()
    (block,) = graph.blocks
    assert (block.num_entries, block.num_exits) == (1, 1)
    assert [p.name for p in block.params if p.sharded] == ["up.weight", "up.bias", "down.weight"]
    assert block.flop("forward").equals(16 * WIDTH**2 * B * S / T)
    assert sum(t.bytes for t in block.saved).equals(4 * WIDTH * B * S * (1 + 8 / T))


def undivided(*_: object) -> NoReturn:
    raise UnsupportedRules("nothing is divided here")


def test_at_one_rank_shares_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Layer(i) for i in range(2)]
    shared = traced(Sharded(layers))
    monkeypatch.setattr("mist.trace.runs.sharded_run", undivided)
    whole = traced(Model(layers))
    for ours, plain in zip(
        (shared.embed, *shared.blocks, shared.head),
        (whole.embed, *whole.blocks, whole.head),
        strict=True,
    ):
        assert [op.flop.subs(T, 1) for op in ours.ops] == [op.flop for op in plain.ops]
        assert [op.traffic_bytes.subs(T, 1) for op in ours.ops] == [
            op.traffic_bytes for op in plain.ops
        ]
        assert [t.bytes.subs(T, 1) for t in ours.saved] == [t.bytes for t in plain.saved]


@pytest.mark.slow
def test_vocabulary_that_does_not_divide_is_noted() -> None:
    model = Sharded([Layer(i) for i in range(2)])
    model.embed, model.head = nn.Embedding(97, WIDTH), nn.Linear(WIDTH, 97, bias=False)
    assert traced(model).notes == (
        "the vocabulary of 97 is taken as 97/t per rank; frameworks pad it",
    )


@pytest.mark.slow
def test_an_unknown_style_leaves_it_to_the_operations() -> None:
    layers = [Layer(i) for i in range(2)]
    assert traced(Unknown(layers)) == replace(traced(Model(layers)), name="Unknown")


def test_an_unknown_style_is_noted_where_nothing_is_divided() -> None:
    graph = traced(Unknown([nn.Linear(WIDTH, WIDTH) for _ in range(2)]))
    assert graph.tp_limits is None
    assert graph.notes == (
        "tensor-parallel style 'diagonal' of layers.0 (Linear) is not known to Mist; t = 1 only",
    )


class Two(nn.Module):
    """A layer of two pairs of matrices."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.first, self.second = Layer(index), Layer(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_plan_holds_beside_an_unknown_style() -> None:
    model = Model([Two(i) for i in range(2)])
    model.tp_plan = {
        "layers.*.first.up": "diagonal",
        "layers.*.up": "colwise",
        "layers.*.down": "rowwise",
    }
    (block,) = traced(model).blocks
    assert block.flop("forward").equals(2 * 2 * 2 * 4 * WIDTH**2 * B * S / T)
    assert [p.name for p in block.params if p.sharded] == [
        f"{pair}.{name}" for pair in ("first", "second")
        for name in ("up.weight", "up.bias", "down.weight")
    ]  # fmt: skip


@pytest.mark.slow
def test_rules_that_do_not_fit_are_noted(capfd: pytest.CaptureFixture[str]) -> None:
    model = Model([Layer(i) for i in range(2)])
    model.tp_plan = {"layers.*.up": "colwise"}  # down still takes all inputs
    graph = traced(model)
    assert graph.tp_limits is None
    assert graph.notes == (
        "tensor parallelism cannot be traced (a part of a tensor meets a whole one "
        f"({__file__}:30: return x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, "
        "self.training))); t = 1 only",
    )
    assert capfd.readouterr().err == ""  # torch logs such errors


def test_a_model_in_evaluation_mode_is_traced_as_it_trains() -> None:
    model = Model([Layer(i, dropout=0.1) for i in range(2)]).eval()
    (block,) = traced(model).blocks
    assert "aten.native_dropout" in {op.name for op in block.ops}
    assert not any(module.training for module in model.modules())


def test_a_table_of_positions_limits_the_sequence() -> None:
    class Table(Model):
        def __init__(self) -> None:
            super().__init__([Layer(i) for i in range(2)])
            self.positions = nn.Parameter(torch.zeros(512, WIDTH))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids) + self.positions[: ids.shape[1]]
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    graph = traced(Table())
    assert graph.blocks[0].domain == (S <= 512,)
    assert "positions" in {param.name for param in graph.embed.params}
