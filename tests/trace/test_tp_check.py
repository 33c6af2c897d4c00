"""Which operations shards may run: found pairs of matrices against sums over real shards."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from mist.model.graph import B, S
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from tests.fast_cases import first_fast
from tests.trace.test_repeated_blocks import WIDTH, Model

BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
FFN = 32
Between = Callable[[torch.Tensor], torch.Tensor]


class Mlp(nn.Module):
    def __init__(self, between: Between) -> None:
        super().__init__()
        self.between = between
        self.up = nn.Linear(WIDTH, FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.between(self.up(x)))


def written_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def norm_of_groups(x: torch.Tensor) -> torch.Tensor:
    groups = x.unflatten(-1, (-1, 4))
    return F.layer_norm(groups, (4,)).flatten(-2)


BETWEEN: dict[str, Between] = {
    "relu": F.relu,
    "power": lambda x: x.pow(3) * torch.sigmoid(x),
    "mask": lambda x: torch.where(x > 0, x, 0.1 * x).masked_fill(x > 2, 2.0),
    "causal sum": lambda x: x.cumsum(1),
    "softmax over tokens": lambda x: x.softmax(1),
    "norm of groups": norm_of_groups,
    "halves": lambda x: torch.stack([x, -x]).sum(0),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(2),
    "sum": lambda x: x.cumsum(-1),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "written norm": written_norm,
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "sort": lambda x: x.sort(-1).values,
    "whole mean": lambda x: x - x.mean(),
    "outer product": lambda x: (x @ x.transpose(1, 2)) @ x,
}


# Shards would do, if their width were known to be a multiple of the group.
CAUTIOUS = {"norm of groups"}


def sum_over_shards(layer: Mlp, x: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """What t ranks give, by torch on real tensors: columns of up, rows of down, and a sum."""
    shards = zip(layer.up.weight.chunk(num_ranks, 0), layer.down.weight.chunk(num_ranks, 1),
                 strict=True)  # fmt: skip
    return x + sum(F.linear(layer.between(F.linear(x, up)), down) for up, down in shards)


FAST = ("relu", "norm of groups", "softmax", "softmax over tokens", "mean", "outer product")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in BETWEEN]
)
def test_a_pair_is_taken_where_shards_give_the_whole_result(name: str) -> None:
    layer = Mlp(BETWEEN[name]).double()
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    equal = torch.allclose(sum_over_shards(layer, x, 2), layer(x), rtol=0, atol=1e-12)
    graph = trace_model(Model([Mlp(BETWEEN[name]) for _ in range(2)]), BF16)
    taken = graph.tp_limits is not None
    assert taken == (equal and name not in CAUTIOUS)
    assert any("t = 1 only" in note for note in graph.notes) != taken


class Normed(nn.Module):
    """Attention whose queries are normed: over all heads, or over each."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q = written_norm(self.q(x).view(b, s, -1, self.size)).view(b, s, -1, 8)
        k, v = (m(x).view(b, s, -1, 8).transpose(1, 2) for m in (self.k, self.v))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).reshape(b, s, -1))


@pytest.mark.parametrize(("size", "divides"), first_fast([(8, True), (WIDTH, False)], width=2))
def test_norm_of_queries(size: int, divides: bool) -> None:
    graph = trace_model(Model([Normed(size) for _ in range(2)]), BF16)
    assert (graph.tp_limits is not None) == divides


@pytest.mark.slow
def test_a_table_of_positions_is_no_vocabulary() -> None:
    class Positions(Model):
        def __init__(self, positions: int) -> None:
            super().__init__([Mlp(F.relu) for _ in range(2)])
            self.positions = nn.Embedding(positions, WIDTH)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    vocab = Model([]).embed.num_embeddings
    for positions in (vocab, 4 * vocab):
        graph = trace_model(Positions(positions), BF16)
        sharded = {p.name for b in (graph.embed, graph.head) for p in b.params if p.sharded}
        assert sharded == {"embed.weight", "head.weight"}


@pytest.mark.slow
def test_a_decoder_with_an_encoder_is_entered_four_times() -> None:
    """MLP, attention, queries of cross attention, and the encoder's result for keys and values."""
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4
    )
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    graph = trace_model(model, BF16)
    encoder, decoder = graph.blocks[graph.layers[0].block], graph.blocks[graph.layers[-1].block]
    assert (encoder.num_entries, encoder.num_exits, encoder.num_whole) == (2, 2, 0)
    assert (decoder.num_entries, decoder.num_exits, decoder.num_whole) == (4, 3, 0)
    assert graph.head.tp_bytes == 2 * 32 * B * S


class Convolution(nn.Module):
    """Over tokens, by channel: no rank has it whole, none can run a part of it by these numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(self.into(x).transpose(1, 2))[..., : x.shape[1]]
        return x + self.out(y.transpose(1, 2))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.mlp = Convolution(), Mlp(F.relu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.mixer(x))


def test_what_cannot_be_divided_stays_whole_and_gets_all_tokens() -> None:
    graph = trace_model(Model([Mixed(), Mixed()]), BF16)
    (block,) = graph.blocks
    assert {p.name for p in block.params if p.sharded} == {"mlp.up.weight", "mlp.down.weight"}
    assert (block.num_entries, block.num_exits, block.num_whole) == (1, 1, 1)
    (note,) = graph.notes
    assert note.startswith(
        "Convolution stays whole on every tensor-parallel rank: tensor parallelism cannot be traced"
    )
