"""Models of any shape: layers in several lists, routing by value, sizes that only numbers have."""

from itertools import pairwise

import pytest
import sympy
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mist.errors import TraceError
from mist.model.graph import B, ModelGraph, OpKind, S, T
from mist.model.summary import Lengths
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.recording.layer_dependencies import CHANGED, HEAD_TAKES_MORE, TAKES_MORE
from mist.trace.repeated_blocks import find_layers
from mist.trace.runs import NOT_SYMBOLIC, ROUTED
from tests.trace.real import Measured, measure
from tests.trace.test_exact import ALONE, at, build, flop, saved_bytes
from tests.trace.test_repeated_blocks import WIDTH, Layer, Model

CPU = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, policy="cpu")
BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)


class Experts(nn.Module):
    """Each expert picks its rows by value: 2 of 4 experts a token."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = 4, 2
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, WIDTH)
        _, chosen = self.gate(rows).topk(self.top_k)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, _ = torch.where(chosen == number)
            out = out.index_add(0, token, expert(rows[token]))
        return x + out.view(x.shape)


def traced(model: nn.Module, setting: TraceSetting = CPU) -> ModelGraph:
    return trace_model(model, setting)


def test_rows_of_an_expert_are_those_of_even_routing() -> None:
    """b s k / E rows each: together k products of h x h a token, whatever the routing."""
    graph = traced(Model([Experts(), Experts()]))
    (block,) = graph.blocks
    assert ROUTED in graph.notes
    assert (
        sum(op.flop for op in block.ops if op.phase == "forward")
        == (2 * WIDTH * 4 + 2 * 2 * WIDTH**2) * B * S
    )
    products = [op for op in block.ops if op.kind is OpKind.GEMM and op.phase == "forward"]
    assert [op.dims for op in products[1:]] == [(1, B * S / 2, WIDTH, WIDTH)] * 4


class SortedExperts(Experts):
    """Rows are sorted by expert, and split at numbers that are counted (JetMoE, ScatterMoE)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, WIDTH)
        _, chosen = self.gate(rows).topk(self.top_k)
        counts = torch.zeros_like(chosen[:, :1]).expand(-1, 4).scatter(1, chosen, 1).sum(0)
        order = chosen.flatten().argsort()
        token = order.div(self.top_k, rounding_mode="trunc")
        parts = rows[token].split(counts.tolist())
        out = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return x + torch.zeros_like(rows).index_add(0, token, torch.cat(out)).view(x.shape)


def test_rows_that_are_counted_are_those_of_even_routing() -> None:
    """All experts together have b s k rows, so bytes and FLOPs are those of any routing."""
    (block,) = traced(Model([SortedExperts(), SortedExperts()])).blocks
    assert block.domain == ()
    for b, s in ((1, 32), (2, 48), (3, 77)):
        model = Model([SortedExperts(), SortedExperts()])
        real = measure(model, "layers.0", {"ids": torch.zeros(b, s, dtype=torch.int64)})
        assert (
            saved_bytes(block.saved_single if b == 1 else block.saved, b, s),
            sum(flop(block, "forward", kind, b, s) for kind in OpKind),
            sum(flop(block, "backward", kind, b, s) for kind in OpKind),
        ) == (real.saved_bytes, real.forward_flop, real.backward_flop)


