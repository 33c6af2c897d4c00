"""A cache entry is data: it runs no code, is read from one's own folder only, and whole or not."""

import ast
import json
import os
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.files import _say_once, read_entry, write_entry
from mist.symbolic.compile import compile_model
from mist.symbolic.program import FUNCTIONS, LAWS, SCOPE, _laws, bind
from mist.symbolic.program_cache import load_programs, store_programs
from mist.symbolic.program_codec import CALLED, CONSTANTS, decode_program
from mist.trace import codec
from tests.security.canary import expression, statement, went_off
from tests.symbolic.test_runtime_fields import TORCH, laws
from tests.toys import adamw_setting, toy_graph, toy_platform

PROGRAM: dict[str, Any] = {
    "inputs": ["b", "s"],
    "outputs": ["area"],
    "steps": [["x0", ["infix", "b", "*", "s"]]],
    "results": [["maximum", "x0", ["neg", 1.5]]],
}


def test_a_program_of_data_computes() -> None:
    run = bind(decode_program(PROGRAM), {})
    assert run({"b": [2.0, -1.0], "s": [3.0, 4.0]})["area"].tolist() == [6.0, -1.5]


@pytest.mark.parametrize(
    "word",
    [
        "__import__('os').system('true')",
        "x0); import os; os.system('true'",
        "b.real",
        "__builtins__",
        "lambda: 0",
        "True if b else s",
    ],
)
@pytest.mark.parametrize("where", ["inputs", "assigned", "name", "function", "between"])
def test_a_word_of_no_table_is_refused(word: str, where: str) -> None:
    programs: dict[str, dict[str, object]] = {
        "inputs": {"inputs": ["b", word], "steps": [], "results": ["b"]},
        "assigned": {"steps": [[word, 1]], "results": ["b"]},
        "name": {"results": [word]},
        "function": {"results": [[word, "b"]]},
        "between": {"results": [["infix", "b", word, "s"]]},
    }
    with pytest.raises(ValueError, match="no "):
        decode_program({**PROGRAM, **programs[where]})


@pytest.mark.parametrize("word", ["os", "print", "load", "save", "fromfile", "vars"])
@pytest.mark.parametrize("where", ["name", "function"])
def test_what_python_and_numpy_have_beside_is_no_word(word: str, where: str) -> None:
    result: object = word if where == "name" else [word, "b"]
    with pytest.raises(ValueError, match="no "):
        decode_program({**PROGRAM, "results": [result]})


@pytest.mark.parametrize("word", ["maximum", "nan", "reduce", "gemm_s"])
def test_no_name_of_a_program_hides_a_function(word: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        decode_program({**PROGRAM, "steps": [[word, "b"]], "results": ["b"]})


WORDS = [*sorted(CALLED), *sorted(CONSTANTS), "b", "s", "x0", "y", "infix", "neg", "list", "tuple"]
EVIL = ["__import__", "os", "eval", "exec", "open", "b.real", "+", "*", "**", "", "(", "#", "\n"]
values = st.recursive(
    st.sampled_from([*WORDS, *EVIL]) | st.integers(-3, 9) | st.floats() | st.none() | st.text(),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)
drawn = st.fixed_dictionaries(
    {
        "inputs": st.lists(st.sampled_from(["b", "s", *EVIL]), max_size=3),
        "outputs": st.lists(st.text(max_size=3), max_size=3),
        "steps": st.lists(st.tuples(st.sampled_from(["x0", "y", *EVIL]), values).map(list)),
        "results": st.lists(values, max_size=3),
    }
)


@given(drawn)
def test_whatever_is_decoded_calls_functions_of_the_tables_only(data: dict[str, object]) -> None:
    try:
        source = decode_program(data).source
    except ValueError:
        return
    (function,) = ast.parse(source).body
    for node in ast.walk(function):
        assert not isinstance(node, ast.Import | ast.Lambda | ast.Subscript | ast.comprehension)
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) in CALLED
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) in CALLED


