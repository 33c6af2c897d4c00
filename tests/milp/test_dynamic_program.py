"""The dynamic program against exhaustive enumeration."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mist.milp import Cell, InterStageProblem, chosen_step, solve
from tests.fast_cases import first_fast
from tests.milp.oracle import (
    dense_problem,
    optimum,
    optimum_of_many,
    random_problem,
    with_units,
)

# Sums of at most 5 terms in another order: rounding is 1e-15; 1e-9 is what plans are compared to.
EXACT = 1e-9


def covers(problem: InterStageProblem, choices: tuple) -> bool:
    """The chosen cells are of their stages and follow each other through all layers and units."""
    begin = unit = 0
    for stage, choice in enumerate(choices):
        cell = problem.cells[choice.cell]
        if choice.stage != stage or cell.stage != stage or cell.first not in (None, begin):
            return False
        if cell.offsets is not None and unit not in cell.offsets:
            return False
        begin, unit = begin + cell.count, unit + cell.units
    whole = problem.num_units in (None, unit) and begin == problem.num_layers
    return len(choices) == problem.num_stages and whole


@pytest.mark.parametrize("block", first_fast(range(12), 3))
def test_equals_enumeration_on_random_problems(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        problem = random_problem(seed, max_layers=6, max_stages=4)
        expected, found = optimum(problem), solve(problem, method="dp")
        assert (found is None) == math.isinf(expected), seed
        if found is not None:
            assert found.step_s == pytest.approx(expected, rel=EXACT), seed
            assert found.step_s == chosen_step(problem, found.choices), seed
            assert found.gap == 0.0
            assert covers(problem, found.choices), seed


@pytest.mark.parametrize("block", first_fast(range(4)))
def test_equals_enumeration_on_non_uniform_meshes(block: int) -> None:
    num_feasible = 0
    for seed in range(100 * block, 100 * block + 100):
        problem = with_units(random_problem(seed, max_layers=7, max_stages=4), seed)
        expected, found = optimum(problem), solve(problem, method="dp")
        assert (found is None) == math.isinf(expected), seed
        if found is not None:
            num_feasible += 1
            assert found.step_s == pytest.approx(expected, rel=EXACT), seed
            assert found.step_s == chosen_step(problem, found.choices), seed
            assert covers(problem, found.choices), seed
    assert num_feasible >= 50  # 4 x 50 on top of the 900 or more of the test above


def test_equals_enumeration_on_dense_non_uniform_meshes() -> None:
    # 3 stages of 1 to 4 layers on 1, 2 or 4 of 8 units: 9,000 assignments of 6 points or more.
    for seed in range(5):
        problem = dense_problem(
            seed, num_layers=8, num_stages=3, num_micro_batches=(1, 2, 4, 8, 64)[seed], num_points=6
        )
        problem = replace(with_units(problem, 3 * seed), num_units=8)
        found = solve(problem, method="dp")
        assert found is not None
        assert found.step_s == pytest.approx(optimum_of_many(problem), rel=EXACT), seed


def test_units_where_a_stage_may_begin_by_hand() -> None:
    # 4 units, nodes of 2: the fast cells of 2 units begin at a node, so 1 + 2 + 1 must not use one.
    one = np.array([1.0])
    node = {"units": 2, "stable_s": one, "lone_s": one, "offsets": (0, 2)}
    across = {"units": 2, "stable_s": 3 * one, "lone_s": 3 * one, "offsets": (1,)}
    single = {"units": 1, "stable_s": 2 * one, "lone_s": 2 * one}
    cells = tuple(
        Cell(stage=stage, first=None, count=1, **kind)
        for stage in range(3)
        for kind in (node, across, single)
    )
    problem = InterStageProblem(
        num_layers=3, num_stages=3, num_micro_batches=1, num_units=4, cells=cells
    )
    found = solve(problem, method="dp")
    assert found is not None
    assert found.step_s == 1 + 2 + 2
    middle = replace(problem, cells=(cells[2], *cells[3:6], cells[8]))
    found = solve(middle, method="dp")
    assert found is not None
    assert found.step_s == 2 + 3 + 2


@pytest.mark.slow
def test_random_problems_hold_what_they_should() -> None:
    # The test above would prove little if most of them were infeasible, or none had d < 0.
    problems = [random_problem(seed, max_layers=6, max_stages=4) for seed in range(400)]
    feasible = [p for p in problems if math.isfinite(optimum(p))]
    assert len(feasible) >= 300
    assert {p.num_micro_batches for p in feasible} == {1, 2, 4, 16, 64}
    assert {p.num_stages for p in feasible} == {1, 2, 3, 4}
    explicit = [p for p in feasible if p.cells[0].first is not None]
    assert 100 <= len(explicit) <= len(feasible) - 100
    assert {p.num_chunks for p in feasible} == {1, 2, 3}
    assert 100 <= sum(any(c.spare_s > 0 for c in p.cells) for p in feasible)
    assert any(np.any(c.lone_s < c.stable_s) for p in feasible for c in p.cells)
    assert any(c.first is None and c.stable_s.size == 0 for p in feasible for c in p.cells)


def test_an_upper_bound_keeps_the_optimum_or_leaves_nothing() -> None:
    for seed in range(150):
        problem = random_problem(seed, max_layers=5, max_stages=4)
        best = solve(problem, method="dp")
        if best is None:
            continue
        above = solve(problem, upper_bound_s=best.step_s * 1.001, method="dp")
        assert above is not None
        assert above.step_s == pytest.approx(best.step_s, rel=EXACT)
        assert solve(problem, upper_bound_s=best.step_s, method="dp") is None


def test_negative_delta_of_the_first_stage_is_part_of_the_bound() -> None:
    # A bound without d_0 = -9 would put every plan at (G-1)*theta + 10 or more and stop at 10 + 10.
    first = Cell(
        stage=0, first=None, count=1, stable_s=np.array([9.0, 10.0]), lone_s=np.array([9.5, 1.0])
    )
    last = Cell(stage=1, first=None, count=1, stable_s=np.array([0.1]), lone_s=np.array([0.1]))
    problem = InterStageProblem(
        num_layers=2, num_stages=2, num_micro_batches=2, cells=(first, last)
    )
    found = solve(problem, method="dp")
    assert found is not None
    assert found.step_s == pytest.approx(10.0 + 1.0 + 0.1)  # against 9 + 9.5 + 0.1


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("spare_ratio", [0.0, 0.9])
def test_equals_enumeration_on_dense_problems_of_any_schedule(
    num_chunks: int, spare_ratio: float
) -> None:
    for seed in range(5):
        problem = dense_problem(
            seed, num_layers=10, num_stages=4, num_micro_batches=3, num_points=8
        )
        cells = tuple(replace(c, spare_s=spare_ratio * c.stable_s[0]) for c in problem.cells)
        problem = replace(problem, cells=cells, num_chunks=num_chunks)
        found = solve(problem, method="dp")
        assert found is not None
        assert found.step_s == pytest.approx(optimum_of_many(problem), rel=EXACT), seed


def test_what_a_stage_adds_to_filling_and_draining_by_hand() -> None:
    # G = 3: 2 * 4 + max(4 + (4 - 1) / 2, 5); by hand, with t = u = 4 of the first stage.
    cells = (
        Cell(stage=0, first=None, count=1, stable_s=np.array([4.0]), lone_s=np.array([4.0])),
        Cell(
            stage=1,
            first=None,
            count=1,
            stable_s=np.array([4.0]),
            lone_s=np.array([5.0]),
            spare_s=1.0,
        ),
    )
    problem = InterStageProblem(
        num_layers=2, num_stages=2, num_micro_batches=3, cells=cells, num_chunks=2
    )
    found = solve(problem, method="dp")
    assert found is not None
    assert found.step_s == 8 + 5.5


def test_times_of_zero() -> None:
    zero = np.zeros(1)
    cells = tuple(Cell(stage=i, first=None, count=1, stable_s=zero, lone_s=zero) for i in (0, 1))
    problem = InterStageProblem(num_layers=2, num_stages=2, num_micro_batches=4, cells=cells)
    found = solve(problem, method="dp")
    assert found is not None
    assert found.step_s == 0.0


def dense(num_micro_batches: int) -> InterStageProblem:
    """Far too many assignments to enumerate: 40 points in each of 30 cells."""
    return dense_problem(
        1, num_layers=24, num_stages=6, num_micro_batches=num_micro_batches, num_points=40
    )


@pytest.mark.parametrize("num_micro_batches", first_fast([2, 64, 1, 3, 8], 2))
def test_equals_enumeration_on_dense_problems(num_micro_batches: int) -> None:
    # 4 stages of 1 to 4 layers, 44 ways to share 10 layers, 8^4 points each: 180,000 assignments
    # and 128 bottleneck times, so that boxes split more than once.
    for seed in range(12):
        problem = dense_problem(
            seed, num_layers=10, num_stages=4, num_micro_batches=num_micro_batches, num_points=8
        )
        found = solve(problem, method="dp")
        assert found is not None
        assert found.step_s == pytest.approx(optimum_of_many(problem), rel=EXACT), seed


@pytest.mark.parametrize("num_micro_batches", first_fast([2, 4, 8]))
def test_equals_enumeration_where_bounds_are_tight(num_micro_batches: int) -> None:
    # Without deltas the bound of a box is the step of its best plan, so an error of a percent
    # in it loses the optimum. Max t wants balance, sum t the fast stages.
    for seed in range(8):
        rng = np.random.default_rng(seed)
        times = np.arange(1, 7) * rng.uniform(1.0, 1.3, (5, 1)) * rng.uniform(0.97, 1.03, (5, 6))
        cells = tuple(
            Cell(stage=stage, first=None, count=count + 1, stable_s=t, lone_s=t)
            for (stage, count), time in np.ndenumerate(times)
            for t in [np.array([time])]
        )
        problem = InterStageProblem(
            num_layers=17, num_stages=5, num_micro_batches=num_micro_batches, cells=cells
        )
        found = solve(problem, method="dp")
        assert found is not None
        assert found.step_s == pytest.approx(optimum_of_many(problem), rel=EXACT), seed


def test_of_equal_cells_the_earlier_is_taken() -> None:
    one = Cell(stage=0, first=None, count=1, stable_s=np.ones(1), lone_s=np.ones(1))
    other = Cell(stage=0, first=None, count=1, stable_s=2 * np.ones(1), lone_s=np.ones(1))
    problem = InterStageProblem(
        num_layers=1, num_stages=1, num_micro_batches=2, cells=(other, one, one)
    )
    found = solve(problem, method="dp")
    assert found is not None
    assert [choice.cell for choice in found.choices] == [1]


@pytest.mark.parametrize("num_micro_batches", [1, 2, 64])
def test_same_problem_same_solution(num_micro_batches: int) -> None:
    one, two = (solve(dense(num_micro_batches), method="dp") for _ in range(2))
    assert one == two
    assert one is not None


def test_the_same_cells_with_first_layers_named_give_the_same_step() -> None:
    alike = dense(16)
    named = tuple(
        Cell(stage=c.stage, first=first, count=c.count, stable_s=c.stable_s, lone_s=c.lone_s)
        for c in alike.cells
        for first in range(alike.num_layers - c.count + 1)
    )
    problem = InterStageProblem(num_layers=24, num_stages=6, num_micro_batches=16, cells=named)
    one, two = solve(alike, method="dp"), solve(problem, method="dp")
    assert one is not None
    assert two is not None
    assert two.step_s == pytest.approx(one.step_s, rel=EXACT)
    assert covers(problem, two.choices)
