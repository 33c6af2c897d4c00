"""The solvers, and the bounds that spare them work, on the real jobs of the golden plans."""

from dataclasses import replace

import pytest

from mist.milp import InterStageProblem, solve
from mist.pareto.candidates import GroupModel
from mist.pareto.strategies import groups
from mist.plans.file import dump_plan
from mist.plans.plan import Plan
from mist.plans.search_space import SPACES, SearchSpace
from mist.search.stage_frontiers import Bounds, CellStore, problem_of
from mist.search.tune import tune
from mist.symbolic.load_programs import quiet
from mist.workflow.planning import Effort, make_plan
from mist.workflow.request import limits_of, prepare
from tests.golden import JOBS, ROOT
from tests.pareto.boundless import boundless


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def problems(name: str, space: SearchSpace) -> list[InterStageProblem]:
    """The inter-stage problems of a golden job's groups of several stages, near its optimum."""
    job = prepare(JOBS[name])
    limits = limits_of(job, JOBS[name])
    best = tune(job, space, limits=limits, num_alternatives=0, progress=quiet, method="dp").best
    bounds, store = Bounds(limits=limits, step_s=1.2 * best.step_s), CellStore()
    models = [
        GroupModel(job, group, group.strategies, space)
        for group in groups(job, space)
        if group.num_stages > 1
    ]
    found = [problem_of(model, bounds, store).problem for model in models]
    return [problem for problem in found if problem.cells]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_both_programs_agree_on_real_problems() -> None:
    real = [
        *problems("gpt2-xl-2xl4", SPACES["plain"]),
        *problems("gpt2-xl-8xa100-sxm-40", SPACES["whole"]),
    ]
    num_feasible = 0
    for problem in real:
        exact, program = solve(problem, method="dp"), solve(problem, method="milp")
        assert (exact is None) == (program is None)
        if exact is not None and program is not None:
            num_feasible += 1
            # What HiGHS leaves open of an objective, and what plans are compared to.
            assert program.step_s == pytest.approx(exact.step_s, rel=1e-6)
    assert num_feasible >= 20


def planned(name: str) -> Plan:
    """A golden job's plan, without what counts the work."""
    plan = make_plan(JOBS[name], SearchSpace(), Effort(num_alternatives=0)).plan
    return replace(plan, provenance=replace(plan.provenance, search={}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-xl-2xl4", "gpt2-xl-8xa100-sxm-40"])
def test_a_plan_without_bounds_is_byte_identical(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_bounds = planned(name)
    monkeypatch.setattr("mist.search.visits.lower_bound_s", lambda *_: 0.0)
    monkeypatch.setattr(
        "mist.search.stage_frontiers.window", lambda m, ranges, step_s, **_: ranges.count > 0
    )
    monkeypatch.setattr(
        "mist.search.stage_frontiers.least_step_s", lambda m, r, stable_s, lone_s: 0 * lone_s
    )
    monkeypatch.setattr("mist.search.stage_frontiers.capacity", boundless)
    monkeypatch.setattr("mist.pareto.uniform_layouts.capacity", boundless)
    monkeypatch.setattr("mist.search.tune.capacity", boundless)
    assert dump_plan(planned(name)) == dump_plan(with_bounds)