def test_what_programs_can_reach_is_the_tables() -> None:
    own = _laws(laws(TORCH))
    assert set(own) == set(LAWS)
    for name, counts in LAWS.items():
        taken = signature(own[name]).parameters.values()
        known = [each for each in taken if each.name != "traffic"]  # given already
        needed = sum(each.default is each.empty for each in known)
        assert counts == tuple(range(needed, len(known) + 1))
    assert set(SCOPE) == {"__builtins__", "nan", "inf", "reduce", *FUNCTIONS}
    assert SCOPE["__builtins__"] == {}


def entry_of(tmp_path: Path) -> Path:
    programs = compile_model(toy_graph(), adamw_setting(toy_platform().runtime))
    store_programs(tmp_path / "cache", "key", programs)
    return tmp_path / "cache" / "key.json"


def test_an_entry_of_programs_runs_no_code(tmp_path: Path) -> None:
    """With a digest of its own that is right, as whoever writes the entry would make it."""
    path, canary = entry_of(tmp_path), tmp_path / "canary"
    entry = json.loads(read_entry(path) or "")
    name = entry["costs"]["inputs"][0]
    for harm in (
        {"source": statement(canary)},
        {"steps": [[statement(canary), 1]]},
        {"steps": [["x", expression(canary)]]},
        {"steps": [["x", [expression(canary)]]]},
        {"inputs": [f"{name}={expression(canary)}", *entry["costs"]["inputs"][1:]]},
        {"results": [expression(canary)] * len(entry["costs"]["results"])},
    ):
        write_entry(path, json.dumps({**entry, "costs": {**entry["costs"], **harm}}))
        programs = load_programs(path.parent, "key")
        if programs is not None:  # "source" is no part of an entry: it is not looked at
            assert list(harm) == ["source"]
            bind(programs.costs, _laws(laws(TORCH)))
        assert not went_off(canary)


@pytest.mark.parametrize("value", [["Rational", "1; import os"], ["Float", "__import__('os')"]])
def test_a_trace_has_numbers_for_numbers(value: list[object]) -> None:
    with pytest.raises(ValueError, match="not a number"):
        codec.decode_expr(value)


def test_an_entry_is_whole_or_none(tmp_path: Path) -> None:
    """Every cut and every changed byte of an entry is seen."""
    path = tmp_path / "entry"
    write_entry(path, '{"a": [1, 2]}')
    text = path.read_text()
    assert read_entry(path) == '{"a": [1, 2]}'
    for i in range(len(text)):
        for damaged in (text[:i], text[:i] + chr(ord(text[i]) ^ 1) + text[i + 1 :]):
            path.write_text(damaged)
            assert read_entry(path) is None


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777])
def test_a_folder_of_ones_own_is_read(tmp_path: Path, mode: int) -> None:
    write_entry(tmp_path / "cache" / "entry", "{}")
    (tmp_path / "cache").chmod(mode)
    assert read_entry(tmp_path / "cache" / "entry") == "{}"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o720])
def test_a_folder_that_others_write_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: int
) -> None:
    _say_once.cache_clear()
    entry = tmp_path / "cache" / "entry"
    write_entry(entry, "{}")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "cache").chmod(mode)
    assert read_entry(entry) is None
    write_entry(entry, "[]")
    assert read_entry(entry) is None
    assert capsys.readouterr().err == (
        f"mist: the cache {tmp_path / 'cache'} is not used: others may write there. Set "
        "XDG_CACHE_HOME to a folder of your own.\n"
    )
    (tmp_path / "cache").chmod(0o700)
    assert read_entry(entry) == "{}"  # what others might have read was not changed either


def test_a_folder_of_another_user_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _say_once.cache_clear()
    entry = tmp_path / "cache" / "entry"
    write_entry(entry, "{}")
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert read_entry(entry) is None
    assert "it is another user's" in capsys.readouterr().err
