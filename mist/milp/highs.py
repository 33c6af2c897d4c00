"""Runs a PuLP program with HiGHS, from a start, to an outcome that can be trusted.

The outcome is read from HiGHS itself. PuLP reports "Optimal" after a time-out, whatever the gap,
and has no word for a node limit. With one thread, a fixed seed and at most a limit on nodes, the
same program gives the same answer on any machine at any load; with a time limit it need not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mist.errors import MistError

if TYPE_CHECKING:
    import highspy
    import pulp

_OPTIONS: Final = {"random_seed": 0, "parallel": "off"}
# HiGHS's kSolutionStatusFeasible, which highspy gives as a bare integer.
_FEASIBLE: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverLimits:
    """When HiGHS stops: at this relative gap, or after so many nodes or seconds (None: any)."""

    relative_gap: float = 1e-7
    max_nodes: int | None = None
    time_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`values` of the variables asked for; `lower_bound` of the objective, in its unit.

    The bound is -inf when HiGHS stopped before it had one.
    """

    values: tuple[float, ...]
    lower_bound: float
    num_nodes: int


def minimise(
    program: "pulp.LpProblem", variables: Sequence["pulp.LpVariable"], limits: SolverLimits
) -> Outcome | None:
    """Solve; `values` of the outcome are those of `variables`. None when infeasible.

    Starts from the variables' initial values when all have one. Raises MistError when HiGHS stops
    without an answer.
    """
    import pulp

    nodes = {} if limits.max_nodes is None else {"mip_max_nodes": limits.max_nodes}
    solver = pulp.HiGHS(
        msg=False,
        threads=1,
        timeLimit=limits.time_s,
        gapRel=limits.relative_gap,
        # HiGHS stops at the first gap that closes: its absolute one must not pre-empt the relative.
        gapAbs=0.0,
        **_OPTIONS,
        **nodes,
    )
    solver.createAndConfigureSolver(program)
    solver.buildSolverModel(program)
    highs: highspy.Highs = program.solverModel
    _set_start(highs, [variable.varValue for variable in program.variables()])
    # Without this, HiGHS returns at once and unsolved if another thread count was used before.
    highs.resetGlobalScheduler(True)
    highs.run()
    if not _has_answer(highs, limits):
        return None
    info, solution = highs.getInfo(), highs.getSolution().col_value
    return Outcome(
        values=tuple(float(solution[variable.index]) for variable in variables),
        lower_bound=float(info.mip_dual_bound),
        num_nodes=max(0, int(info.mip_node_count)),
    )


def _set_start(highs: "highspy.Highs", values: list[float | None]) -> None:
    import highspy

    start = highspy.HighsSolution()
    start.col_value = [value for value in values if value is not None]
    if len(start.col_value) == len(values):
        highs.setSolution(start)


def _has_answer(highs: "highspy.Highs", limits: SolverLimits) -> bool:
    """True with a feasible point, False when there is none; anything else is an error."""
    from highspy import HighsModelStatus as Status

    status = highs.getModelStatus()
    # All variables and costs are at least 0: what may be unbounded can only be infeasible.
    if status in (Status.kInfeasible, Status.kUnboundedOrInfeasible):
        return False
    feasible = highs.getInfo().primal_solution_status == _FEASIBLE
    stopped = status in (Status.kSolutionLimit, Status.kTimeLimit)
    if status == Status.kOptimal or (stopped and feasible):
        return True
    raise MistError(
        f"HiGHS stopped with '{highs.modelStatusToString(status)}' and no assignment "
        f"(node limit {limits.max_nodes}, time limit {limits.time_s} s). "
        "Try a higher limit, or method 'dp' where no shared memory limit binds."
    )