class EndedExperts(SortedExperts):
    """Rows are cut at running sums of the counts, which are no rows of an expert."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, WIDTH)
        _, chosen = self.gate(rows).topk(self.top_k)
        counts = torch.zeros_like(chosen[:, :1]).expand(-1, 4).scatter(1, chosen, 1).sum(0)
        ends = [0, *counts.cumsum(0).tolist()]
        out = [each(rows[a:b]) for each, (a, b) in zip(self.experts, pairwise(ends), strict=True)]
        return x + torch.cat(out).view(x.shape)


def test_running_sums_of_counts_are_refused() -> None:
    with pytest.raises(TraceError, match=r"depends on the values of tensors|decides by the values"):
        traced(Model([EndedExperts(), EndedExperts()]))


def test_capacity_makes_experts_larger() -> None:
    setting = TraceSetting(
        precision=Precision.FP32, attention=Attention.FLASH, policy="cpu", capacity_ratio=1.25
    )
    block = traced(Model([Experts(), Experts()]), setting).blocks[0]
    products = [op for op in block.ops if op.kind is OpKind.GEMM and op.phase == "forward"]
    assert products[1].dims == (1, B * S * sympy.Rational(5, 8), WIDTH, WIDTH)


def test_values_that_are_no_routing_are_refused() -> None:
    class Chooses(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x[x > 0].sum()

    with pytest.raises(TraceError):
        traced(Model([Chooses(0), Chooses(1)]))


class Solves(Layer):
    """A triangular system of each token's parts, and their angles: what torch has no shapes for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.view(*x.shape[:2], WIDTH // 4, 4)
        matrix = (parts.unsqueeze(-1) * parts.unsqueeze(-2)).tril(-1)
        solved = torch.linalg.solve_triangular(
            matrix, parts.unsqueeze(-1), upper=False, unitriangular=True
        )
        turned = torch.polar(torch.ones_like(parts), solved.squeeze(-1))
        return super().forward(turned.real.flatten(2))


def test_solutions_and_polar_form_have_symbolic_sizes() -> None:
    """4 x 4 systems of one column, of a quarter of the width's number: 16 FLOPs each."""
    graph = traced(Model([Solves(i) for i in range(2)]))
    assert NOT_SYMBOLIC not in graph.notes
    (block,) = graph.blocks
    assert (
        sum(
            op.flop
            for op in block.ops
            if op.name == "aten.linalg_solve_triangular" and op.phase == "forward"
        )
        == 16 * WIDTH // 4 * B * S
    )
    assert {size for size in block.domain if size.has(S)} == set()


class Padded(Layer):
    """Pads to a multiple by numbers, which no symbol can be."""

    def __init__(self, index: int, multiple: int = 64) -> None:
        super().__init__(index)
        self.multiple = multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seq = int(x.shape[1])
        return super().forward(F.pad(x, (0, 0, 0, -seq % self.multiple)))[:, :seq]


@pytest.mark.slow
def test_concrete_sizes_give_exact_polynomials() -> None:
    graph = traced(Model([Padded(i) for i in range(2)]))
    (block,) = graph.blocks
    assert graph.notes == (NOT_SYMBOLIC,)
    assert set(block.domain) == {B <= 64, S <= 8192, sympy.Eq(sympy.Mod(S, 64), 0)}
    assert block.flop("forward") == 16 * WIDTH**2 * B * S
    model = Model([Padded(i) for i in range(2)])
    for b, s in ((1, 64), (2, 192), (3, 640)):
        real = measure(model, "layers.1", {"ids": torch.zeros(b, s, dtype=torch.int64)})
        saved = saved_bytes(block.saved_single if b == 1 else block.saved, b, s)
        assert (saved, max(at(size, b, s) for size in block.transient_bytes)) == (
            real.saved_bytes,
            real.transient_bytes,
        )


