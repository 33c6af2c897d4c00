"""One source, several traces: its model is loaded once; levels are what converted models are."""

from pathlib import Path

import pytest
from sympy import Basic

from mist.layers import convert_layer
from mist.model.graph import GATHER_COPY, GATHERS, SCATTER_COPY, B, Block, Q, S, T
from mist.plans.memory_levels import CONVERTS
from mist.plans.workload import Attention, MemoryLevel, Precision
from mist.trace import TraceSetting, load_graph, load_levels, opened, trace_model
from tests.layers.families import FAMILIES
from tests.trace.test_source import file_with

BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
# Of a rank alone; what is gathered is copied, or not.
POINTS = [
    {B: b, S: s, T: 1, Q: 1, **dict.fromkeys((GATHERS, GATHER_COPY, SCATTER_COPY), copies)}
    for b, s, copies in ((2, 96, 0), (3, 512, 1), (7, 2048, 1))
]
MODEL = """
from tests.layers.families import FAMILIES

def build_model():
    return FAMILIES["{}"]()
"""
ALONE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

    def forward(self, ids):
        return self.layers(self.embed(ids))

def build_model():
    return Model()
"""


def facts(block: Block) -> list[object]:
    """What a block computes, moves, keeps and works in, on one rank."""

    def at(expr: object) -> object:
        return expr.subs(T, 1) if isinstance(expr, Basic) else expr

    working = (
        block.transient_bytes,
        block.transient_with_grads_bytes,
        block.transient_adding_bytes,
    )
    return [
        *((op.name, op.phase, at(op.flop), at(op.traffic_bytes)) for op in block.ops),
        *((kept.op, at(kept.bytes)) for kept in (*block.saved, *block.saved_single)),
        *(max(expr.subs(point) for expr in each) for each in working for point in POINTS),
        [param.name for param in block.params],
        at(block.boundary_bytes),
    ]


def converted(family: str, level: MemoryLevel) -> tuple[Block, ...]:
    """The blocks of a model whose layers were all converted before it was traced."""
    model = FAMILIES[family]()
    path = {"gpt2": "transformer.h"}.get(family, "model.layers")
    for layer in model.get_submodule(path).children():
        convert_layer(layer, level)
    return trace_model(model, BF16).blocks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "levels"),
    [
        pytest.param("llama", (MemoryLevel.DROP_NORM,), id="llama"),
        *(pytest.param(each, CONVERTS, marks=pytest.mark.slow) for each in ("gpt2", "gemma3")),
    ],
)
def test_levels_are_what_converted_models_are(
    family: str, levels: tuple[MemoryLevel, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, words = str(file_with(tmp_path, MODEL.format(family))), list[str]()
    source = opened(path)
    plain = load_graph(source, BF16, progress=words.append)
    graphs = load_levels(source, BF16, levels, plain, progress=words.append)
    assert [word for word in words if word.startswith(("loading", "tracing"))] == [
        f"loading {path}",
        *("tracing at concrete sizes", "tracing symbolic sizes", "tracing b = 1"),
        f"tracing {' and '.join(levels)}",
    ]
    for level in levels:
        for block, expected in zip(graphs[level].blocks, converted(family, level), strict=True):
            assert facts(block) == facts(expected)
    # From the cache no model is loaded.
    again = opened(path)
    assert load_levels(again, BF16, levels, plain, progress=words.append) == graphs
    assert again.model is None


def test_a_level_that_a_model_cannot_have_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, words = opened(str(file_with(tmp_path, ALONE))), list[str]()
    plain = load_graph(source, BF16, progress=lambda message: None)
    assert load_levels(source, BF16, CONVERTS, plain, progress=words.append) == {}
    assert words == [
        f"my-model has no level {level}: level {level}: nothing in Linear was recognised: no norm, "
        "no activation with a slope, no dropout."
        for level in CONVERTS
    ]
