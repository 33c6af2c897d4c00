"""The cache gives back exactly what was stored, and nothing that may be out of date."""

import json
import re
import time
from pathlib import Path

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from sympy import Basic

from mist.files import read_entry, write_entry
from mist.model.graph import B, S, T
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, codec, load_graph, load_listing
from mist.trace import trace_cache as cache
from tests.fast_cases import first_fast
from tests.toys import toy_graph
from tests.trace.test_source import file_with

FP32 = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH)

MODEL = """
import torch
from torch import nn
from mist_test_width import WIDTH

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, ids):
        return self.layers(self.embed(ids))

def build_model():
    return Model()
"""


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file_with(tmp_path, "WIDTH = 16\n", "mist_test_width.py")
    return file_with(tmp_path, MODEL)


def load(path: Path) -> tuple[int, bool]:
    """Parameters of the model, and whether it had to be traced."""
    told: list[str] = []
    graph = load_graph(str(path), FP32, progress=told.append)
    return graph.num_params, told != ["my-model: trace from the cache"]


def test_second_load_is_from_the_cache(model_file: Path) -> None:
    assert load(model_file) == (64 * 16 + 2 * 17 * 16, True)
    assert load(model_file) == (64 * 16 + 2 * 17 * 16, False)


def test_changed_source_is_traced_again(model_file: Path) -> None:
    load(model_file)
    model_file.write_text(MODEL.replace("Embedding(64", "Embedding(32"))
    assert load(model_file) == (32 * 16 + 2 * 17 * 16, True)


def test_changed_local_module_is_traced_again(model_file: Path) -> None:
    load(model_file)
    file_with(model_file.parent, "WIDTH = 32\n", "mist_test_width.py")
    assert load(model_file) == (64 * 32 + 2 * 33 * 32, True)
    assert load(model_file) == (64 * 32 + 2 * 33 * 32, False)


@pytest.mark.parametrize(
    "text",
    first_fast(['{"modules": {}, "exprs": [["eval", "b"]]}', "", "{}", "[1]"]),
)
def test_corrupt_entry_is_rewritten(model_file: Path, text: str) -> None:
    load(model_file)
    (entry,) = cache.cache_folder().glob("*.json")
    entry.write_text(text)
    assert load(model_file)[1]
    assert not load(model_file)[1]


@pytest.mark.slow
def test_entry_with_a_wrong_field_is_rewritten(model_file: Path) -> None:
    load(model_file)
    (entry,) = cache.cache_folder().glob("*.json")
    fields = json.loads(read_entry(entry) or "")
    fields["graph"][1] = "many"
    write_entry(entry, json.dumps(fields))
    assert load(model_file)[1]


@pytest.mark.slow
def test_an_entry_that_was_changed_is_rewritten(model_file: Path) -> None:
    """A byte of a figure, which would read as another figure: the digest is another one."""
    load(model_file)
    (entry,) = cache.cache_folder().glob("*.json")
    text = entry.read_text()
    entry.write_text(text.replace('"Mul",', '"Add",', 1))
    assert entry.read_text() != text
    assert load(model_file)[1]
    assert entry.read_text() == text


@pytest.mark.slow
def test_a_listing_that_was_changed_is_rewritten(model_file: Path) -> None:
    def listing() -> str:
        return load_listing(str(model_file), FP32, progress=lambda message: None)

    whole = listing()
    (entry,) = cache.cache_folder().glob("*.listing")
    entry.write_text(entry.read_text().replace("aten.", "other."))
    assert listing() == whole


def test_listing_is_beside_the_entry(model_file: Path) -> None:
    assert (
        "embedding_default = aten.embedding.default(input_1, input_2) -> float32[b, s, 16] "
        "flop=0 bytes=136*b*s phase=forward module=embed"
    ) in load_listing(str(model_file), FP32, progress=lambda message: None).splitlines()


def test_no_other_files_are_left(model_file: Path) -> None:
    load(model_file)
    assert sorted(path.suffix for path in cache.cache_folder().iterdir()) == [".json", ".listing"]


def test_cached_graph_is_equal_and_quick(model_file: Path) -> None:
    def graph() -> object:
        return load_graph(str(model_file), FP32, progress=lambda message: None)

    traced = graph()
    start = time.process_time()
    assert graph() == traced
    assert time.process_time() - start < 0.2


sizes = st.recursive(
    st.sampled_from([B, S, T, *map(sympy.Integer, (-3, 1, 2, 4096)), sympy.Rational(1, 3)]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, inner).map(lambda pair: sympy.Max(*pair)),
        st.tuples(inner, inner).map(lambda pair: sympy.floor(pair[0] / (1 + pair[1] ** 2))),
        inner.map(lambda expr: sympy.ceiling(expr / 3)),
        inner.map(lambda expr: sympy.Mod(expr, 16)),
    ),
    max_leaves=8,
)


@given(sizes)
def test_expression_survives_the_round_trip(expr: Basic) -> None:
    text = json.dumps(codec.encode_expr(expr))
    assert codec.decode_expr(json.loads(text)) == expr


def test_relation_survives_the_round_trip() -> None:
    relation = sympy.Le(S, 512)
    assert codec.decode_expr(codec.encode_expr(relation)) == relation


@pytest.mark.parametrize("value", [["os.system", 1], "x", None, [], 1.5, [["Add"]]])
def test_anything_else_is_no_expression(value: object) -> None:
    with pytest.raises(ValueError, match="not an expression"):
        codec.decode_expr(value)


def test_an_operation_with_the_sizes_of_another_is_no_graph() -> None:
    entry = json.loads(json.dumps(codec.encode_graph(toy_graph())))
    assert codec.decode_graph(entry) == toy_graph()
    text = json.dumps(entry)
    places = [match.end() for match in re.finditer(r'"gemm", "forward", "[^"]*", \[', text)]
    assert places
    assert codec.decode_graph(json.loads(f"{text[: places[0]]}0, {text[places[0] :]}")) is None
