"""Entries of the cache whose form and digest are right, and what they say is nonsense.

Each is made again, as one that is damaged: the answer is the same as without a cache.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mist.files import read_entry, write_entry
from mist.model.summary import MOST_LAYERS, LayerRun, Lengths, ModelFacts, TpLimit
from mist.plans.workload import Attention, Optimizer, Precision
from mist.symbolic.load_programs import model_programs
from mist.symbolic.program import ModelPrograms
from mist.symbolic.program_cache import load_programs
from mist.trace import TraceSetting, codec, trace_cache
from mist.trace.trace_cache import cache_folder
from tests.fast_cases import first_fast
from tests.small_models import TINY
from tests.toys import toy_graph, toy_platform

SETTING = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH)


def entry_of_graph() -> Any:  # noqa: ANN401 - JSON
    return json.loads(json.dumps(codec.encode_graph(toy_graph())))


def number_of(name: str) -> int:
    """Where a field of the graph is, in an entry."""
    return list(toy_graph().__dataclass_fields__).index(name)


def field_of_block(entry: Any, name: str) -> tuple[list[Any], int]:  # noqa: ANN401 - JSON
    block = entry["graph"][number_of("blocks")][0]
    return block, list(toy_graph().blocks[0].__dataclass_fields__).index(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_params", -1),
        ("num_params", True),
        ("num_trainable", 10**15),
        ("layers", []),
        ("layers", [[0, 0]]),
        ("layers", [[1, 4]]),
        ("layers", [[0, 2**62]]),
        ("blocks", []),
        ("max_seq_len", 0),
        ("tp_limits", [["heads", 0]]),
        ("lengths", [0, None, 1]),
        ("lengths", [1, None, 0]),
        ("lengths", [1, 0, 1]),
    ],
)
def test_counts_that_no_model_has_are_no_graph(name: str, value: object) -> None:
    entry = entry_of_graph()
    assert codec.decode_graph(entry) == toy_graph()
    entry["graph"][number_of(name)] = value
    assert codec.decode_graph(entry) is None


@pytest.mark.parametrize(
    ("name", "expr"),
    [
        ("boundary_bytes", "q"),
        ("boundary_bytes", ["Mul", 2, "gathers"]),
        ("boundary_bytes", ["LessThan", "b", "s"]),
        ("boundary_bytes", ["Pow", 0, -1]),
        ("boundary_bytes", ["log", -1]),
        ("boundary_bytes", ["Rational", 1, 0]),
        ("boundary_bytes", ["Float", "1e9999"]),
        ("boundary_bytes", ["Float", "1.5", 10**6]),
        ("boundary_bytes", ["Pow", 9, ["Pow", 9, 9]]),
        ("boundary_bytes", ["Pow", ["Pow", ["Pow", 9, 64], 64], 64]),
        ("boundary_bytes", ["Mod", "s", 0]),
        ("transient_bytes", "x"),
        ("domain", "s"),
    ],
)
def test_sizes_that_are_none_are_no_graph(name: str, expr: object) -> None:
    entry = entry_of_graph()
    block, i = field_of_block(entry, name)
    entry["exprs"].append("b")
    number = len(entry["exprs"]) - 1
    block[i] = [number] if name != "boundary_bytes" else number
    if name != "domain":
        assert codec.decode_graph(entry) is not None
    entry["exprs"][number] = expr
    assert codec.decode_graph(entry) is None


@pytest.mark.parametrize("name", ["num_entries", "buffer_bytes", "num_recomputed_ops"])
def test_counts_of_a_block_are_not_negative(name: str) -> None:
    entry = entry_of_graph()
    block, i = field_of_block(entry, name)
    block[i] = -1
    assert codec.decode_graph(entry) is None


FACTS = toy_graph().facts


@pytest.mark.parametrize(
    "change",
    [
        {"num_params": -5},
        {"num_trainable": FACTS.num_params + 1},
        {"layers": ()},
        {"layers": (LayerRun(block=0, count=-1),)},
        {"layers": (LayerRun(block=0, count=MOST_LAYERS + 1),)},
        {"layers": (LayerRun(block=2, count=1),)},
        {"max_seq_len": -1},
        {"tp_limits": (TpLimit(label="heads", size=0),)},
    ],
)
def test_facts_that_no_model_has_do_not_construct(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(FACTS, **change)
    assert isinstance(FACTS, ModelFacts)


@pytest.mark.parametrize("change", [{"first": 0}, {"multiple": 0}, {"last": -1}])
def test_lengths_that_there_are_not_do_not_construct(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no lengths"):
        replace(Lengths(), **change)


def test_an_entry_of_another_name_is_none(tmp_path: Path) -> None:
    """Another model's, copied: its digest is right, but it is not this entry."""
    write_entry(tmp_path / "cache" / "one.json", "[1]")
    shutil.copy(tmp_path / "cache" / "one.json", tmp_path / "cache" / "two.json")
    assert read_entry(tmp_path / "cache" / "one.json") == "[1]"
    assert read_entry(tmp_path / "cache" / "two.json") is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its cache, as it is after a first run."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        programs_of(folder, [])
    return folder


