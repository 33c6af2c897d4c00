"""The inter-stage tuning: which stage takes how many layers, and which point of its frontier.

`solve` is the door. `exact` finds and proves the optimum in milliseconds; `formulation` states the
same problem as a mixed-integer program and lets HiGHS, which shares no code with it, confirm. Only
this package knows PuLP and HiGHS, and it loads `formulation`, and so them, when they are used.
"""

import math
from dataclasses import replace
from typing import Final

from mist.milp.dynamic_program import solve_exact
from mist.milp.highs import SolverLimits
from mist.milp.problem import (
    Cell,
    Choice,
    InterStageProblem,
    InterStageSolution,
    Method,
    Shared,
    Solver,
    chosen_step,
    chosen_times,
    within_shared,
)

__all__ = [
    "Cell",
    "Choice",
    "InterStageProblem",
    "InterStageSolution",
    "Method",
    "Shared",
    "Solver",
    "SolverLimits",
    "chosen_step",
    "chosen_times",
    "solve",
    "within_shared",
]

# The two solvers agree to this share of the step; the tolerances of HiGHS are of that size.
_AGREEMENT: Final = 1e-6


def solve(
    problem: InterStageProblem,
    *,
    upper_bound_s: float = math.inf,
    method: Method,
    limits: SolverLimits | None = None,
) -> InterStageSolution | None:
    """The fastest assignment, or None when none is feasible and faster than `upper_bound_s`.

    "dp": the exact dynamic program; gap 0. "milp": HiGHS on the whole problem, gap as it proves
    (1e-7), which may take minutes on dense frontiers. "both": the optimum of "dp", whose bottleneck
    time HiGHS is given to confirm that nothing else with it is faster; bound and nodes are those of
    HiGHS. That nothing is feasible is not confirmed.

    The dynamic program knows nothing of `problem.shared`. Where its optimum exceeds a shared limit,
    HiGHS solves the problem with it, and the optimum without is a lower bound.

    `limits`: when HiGHS stops; the gap says what it then leaves open. Raises AssertionError when
    the two solvers disagree, which is a bug of ours; MistError when HiGHS stops without an answer.
    """
    if method == "milp":
        return _solve_milp(problem, upper_bound_s=upper_bound_s, limits=limits)
    exact = solve_exact(problem, upper_bound_s=upper_bound_s)
    if exact is None:
        return None
    if not within_shared(problem, exact.choices):
        return _limited(problem, exact, upper_bound_s=upper_bound_s, limits=limits)
    return exact if method == "dp" else _confirmed(problem, exact, limits)


def _solve_milp(
    problem: InterStageProblem, *, upper_bound_s: float, limits: SolverLimits | None
) -> InterStageSolution | None:
    from mist.milp.integer_program import solve_milp

    return solve_milp(problem, upper_bound_s=upper_bound_s, limits=limits)


def _limited(
    problem: InterStageProblem,
    exact: InterStageSolution,
    *,
    upper_bound_s: float,
    limits: SolverLimits | None,
) -> InterStageSolution | None:
    """The best within the shared limits, which `exact`, the optimum without them, exceeds."""
    found = _solve_milp(problem, upper_bound_s=upper_bound_s, limits=limits)
    if found is not None and not within_shared(problem, found.choices):
        found = _solve_milp(_tighter(problem), upper_bound_s=upper_bound_s, limits=limits)
    if found is None:
        return None
    if found.step_s < exact.step_s * (1 - _AGREEMENT):
        raise _disagreement(exact, found.step_s)
    # Limits only remove choices, so the optimum without them is a bound. The min allows for an
    # answer of HiGHS that is lower by its tolerance.
    lower_bound_s = max(found.lower_bound_s, min(exact.step_s, found.step_s))
    return replace(found, lower_bound_s=lower_bound_s)


def _tighter(problem: InterStageProblem) -> InterStageProblem:
    """The problem with shared limits that HiGHS cannot exceed within its tolerance of 1e-6."""
    shared = (
        replace(each, limit_bytes=each.limit_bytes * (1 - _AGREEMENT * (1 + len(each.stages))))
        for each in problem.shared
    )
    return replace(problem, shared=tuple(shared))


def _confirmed(
    problem: InterStageProblem, exact: InterStageSolution, limits: SolverLimits | None
) -> InterStageSolution:
    from mist.milp.integer_program import solve_milp

    checked = solve_milp(problem, confirm=exact, limits=limits)
    found_s = math.inf if checked is None else checked.step_s
    if checked is None or abs(found_s - exact.step_s) > _AGREEMENT * exact.step_s:
        raise _disagreement(exact, found_s)
    # Within its tolerance HiGHS may report a bound above the step; a gap is never negative.
    lower_bound_s = min(checked.lower_bound_s, exact.step_s)
    return replace(exact, lower_bound_s=lower_bound_s, num_nodes=checked.num_nodes)


def _disagreement(exact: InterStageSolution, found_s: float) -> AssertionError:
    return AssertionError(f"dynamic program {exact.step_s} s, HiGHS {found_s} s per step")
