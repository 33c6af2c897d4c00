"""Parameters with requires_grad=False: what autograd keeps and computes of such models."""

from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mist.errors import TraceError
from mist.model.graph import Block, ModelGraph, OpKind
from mist.model.summary import TpLimit
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.codec import decode_graph, encode_graph
from tests.trace.real import Measured, measure
from tests.trace.test_exact import at, flop, gpt2, llama, saved_bytes

WIDTH, RANK, VOCAB, NUM_LAYERS = 64, 4, 96, 4
POINTS = [(1, 32), (3, 77)]
SETTING = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, policy="cpu")


class Layer(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.a = nn.Linear(WIDTH, rank, bias=False) if rank else None
        self.b = nn.Linear(rank, 4 * WIDTH, bias=False) if rank else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        wide = self.up(y)
        if self.a is not None and self.b is not None:
            wide = wide + self.b(self.a(y))
        return x + self.down(F.gelu(wide))


class Model(nn.Module):
    def __init__(self, rank: int = 0, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer(rank) for _ in range(NUM_LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def train_only(model: nn.Module, words: Iterable[str]) -> nn.Module:
    """Freeze all parameters but those whose names have one of the words."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in words))
    return model


def plain(words: Iterable[str], rank: int = 0, *, tied: bool = False) -> Callable[[str], nn.Module]:
    def make(device: str) -> nn.Module:
        with torch.device(device):
            return train_only(Model(rank, tied), words)

    return make


def hugging(family: Callable[..., nn.Module], words: Iterable[str]) -> Callable[[str], nn.Module]:
    return lambda device: train_only(family(torch.float32, device), words)


UPPER = ("layers.2", "layers.3", "head")
PLAIN = {
    "head": plain(["head"]),
    "upper half": plain(UPPER),
    "one layer amid": plain(["layers.1.up"]),
    "norms": plain(["norm"]),
    "biases": plain(["bias"]),
    "adapters": plain([".a.", ".b."], RANK),
    "upper adapters": plain(["layers.2.a", "layers.2.b", "layers.3.a", "layers.3.b"], RANK),
    "embedding frozen": plain(["layers", "head"]),
    "embedding alone": plain(["embed"]),
    "tied frozen": plain(["layers"], tied=True),
}
CASES = {
    **PLAIN,
    "llama norms": hugging(llama, ["norm"]),
    "llama last layer": hugging(llama, ["layers.1"]),
    "gpt2 biases": hugging(gpt2, ["bias"]),
}


@cache
def traced(name: str) -> ModelGraph:
    return trace_model(CASES[name]("meta"), SETTING)


def path_of(model: nn.Module, index: int) -> str:
    names = ("layers", "model.layers", "transformer.h")
    return next(f"{n}.{index}" for n in names if n in dict(model.named_modules()))


def traced_of(block: Block, b: int, s: int) -> Measured:
    saved = saved_bytes(block.saved_single if b == 1 else block.saved, b, s)
    plain, grads = block.transient_bytes, block.transient_with_grads_bytes
    return Measured(
        saved_bytes=saved,
        live_bytes=saved,
        transient_bytes=max(at(size, b, s) for size in plain),
        transient_with_grads_bytes=max(at(size, b, s) for size in grads),
        transient_adding_bytes=max(at(size, b, s) for size in block.transient_adding_bytes),
        forward_flop=flop(block, "forward", OpKind.GEMM, b, s),
        backward_flop=flop(block, "backward", OpKind.GEMM, b, s),
    )


def inputs(model: nn.Module, b: int, s: int) -> dict[str, object]:
    ids = torch.zeros(b, s, dtype=torch.int64)
    return {"ids": ids} if isinstance(model, Model) else {"input_ids": ids, "use_cache": False}


SLOW = {
    *("llama last layer", "llama norms", "gpt2 biases", "biases", "upper adapters"),
    *("embedding alone", "tied frozen", "norms", "embedding frozen", "upper half"),
}


def marked(names: Iterable[str]) -> list[object]:
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in names]


@pytest.mark.parametrize("name", marked(CASES))
def test_frozen_layers_equal_real_tensors(name: str) -> None:
    graph, model = traced(name), CASES[name]("cpu")
    known = set()
    for index, kind in enumerate(graph.layer_kinds()):
        if kind in known:
            continue
        known.add(kind)
        for b, s in POINTS:
            real = measure(model, path_of(model, index), inputs(model, b, s))
            assert traced_of(graph.blocks[kind], b, s) == real, (index, b, s)
    assert known == set(range(len(graph.blocks)))


@pytest.mark.parametrize("name", marked(PLAIN))
def test_all_flops_are_those_of_torch(name: str) -> None:
    graph, model = traced(name), CASES[name]("cpu")
    ids = torch.zeros(2, 48, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten()).backward()
    layers = [graph.blocks[kind] for kind in graph.layer_kinds()]
    blocks = (graph.embed, *layers, graph.head)
    phases = ("forward", "backward")
    total = sum(flop(block, phase, OpKind.GEMM, 2, 48) for block in blocks for phase in phases)
    assert total == counter.get_total_flops()


@pytest.mark.slow
def test_layers_differ_by_what_is_trained() -> None:
    graph = traced("upper half")
    assert graph.layer_kinds() == (0, 0, 1, 2)  # the first trained one passes no gradient on
    assert [block.goes_back for block in graph.blocks] == [False, True, True]
    assert graph.blocks[0].saved == ()
    trained = sum(p.numel for block in (graph.blocks[1],) for p in block.params if p.trainable)
    assert graph.num_trainable == 2 * trained + WIDTH * VOCAB
    assert graph.num_params == 4 * trained + 2 * WIDTH * VOCAB


def test_tied_parameters_are_frozen_together() -> None:
    graph = traced("tied frozen")
    assert [(p.tied, p.trainable) for p in (*graph.embed.params, *graph.head.params)] == [
        (False, False),
        (True, False),
    ]


def test_the_flag_survives_the_cache() -> None:
    graph = traced("adapters")
    assert decode_graph(encode_graph(graph)) == graph
    assert graph.num_trainable < graph.num_params


@pytest.mark.slow
def test_fingerprints_tell_what_is_trained() -> None:
    names = ("norms", "biases", "head", "tied frozen")
    assert len({traced(name).fingerprint for name in names}) == len(names)


@pytest.mark.slow
def test_tensor_parallel_rules_do_not_depend_on_what_is_trained() -> None:
    every = trace_model(plain([""])("meta"), SETTING)
    for name in ("head", "upper half", "norms", "embedding frozen"):
        graph = traced(name)
        assert graph.tp_limits == every.tp_limits
        assert graph.notes == every.notes == ()


class Gated(Layer):
    """Its last matrix reads the residual stream, which no rank has a part of."""

    def __init__(self) -> None:
        super().__init__(0)
        self.gate, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + self.out(self.gate(x) * x)


@pytest.mark.slow
def test_a_residual_stream_without_gradient_is_no_table() -> None:
    def limits(words: Iterable[str]) -> object:
        with torch.device("meta"):
            model = Model()
            model.layers = nn.ModuleList(Gated() for _ in range(NUM_LAYERS))
        graph = trace_model(train_only(model, words), SETTING)
        return graph.tp_limits, graph.notes

    every = limits([""])
    assert every == ((TpLimit(label="MLP width", size=4 * WIDTH),), ())
    assert limits(["head"]) == every


def test_gradients_cross_ranks_only_where_they_flow() -> None:
    graph = traced("upper half")
    crossings = [
        (b.num_entries, b.num_exits, b.num_entries_back, b.num_exits_back)
        for b in (graph.embed, *graph.blocks, graph.head)
    ]
    layers = [(1, 1, 0, 0), (1, 1, 1, 1), (1, 1, 1, 1)]  # behind the trained norm there is one
    assert crossings == [(0, 1, 0, 0), *layers, (1, 0, 1, 0)]


class Skips(Model):
    """The last layer takes what the first one gave, too."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first = x = self.layers[0](self.embed(ids))
        for layer in self.layers[1:-1]:
            x = layer(x)
        return self.head(self.layers[-1](x + first))


@pytest.mark.slow
def test_skips_around_frozen_layers_are_seen() -> None:
    with torch.device("meta"):
        model = train_only(Skips(), ["layers.3", "head"])
    assert not trace_model(model, SETTING).sequential


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = plain([])("meta")
    count = sum(p.numel() for p in model.parameters())
    with pytest.raises(TraceError) as error:
        trace_model(model, SETTING)
    assert str(error.value) == (
        f"Model has nothing to train: all of its {count:,} parameters have requires_grad=False. "
        "Set requires_grad=True on those that should change."
    )


def test_a_loss_that_depends_on_nothing_trained_is_refused() -> None:
    model = plain([])("meta")
    model.unused = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(TraceError) as error:
        trace_model(model, SETTING)
    assert str(error.value) == (
        "the loss of Model has no gradient: it depends on no parameter with requires_grad=True. "
        "Train a parameter that the loss depends on."
    )