@pytest.fixture
def cached(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same for one test, which may spoil it."""
    shutil.copytree(tiny / "cache", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny


def programs_of(folder: Path, said: list[str]) -> ModelPrograms:
    runtime = toy_platform().runtime
    return model_programs(
        str(folder / "tiny.py"), SETTING, runtime, "hash", said.append, optimizer=Optimizer.ADAMW
    )


def traces() -> list[Path]:
    """Entries of traces, those of programs aside."""
    folder = cache_folder()
    return [folder / f"{path.stem}.json" for path in folder.glob("*.listing")]


def contents() -> dict[str, str]:
    """All entries by name."""
    return {path.name: path.read_text() for path in cache_folder().iterdir()}


def spoil_trace(change: Callable[[Any], None]) -> None:
    """Change the trace, and leave no programs, which would be found first."""
    (trace,) = traces()
    entry = json.loads(read_entry(trace) or "")
    change(entry)
    for path in cache_folder().glob("*.json"):
        path.unlink()
    write_entry(trace, json.dumps(entry))


def all_sizes(expr: object) -> Callable[[Any], None]:
    def change(entry: Any) -> None:  # noqa: ANN401 - JSON
        entry["exprs"] = [expr] * len(entry["exprs"])

    return change


def a_device_for_a_module(entry: Any) -> None:  # noqa: ANN401 - JSON
    entry["modules"] = {"/dev/zero": "no digest"}


@pytest.mark.parametrize(
    "change",
    first_fast([all_sizes(["Mul", -1, "b"]), a_device_for_a_module], 0),
)
def test_a_false_trace_is_traced_again(cached: Path, change: Callable[[Any], None]) -> None:
    said: list[str] = []
    programs_of(cached, said)
    assert said == ["tiny: trace from the cache"]
    whole = contents()
    spoil_trace(change)
    assert contents() != whole
    said.clear()
    programs_of(cached, said)
    assert said[-1] != "tiny: trace from the cache"
    assert contents() == whole


def test_false_programs_are_compiled_again(cached: Path) -> None:
    whole = contents()
    (programs,) = {*cache_folder().glob("*.json")} - {*traces()}
    entry = json.loads(read_entry(programs) or "")
    entry["stage"]["results"] = [["neg", 1]] * len(entry["stage"]["results"])
    write_entry(programs, json.dumps(entry))
    assert load_programs(programs.parent, programs.stem) is None
    programs_of(cached, [])
    assert contents() == whole


@pytest.mark.parametrize("text", ["[]", "1", "[" * 100_000, '{"a": 1}', ""])
def test_a_listing_that_is_no_text_is_none(cached: Path, text: str) -> None:
    (trace,) = traces()
    assert trace_cache.load_listing(trace.stem) is not None
    write_entry(trace.with_suffix(".listing"), text)
    assert trace_cache.load_listing(trace.stem) is None