@pytest.mark.slow
def test_a_loop_over_chunks_holds_for_its_length_only() -> None:
    class Chunks(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = [super(Chunks, self).forward(x[:, i : i + 64])
                     for i in range(0, int(x.shape[1]), 64)]  # fmt: skip
            return torch.cat(parts, dim=1)

    graph = traced(Model([Chunks(i) for i in range(2)]))
    assert graph.lengths == Lengths(first=384, last=384)
    assert graph.blocks[0].domain == (sympy.Eq(S, 384),)


@pytest.mark.slow  # tests/exec/test_tensor_sizes.py trains one
def test_encoder_and_decoder_are_two_lists() -> None:
    config = transformers.T5Config(
        vocab_size=512, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4
    )
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    graph = traced(model, BF16)
    names = [graph.blocks[run.block].name for run in graph.layers]
    assert names == ["T5Block", "T5Block", "T5Block", "T5Block"]
    assert graph.sequential and graph.tied
    assert graph.unstaged == graph.whole_sequence == TAKES_MORE
    held = [param for b in (graph.embed, *graph.blocks, graph.head) for param in b.params]
    assert sum(param.numel for param in held if not param.tied) == graph.num_params
    last = graph.blocks[graph.layers[-1].block]
    # The encoder's result [b, s, 64] and the table of positions [1, 4, s, s], bf16.
    assert sympy.expand(last.carried_bytes - 128 * B * S - 8 * S**2) == 0


def test_residuals_outside_the_layers() -> None:
    class Outside(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x)

    graph = traced(Outside([Layer(i) for i in range(3)]))
    assert graph.sequential
    assert [run.count for run in graph.layers] == [3]
    assert graph.unstaged == CHANGED


def test_layers_compute_in_their_own_precision_whatever_a_table_of_positions_has() -> None:
    """FSDP2 casts what a layer is given: a buffer of fp32 is as a table that the model casts."""

    class Positions(Model):
        def __init__(self, *, casts: bool) -> None:
            super().__init__([Layer(i) for i in range(2)])
            self.casts = casts
            self.register_buffer("table", torch.zeros(1, 4096, WIDTH))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            table = self.table[:, : ids.shape[1]]
            x = self.embed(ids)
            x = x + (table.to(x.dtype) if self.casts else table)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    own, cast = (traced(Positions(casts=casts), BF16) for casts in (False, True))
    assert own.blocks == cast.blocks
    assert own.blocks[0].boundary_bytes == 2 * WIDTH * B * S


@pytest.mark.slow
def test_a_head_that_takes_more_than_the_last_layer_gives() -> None:
    class Skips(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = embedded = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(x + embedded)

    class Collects(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            given = [self.embed(ids)]
            for layer in self.layers:
                given.append(layer(given[-1]))
            return self.head(torch.stack(given[1:]).sum(0))

    graphs = [traced(kind([Layer(i) for i in range(3)])) for kind in (Model, Skips, Collects)]
    assert [graph.unstaged for graph in graphs] == [None, HEAD_TAKES_MORE, HEAD_TAKES_MORE]


def test_lists_of_lists_are_their_children() -> None:
    model = nn.ModuleDict({"levels": nn.ModuleList(
        nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(3)
    )})  # fmt: skip
    layers = find_layers(model)
    assert layers is not None
    assert len(layers.modules) == 6


def test_strides_tell_layers_apart() -> None:
    layers = find_layers(nn.Sequential(nn.Conv2d(4, 4, 3, stride=1), nn.Conv2d(4, 4, 3, stride=2)))
    assert layers is not None
    assert len(set(layers.signatures)) == 2


FAMILIES = {
    "llama": (transformers.LlamaConfig, {"intermediate_size": 64}),
    "gpt2": (transformers.GPT2Config, {}),
    "mixtral": (
        transformers.MixtralConfig,
        {"intermediate_size": 32, "num_local_experts": 4, "num_key_value_heads": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_affine_in_the_layers(family: str) -> None:
    """Traced with 2, 3 and 4 layers: one block, the same ends, parameters in a line.

    One layer is no list of layers: the model is one block, with the FLOPs of ends and one layer.
    """
    kind, more = FAMILIES[family]
    graphs = [
        traced(build(kind(vocab_size=128, hidden_size=64, num_hidden_layers=layers,
                          num_attention_heads=4, **more), torch.bfloat16, "meta"), BF16)
        for layers in (1, 2, 3, 4)
    ]  # fmt: skip
    single, first, *others = graphs
    for graph in others:
        assert graph.blocks == first.blocks
        assert (graph.embed, graph.head, graph.shared) == (first.embed, first.head, first.shared)
    numbers = [graph.num_params for graph in graphs]
    assert {b - a for a, b in pairwise(numbers)} == {first.blocks[0].num_params}
    for phase in ("forward", "backward"):
        ends = first.embed.flop(phase) + first.head.flop(phase)
        whole = sympy.Add(*(block.flop(phase) for block in single.blocks)).subs(T, 1)
        assert sympy.expand(whole - (ends + first.blocks[0].flop(phase)).subs(T, 1)) == 0


class Variant(nn.Module):
    """One transformer layer of many: heads, groups, width, gate, norm, bias."""

    def __init__(self, heads: int, kv: int, ffn: int, gated: bool, norm: str, bias: bool) -> None:
        super().__init__()
        make = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm]
        self.head_dim = 8
        self.norms = nn.ModuleList(make(WIDTH) for _ in range(2))
        self.q = nn.Linear(WIDTH, 8 * heads, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, 8 * kv, bias=bias) for _ in range(2))
        self.o = nn.Linear(8 * heads, WIDTH, bias=bias)
        self.up, self.down = nn.Linear(WIDTH, ffn, bias=bias), nn.Linear(ffn, WIDTH, bias=bias)
        self.gate = nn.Linear(WIDTH, ffn, bias=bias) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        y = self.norms[0](x)
        q, k, v = (m(y).view(b, s, -1, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, -1))
        y = self.norms[1](x)
        up = F.silu(self.gate(y)) * self.up(y) if self.gate is not None else F.gelu(self.up(y))
        return x + self.down(up)


VARIANTS = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([2, 4, 6]),
        "kv": st.sampled_from([1, 2]),
        "ffn": st.sampled_from([24, 64]),
        "gated": st.booleans(),
        "norm": st.sampled_from(["layer", "rms"]),
        "bias": st.booleans(),
    }
)
POINTS = st.tuples(st.integers(1, 4), st.integers(2, 70))


def random_variant(sizes: dict[str, object], half: bool, tied: bool, device: str) -> nn.Module:
    with torch.device(device):
        model = Model([Variant(**sizes) for _ in range(2)])
        if tied:
            model.head.weight = model.embed.weight
    return model.to(torch.bfloat16 if half else torch.float32)


def variant_is_exact(
    sizes: dict[str, object], half: bool, tied: bool, points: list[tuple[int, int]]
) -> None:
    precision = Precision.BF16 if half else Precision.FP32
    setting = TraceSetting(precision=precision, attention=Attention.FLASH, policy="cpu")
    graph = traced(random_variant(sizes, half, tied, "meta"), setting)
    block, model = graph.blocks[0], random_variant(sizes, half, tied, "cpu")
    assert graph.num_params == sum(p.numel() for p in model.parameters())
    assert graph.tied == tied
    for b, s in points:
        real = measure(model, "layers.1", {"ids": torch.zeros(b, s, dtype=torch.int64)})
        saved = saved_bytes(block.saved_single if b == 1 else block.saved, b, s)
        assert real == Measured(
            saved_bytes=saved,
            live_bytes=saved,
            transient_bytes=max(at(size, b, s) for size in block.transient_bytes),
            transient_with_grads_bytes=max(
                at(size, b, s) for size in block.transient_with_grads_bytes
            ),
            transient_adding_bytes=max(at(size, b, s) for size in block.transient_adding_bytes),
            forward_flop=flop(block, "forward", OpKind.GEMM, b, s),
            backward_flop=flop(block, "backward", OpKind.GEMM, b, s),
        ), (sizes, b, s)
        assert all(size.subs(ALONE).free_symbols <= {B, S} for size in block.transient_bytes)


@pytest.mark.slow
@settings(max_examples=3)
@given(VARIANTS, st.booleans(), st.booleans(), st.lists(POINTS, min_size=2, max_size=2))
def test_random_transformers_are_exact(
    sizes: dict[str, object], half: bool, tied: bool, points: list[tuple[int, int]]
) -> None:
    variant_is_exact(sizes, half, tied, points)


@pytest.mark.slow
@settings(max_examples=25)
@given(VARIANTS, st.booleans(), st.booleans(), st.lists(POINTS, min_size=3, max_size=3))
def test_many_random_transformers_are_exact(
    sizes: dict[str, object], half: bool, tied: bool, points: list[tuple[int, int]]
) -> None:
    variant_is_exact(sizes, half, tied, points)
