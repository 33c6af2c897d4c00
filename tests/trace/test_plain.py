"""Plain modules: which list is the layers, what belongs to whom, what a rank holds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mist.errors import TraceError
from mist.facts import LayerRun, TpLimit
from mist.graph import B, ModelGraph, OpKind, S, T
from mist.spec import Attention, Precision
from mist.trace import Setting, trace_model
from mist.trace.repeat import find_layers

FP32 = Setting(precision=Precision.FP32, attention=Attention.FLASH)
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
    assert graph.notes == (
        "no tensor-parallel rules are known for this model (tp_plan); t = 1 only",
    )
    assert graph.tp_limits is None


def test_layers_alternate_by_a_setting() -> None:
    model = Model([Layer(i, dropout=0.1 * (i % 2)) for i in range(4)])
    assert traced(model).layers == tuple(LayerRun(block=i % 2, count=1) for i in range(4))


def test_dropout_rates_do_not_tell_layers_apart() -> None:
    layers = find_layers(Model([Layer(i, dropout=0.1 * (i + 1)) for i in range(3)]))
    assert layers is not None
    assert len(set(layers.signatures)) == 1


def test_layer_costs() -> None:
    (block,) = traced(Model([Layer(i) for i in range(2)])).blocks
    assert block.flop("forward") == 2 * 2 * 4 * WIDTH**2 * B * S
    assert block.flop("backward") == 2 * block.flop("forward")
    # x, and the inputs of gelu and of down, fp32.
    assert sum(t.bytes for t in block.saved) == 4 * (1 + 4 + 4) * WIDTH * B * S
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


def test_layers_called_twice_are_one_block() -> None:
    graph = traced(Twice([Layer(i) for i in range(2)]))
    (block,) = graph.blocks
    assert block.flop("forward") == (4 * 16 * WIDTH**2 + 2 * WIDTH * VOCAB) * B * S
    assert len(graph.notes) == 2


def test_user_batch_and_loss() -> None:
    def make_batch(batch: int, seq: int) -> dict[str, torch.Tensor]:
        return {"ids": torch.zeros(batch, seq, 2, dtype=torch.int64)[..., 0]}

    def loss(output: torch.Tensor, batch: object) -> torch.Tensor:
        assert isinstance(batch, dict)
        return output.square().mean()

    graph = trace_model(Model([Layer(i) for i in range(2)]), FP32, make_batch=make_batch, loss=loss)
    assert "aten.nll_loss_forward" not in {op.name for op in graph.head.ops}
    assert "aten.pow" in {op.name for op in graph.head.ops}


@pytest.mark.parametrize("policy", ["cuda", "cpu"])
def test_math_attention_keeps_the_scores(policy: str) -> None:
    """4 heads: the probabilities [b, 4, s, s] in fp32 are kept for backward."""

    class Attend(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.view(*x.shape[:2], 4, 8).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            return out.transpose(1, 2).reshape(x.shape)

    setting = Setting(precision=Precision.FP32, attention=Attention.MATH, policy=policy)
    (block,) = trace_model(Model([Attend(), Attend()]), setting).blocks
    assert not [op for op in block.ops if op.kind is OpKind.ATTENTION]
    assert 16 * B * S**2 in {tensor.bytes for tensor in block.saved}


class Sharded(Model):
    tp_plan = {"embed": "rowwise", "*.up": "colwise", "*.down": "rowwise", "head": "colwise"}  # noqa: RUF012


def test_shares_of_a_rank() -> None:
    graph = traced(Sharded([Layer(i) for i in range(2)]))
    assert graph.tp_limits == (TpLimit(label="MLP width", size=4 * WIDTH),)
    assert graph.notes == ()
    (block,) = graph.blocks
    assert block.num_tp_regions == 1
    assert [p.name for p in block.params if p.sharded] == ["up.weight", "up.bias", "down.weight"]
    assert block.flop("forward").equals(16 * WIDTH**2 * B * S / T)
    assert sum(t.bytes for t in block.saved).equals(4 * WIDTH * B * S * (1 + 8 / T))


def test_at_one_rank_shares_are_the_whole() -> None:
    layers = [Layer(i) for i in range(2)]
    whole, shared = traced(Model(layers)), traced(Sharded(layers))
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


def test_vocabulary_that_does_not_divide_is_noted() -> None:
    model = Sharded([Layer(i) for i in range(2)])
    model.embed, model.head = nn.Embedding(97, WIDTH), nn.Linear(WIDTH, 97, bias=False)
    assert traced(model).notes == (
        "the vocabulary of 97 is taken as 97/t per rank; frameworks pad it",
    )


def test_unknown_style_is_noted() -> None:
    model = Model([Layer(i) for i in range(2)])
    model.tp_plan = {"layers.*.up": "diagonal"}
    graph = traced(model)
    assert graph.tp_limits is None
    assert graph.notes == (
        "tensor-parallel style 'diagonal' of layers.0.up (Linear) is not known to Mist; t = 1 only",
    )


def test_rules_that_do_not_fit_are_noted() -> None:
    model = Model([Layer(i) for i in range(2)])
    model.tp_plan = {"layers.*.up": "colwise"}  # down still takes all inputs
    graph = traced(model)
    assert graph.tp_limits is None
    assert graph.notes[0].startswith("tensor parallelism cannot be traced (")


def test_checkpointing_in_the_model_is_refused() -> None:
    model = Model([Layer(i) for i in range(2)])
    model.gradient_checkpointing = True
    with pytest.raises(TraceError) as error:
        traced(model)
    assert str(error.value) == (
        "Model has gradient checkpointing switched on, but which layers are checkpointed is what a "
        "plan decides. Switch it off (model.gradient_checkpointing_disable())."
    )


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
