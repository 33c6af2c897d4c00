"""The inter-stage tuning: which stage takes how many layers, and which point of its frontier.

`solve` is the door. `exact` finds and proves the optimum in milliseconds; `formulation` states the
same problem as a mixed-integer program and lets HiGHS, which shares no code with it, confirm. Only
this package knows PuLP and HiGHS, and it loads `formulation`, and so them, when they are used.
"""

import math
from dataclasses import replace
from typing import Final

from mist.milp.exact import solve_exact
from mist.milp.problem import (
    Cell,
    Choice,
    InterStageProblem,
    InterStageSolution,
    Method,
    chosen_step,
    chosen_times,
)

__all__ = [
    "Cell",
    "Choice",
    "InterStageProblem",
    "InterStageSolution",
    "Method",
    "chosen_step",
    "chosen_times",
    "solve",
]

# The two solvers agree to this share of the step; the tolerances of HiGHS are of that size.
_AGREEMENT: Final = 1e-6


def solve(
    problem: InterStageProblem, *, upper_bound_s: float = math.inf, method: Method
) -> InterStageSolution | None:
    """The fastest assignment, or None when none is feasible and faster than `upper_bound_s`.

    "dp": the exact dynamic program; gap 0. "milp": HiGHS on the whole problem, gap as it proves
    (1e-7), which may take minutes on dense frontiers. "both": the optimum of "dp", whose bottleneck
    time HiGHS is given to confirm that nothing else with it is faster; bound and nodes are those of
    HiGHS. That nothing is feasible is not confirmed.

    Raises AssertionError when the two solvers disagree, which is a bug of ours; MistError when
    HiGHS stops without an answer.
    """
    if method == "milp":
        from mist.milp.formulation import solve_milp

        return solve_milp(problem, upper_bound_s=upper_bound_s)
    exact = solve_exact(problem, upper_bound_s=upper_bound_s)
    if method == "dp" or exact is None:
        return exact
    return _confirmed(problem, exact)


def _confirmed(problem: InterStageProblem, exact: InterStageSolution) -> InterStageSolution:
    from mist.milp.formulation import solve_milp

    checked = solve_milp(problem, confirm=exact)
    found_s = math.inf if checked is None else checked.step_s
    if checked is None or abs(found_s - exact.step_s) > _AGREEMENT * exact.step_s:
        raise AssertionError(f"dynamic program {exact.step_s} s, HiGHS {found_s} s per step")
    lower_bound_s = min(checked.lower_bound_s, exact.step_s)
    return replace(exact, lower_bound_s=lower_bound_s, num_nodes=checked.num_nodes)
