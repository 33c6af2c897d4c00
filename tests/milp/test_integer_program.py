"""HiGHS against exhaustive enumeration and against the dynamic program."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from mist.errors import MistError
from mist.milp import (
    Cell,
    InterStageProblem,
    InterStageSolution,
    Method,
    Shared,
    SolverLimits,
    solve,
    within_shared,
)
from mist.milp import dynamic_program as exact_module
from mist.milp.integer_program import solve_milp
from tests.milp.oracle import (
    dense_problem,
    optimum,
    random_problem,
    with_host,
    with_ties,
    with_units,
)
from tests.milp.test_dynamic_program import covers, dense

# The tolerances of HiGHS (1e-6 and 1e-7), in units of a time that is part of every step.
SOLVER = 1e-6
METHODS: list[Method] = ["milp", "dp", "both"]


@pytest.mark.parametrize("block", range(4))
def test_milp_and_both_equal_enumeration(block: int) -> None:
    num_feasible = 0
    for seed in range(1000 + 30 * block, 1000 + 30 * block + 30):
        problem = random_problem(seed, max_layers=4, max_stages=4)
        expected = optimum(problem)
        for method in ("milp", "both"):
            found = solve(problem, method=method)
            assert (found is None) == math.isinf(expected), seed
            if found is not None:
                num_feasible += 1
                assert found.step_s == pytest.approx(expected, rel=SOLVER), seed
                assert found.lower_bound_s <= expected * (1 + SOLVER), seed
                assert 0 <= found.gap <= SOLVER, seed
                assert covers(problem, found.choices), seed
    assert num_feasible >= 2 * 13  # so that the four blocks check at least 52 problems


def test_milp_and_both_equal_enumeration_on_non_uniform_meshes() -> None:
    num_feasible = 0
    for seed in range(60):
        problem = with_units(random_problem(seed, max_layers=5, max_stages=4), seed)
        expected = optimum(problem)
        for method in ("milp", "both"):
            found = solve(problem, method=method)
            assert (found is None) == math.isinf(expected), seed
            if found is not None:
                num_feasible += 1
                assert found.step_s == pytest.approx(expected, rel=SOLVER), seed
                assert 0 <= found.gap <= SOLVER, seed
                assert covers(problem, found.choices), seed
    assert num_feasible >= 2 * 25


@pytest.mark.parametrize("method", METHODS)
def test_shared_host_memory_equals_enumeration(method: Method) -> None:
    solvers = []
    for seed in range(80):
        problem = with_host(random_problem(seed, max_layers=4, max_stages=3), seed)
        problem = with_units(problem, seed) if seed % 2 else problem
        expected, found = optimum(problem), solve(problem, method=method)
        assert (found is None) == math.isinf(expected), seed
        if found is not None:
            solvers.append(found.solver)
            assert found.step_s == pytest.approx(expected, rel=SOLVER), seed
            assert 0 <= found.gap <= SOLVER, seed
            assert covers(problem, found.choices), seed
            assert within_shared(problem, found.choices), seed
    # The dynamic program answers where no limit binds, HiGHS where one does.
    assert solvers.count("milp") >= 15
    assert method == "milp" or solvers.count("dp") >= 15


@pytest.mark.parametrize("method", METHODS)
def test_ends_that_must_agree_equal_enumeration(method: Method) -> None:
    num_feasible = num_dearer = 0
    for seed in range(3000, 3060):
        problem = random_problem(seed, max_layers=4, max_stages=3)
        problem = with_units(problem, seed) if seed % 3 == 0 else problem
        problem = with_host(problem, seed) if seed % 5 == 0 else problem
        problem = with_ties(problem, seed)
        expected, found = optimum(problem), solve(problem, method=method)
        assert (found is None) == math.isinf(expected), seed
        if found is not None:
            num_feasible += 1
            assert found.step_s == pytest.approx(expected, rel=SOLVER), seed
            assert 0 <= found.gap <= SOLVER, seed
            assert covers(problem, found.choices), seed
            assert len({problem.cells[c.cell].tie for c in found.choices} - {None}) <= 1, seed
            num_dearer += optimum(_untied(problem)) < expected * (1 - 1e-3)
    assert num_feasible >= 30
    assert num_dearer >= 10  # of which the ties cost something


def _untied(problem: InterStageProblem) -> InterStageProblem:
    return replace(problem, cells=tuple(replace(cell, tie=None) for cell in problem.cells))


def test_the_optimum_without_shared_limits_bounds_the_one_with_them() -> None:
    # The limit leaves only the slow points: 2 * 4 + 4 + 4, against 2 * 2 + 2 + 2 without it.
    times, host = np.array([2.0, 4.0]), np.array([5.0, 1.0])
    cells = tuple(
        Cell(stage=i, first=None, count=1, stable_s=times, lone_s=times, host_bytes=host)
        for i in (0, 1)
    )
    problem = InterStageProblem(
        num_layers=2,
        num_stages=2,
        num_micro_batches=3,
        cells=cells,
        shared=(Shared(stages=(0, 1), limit_bytes=5.9),),
    )
    found = solve(problem, method="dp")
    assert found is not None
    assert (found.step_s, found.solver) == (16.0, "milp")
    # With 6 bytes one of them may be fast: 2 * 4 + max(2 + 4, 4) or 2 * 4 + max(4 + 2, 2).
    found = solve(replace(problem, shared=(Shared(stages=(0, 1), limit_bytes=6.0),)), method="dp")
    assert found is not None
    assert found.step_s == 14.0
    loose = solve(replace(problem, shared=()), method="dp")
    assert loose is not None
    assert (loose.step_s, loose.solver) == (8.0, "dp")


def cell(stage: int, count: int, times: list[tuple[float, float]]) -> Cell:
    stable, delta = np.array(times).T
    return Cell(stage=stage, first=None, count=count, stable_s=stable, lone_s=stable + delta)


@pytest.mark.parametrize("method", METHODS)
def test_hand_example_that_a_convex_hull_loses(method: Method) -> None:
    # G = 8; the first stage has (t, d) = (5, 0). With all three points of the last stage the
    # middle one gives 7 * 5 + 9.9 + max(0, 5.5 - 5) = 45.4; the hull drops it, and 48.0 is left.
    last = [(3.0, 10.0), (4.9, 5.5), (7.0, 0.0)]
    problem = InterStageProblem(
        num_layers=2,
        num_stages=2,
        num_micro_batches=8,
        cells=(cell(0, 1, [(5.0, 0.0)]), cell(1, 1, last)),
    )
    found = solve(problem, method=method)
    assert found is not None
    assert found.step_s == pytest.approx(45.4, rel=1e-12)
    assert [choice.point for choice in found.choices] == [0, 1]
    hull = replace(problem, cells=(problem.cells[0], cell(1, 1, [last[0], last[2]])))
    found = solve(hull, method=method)
    assert found is not None
    assert found.step_s == pytest.approx(48.0, rel=1e-12)


INFEASIBLE = {
    "no cells": (),
    "a stage without cells": (cell(0, 1, [(1.0, 0.0)]),),
    "a stage without points": (
        cell(0, 1, [(1.0, 0.0)]),
        Cell(stage=1, first=None, count=2, stable_s=np.empty(0), lone_s=np.empty(0)),
    ),
    "too few layers": (cell(0, 1, [(1.0, 0.0)]), cell(1, 1, [(1.0, 0.0)])),
    "too many layers": (cell(0, 2, [(1.0, 0.0)]), cell(1, 2, [(1.0, 0.0)])),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", INFEASIBLE)
def test_infeasible_is_none(name: str, method: Method) -> None:
    problem = InterStageProblem(
        num_layers=3, num_stages=2, num_micro_batches=4, cells=INFEASIBLE[name]
    )
    assert solve(problem, method=method) is None


@pytest.mark.parametrize("method", METHODS)
def test_cells_that_do_not_meet_are_infeasible(method: Method) -> None:
    one = np.ones(1)
    cells = tuple(
        Cell(stage=stage, first=first, count=count, stable_s=one, lone_s=one)
        for stage, first, count in [(0, 0, 1), (1, 2, 1), (1, 0, 3), (0, 1, 2)]
    )
    problem = InterStageProblem(num_layers=3, num_stages=2, num_micro_batches=4, cells=cells)
    assert solve(problem, method=method) is None


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_faster_than_the_upper_bound(method: Method) -> None:
    for seed in range(40):
        problem = random_problem(seed, max_layers=4, max_stages=3)
        expected = optimum(problem)
        if math.isinf(expected):
            continue
        above = solve(problem, upper_bound_s=expected * 1.01, method=method)
        assert above is not None, seed
        assert above.step_s == pytest.approx(expected, rel=SOLVER), seed
        assert solve(problem, upper_bound_s=above.step_s, method=method) is None, seed
        assert solve(problem, upper_bound_s=expected * 0.99, method=method) is None, seed


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_unit_of_time_does_not_matter(scale: float) -> None:
    problem = random_problem(7, max_layers=4, max_stages=3)
    scaled = replace(
        problem,
        cells=tuple(
            replace(
                c,
                stable_s=c.stable_s * scale,
                lone_s=c.lone_s * scale,
                spare_s=c.spare_s * scale,
            )
            for c in problem.cells
        ),
    )
    found = solve(scaled, method="milp")
    assert found is not None
    assert found.step_s == pytest.approx(optimum(problem) * scale, rel=SOLVER)


def test_both_confirms_a_problem_too_large_to_enumerate() -> None:
    problem = dense(64)
    exact, both = solve(problem, method="dp"), solve(problem, method="both")
    assert exact is not None
    assert both is not None
    assert (both.step_s, both.choices) == (exact.step_s, exact.choices)
    assert both.gap <= SOLVER


@pytest.mark.parametrize("method", METHODS)
def test_same_problem_same_solution(method: Method) -> None:
    problem = random_problem(3, max_layers=4, max_stages=4)
    assert solve(problem, method=method) == solve(problem, method=method)


@pytest.mark.slow
def test_a_node_limit_leaves_a_gap_that_is_reported() -> None:
    problem = dense_problem(1, num_layers=20, num_stages=5, num_micro_batches=8, num_points=10)
    best = solve(problem, method="dp")
    found = solve_milp(problem, limits=SolverLimits(max_nodes=1))
    assert best is not None
    assert found is not None
    assert found.lower_bound_s <= best.step_s <= found.step_s
    assert found.gap > 0.01


def test_a_time_limit_leaves_a_gap_that_is_reported() -> None:
    # PuLP calls this "Optimal". The dynamic program knows better: HiGHS needs minutes for it.
    problem = dense_problem(1, num_layers=48, num_stages=8, num_micro_batches=8, num_points=30)
    best = solve(problem, method="dp")
    found = solve(problem, method="milp", limits=SolverLimits(time_s=1.0))
    assert best is not None
    assert found is not None
    assert found.lower_bound_s <= best.step_s * (1 + SOLVER)
    assert best.step_s <= found.step_s * (1 + SOLVER)
    assert found.gap == pytest.approx(1 - found.lower_bound_s / found.step_s)
    assert found.gap > SOLVER


def test_highs_starts_from_the_solution_that_it_confirms() -> None:
    problem = dense(8)
    best = solve(problem, method="dp")
    assert best is not None
    # Without a node HiGHS finds nothing itself (next test): what it has, it was given.
    found = solve_milp(problem, confirm=best, limits=SolverLimits(max_nodes=0))
    assert found is not None
    assert found.choices == best.choices


def test_no_assignment_within_the_node_limit_is_an_error() -> None:
    with pytest.raises(MistError) as error:
        solve_milp(dense(64), limits=SolverLimits(max_nodes=0))
    assert str(error.value) == (
        "HiGHS stopped with 'Solution limit reached' and no assignment (node limit 0, time limit "
        "None s). Try a higher limit, or method 'dp' where no shared memory limit binds."
    )


def test_another_thread_count_before_does_not_stop_highs() -> None:
    # HiGHS keeps one scheduler per process; a later solve with other `threads` returned unsolved.
    code = """
import highspy
from mist.milp import solve
from tests.milp.test_dynamic_program import dense
other = highspy.Highs()
other.setOptionValue("output_flag", False)
other.setOptionValue("threads", 2)
x = other.addVariable(0, 1, -1, highspy.HighsVarType.kInteger)
other.run()
milp, dp = (solve(dense(64), method=method) for method in ("milp", "dp"))
print(abs(milp.step_s / dp.step_s - 1) < 1e-6)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "True\n", run.stderr


def test_a_disagreement_of_the_solvers_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dense(4)
    best = exact_module.solve_exact(problem)
    assert best is not None
    wrong: InterStageSolution = replace(best, step_s=best.step_s * 1.01)
    monkeypatch.setattr("mist.milp.solve_exact", lambda *_, **__: wrong)
    with pytest.raises(AssertionError, match=r"dynamic program .* s, HiGHS .* s per step"):
        solve(problem, method="both")


def test_importing_milp_loads_no_solver() -> None:
    code = "import sys, mist.milp; print({'pulp', 'highspy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
