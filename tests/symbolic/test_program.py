"""Programs: what is printed computes what the expressions say, and survives being stored."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sympy

from mist.model.graph import B, S, T
from mist.plans.workload import HeadMode, Optimizer, Precision
from mist.rules.combinations import out_of_domain
from mist.symbolic.compile import compile_model, print_program
from mist.symbolic.job import make_job
from mist.symbolic.program import bind, select
from mist.symbolic.program_cache import PROGRAMS, load_programs, programs_key, store_programs
from tests.toys import adamw_setting, toy_graph, toy_platform, toy_workload

EXPRESSIONS = {
    "polynomial": 3 * B * S**2 + B * S / T + sympy.Rational(1, 3),
    "steps": sympy.Piecewise((B + S, sympy.Eq(B, 1)), (B * S, True)),
    "ceiling": sympy.ceiling(S / 32) * B,
    "largest": sympy.Max(B * S, S**2 / T, 7),
    "constant": sympy.Integer(42),
}


def test_printed_programs_compute_the_expressions() -> None:
    run = bind(print_program((B, S, T), EXPRESSIONS), {})
    points = {"b": np.array([1, 2, 5]), "s": np.array([31, 64, 100]), "t": np.array([1, 2, 4])}
    got = run(points)
    for name, expr in EXPRESSIONS.items():
        want = [
            float(expr.subs({B: b, S: s, T: t})) for b, s, t in zip(*points.values(), strict=True)
        ]
        np.testing.assert_allclose(got[name], want, rtol=1e-15)


def test_the_first_condition_that_holds_chooses() -> None:
    """As numpy's `select`, whose work on a single layout takes most of the time of a program."""
    rng = np.random.default_rng(0)
    for shape in ((), (1,), (7,)):
        conditions = [rng.random(shape) < 0.4 for _ in range(3)]
        values = [rng.random(shape) for _ in conditions]
        found = select(conditions, values, np.nan)
        np.testing.assert_array_equal(found, np.select(conditions, values, np.nan))
        whole = select([*conditions[:2], True], [*values[:2], 5.0], np.nan)
        np.testing.assert_array_equal(whole, np.select([*conditions[:2], True], [*values[:2], 5.0]))


def test_columns_broadcast() -> None:
    run = bind(print_program((B, S), {"product": B * S}), {})
    got = run({"b": np.array([[1], [2]]), "s": np.array([3, 4, 5])})
    np.testing.assert_array_equal(got["product"], [[3, 4, 5], [6, 8, 10]])


def test_programs_survive_being_stored(tmp_path: Path) -> None:
    programs = compile_model(toy_graph((2, 3)), adamw_setting(toy_platform().runtime))
    store_programs(tmp_path / "new", "key", programs)
    loaded = load_programs(tmp_path / "new", "key")
    assert loaded is not None
    assert loaded.facts == programs.facts
    for name in PROGRAMS:
        was, now = getattr(programs, name), getattr(loaded, name)
        assert (now.inputs, now.outputs) == (was.inputs, was.outputs)
        # Other brackets, the same operations in the same order: equal to the last bit.
        assert ast.dump(ast.parse(now.source)) == ast.dump(ast.parse(was.source))


@pytest.mark.parametrize("text", ["", "{}", "[1, 2", '{"facts": null}'])
def test_an_entry_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "key.json").write_text(text)
    assert load_programs(tmp_path, "key") is None
    assert load_programs(tmp_path, "absent") is None


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    programs = compile_model(toy_graph(), adamw_setting(toy_platform().runtime))
    store_programs(tmp_path / "file" / "below", "key", programs)


def test_the_key_depends_on_all_that_programs_depend_on() -> None:
    keys = {
        programs_key("trace", "runtime", Precision.BF16, Optimizer.ADAMW),
        programs_key("another", "runtime", Precision.BF16, Optimizer.ADAMW),
        programs_key("trace", "another", Precision.BF16, Optimizer.ADAMW),
        programs_key("trace", "runtime", Precision.FP32, Optimizer.ADAMW),
    }
    assert len(keys) == 4


def test_relations_of_the_trace_become_rules() -> None:
    graph = toy_graph()
    (block,) = graph.blocks
    narrow = replace(block, domain=(sympy.Le(S, 1024), sympy.Ge(B, 2)))
    platform = toy_platform()
    programs = compile_model(replace(graph, blocks=(narrow,)), adamw_setting(platform.runtime))
    job = make_job(programs, platform, toy_workload(seq_len=2048))
    assert out_of_domain(job.cost.domain, 2048) == ("s <= 1024",)
    assert out_of_domain(job.cost.domain, 1024) == ()
    (rule,) = [rule for rule in job.rules if rule.name == "domain-b >= 2"]
    columns = {"tp": 1, "head": 0, "micro_batch": np.array([1, 2, 4])}
    np.testing.assert_array_equal(rule.mask(columns), [False, True, True])


def test_relations_of_a_head_hold_where_it_runs_so() -> None:
    graph, platform = toy_graph(), toy_platform()
    head = replace(graph.head, domain=(sympy.Ge(B * S, 4096), sympy.Ge(B, 2)))
    heads = {HeadMode.IN_FORWARD: head}
    programs = compile_model(graph, adamw_setting(platform.runtime), {}, heads)
    assert programs.heads == (HeadMode.NONE, HeadMode.IN_FORWARD)
    job = make_job(programs, platform, toy_workload(seq_len=1024))
    assert out_of_domain(job.cost.domain, 1024) == ()
    (rule,) = [rule for rule in job.rules if rule.name.startswith("domain-")]
    columns = {"tp": 1, "head": np.array([0, 0, 1, 2, 2]), "micro_batch": np.array([1, 4, 1, 2, 4])}
    np.testing.assert_array_equal(rule.mask(columns), [True, True, True, False, True])
    assert rule.message.startswith("the costs of toy were traced for b >= 2 and b*s >= 4096 with")
