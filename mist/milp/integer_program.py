"""The inter-stage problem as a mixed-integer linear program, for HiGHS through PuLP.

Sets        stages i = 0..S-1; points p of stage i, over all its cells: stable time t_p, lone time
            u_p, f_p = (t_p - w_p) / v that it adds to filling and draining, first layer b_p
            (unless layers are alike), layer count n_p, units m_p, host memory h_p (point_rows)
            places y: cells c with a unit o that they may begin at, where any has offsets
                                                                                   (place_rows)
Variables   z_p in {0, 1}    stage i takes point p                                  (_variables)
            y_co in [0, 1]   the stage of cell c takes it, from unit o on
            A_i >= 0         sum of f of stages i..S-1
            E >= 0           when a lone micro-batch has left the pipeline
            theta >= 0       the stable time of the bottleneck
Objective   minimise (G - 1) * theta + E                                             (_objective)
Subject to  sum_{p of i} z_p = 1                                               (_one_point_each)
            A_i = sum_{p of i} f_p z_p + A_{i+1}                                  (_fill_chain)
            E >= sum_{p of i} u_p z_p + A_{i+1}                                    (_lone_exit)
            theta >= sum_{p of i} t_p z_p                                         (_bottleneck)
            sum_p n_p z_p = L                        layers alike                      (_total)
            sum_{p of i: b_p + n_p = b} z_p = sum_{p of i+1: b_p = b} z_p
                 for all i and b; stage 0 starts at 0, stage S-1 ends at L        (_contiguous)
            sum_p m_p z_p = N                        units without offsets             (_total)
            sum_o y_co = sum_{p of c} z_p            units with offsets        (_one_place_each)
            sum_{co of i: o + m_c = b} y_co = sum_{co of i+1: o = b} y_co
                 for all i and b; stage 0 starts at 0, stage S-1 ends at N        (_contiguous)
            sum_{p of stages of k} h_p z_p <= H_k    for each shared limit k  (_shared_limits)
            sum_{p of i: tie k} z_p = sum_{p of j: tie k} z_p
                 for all ties k and stages i, j that have ties             (_like_ties)

There is no variable for the layers of a stage and none for its times: T_i and U_i are written out.
The chain A makes the rows sparse, and both together the relaxation tight: on cells of real models
its bound is 0.90 to 0.93 of the optimum, where the form with separate layer binaries reaches 0.27.
The balance per boundary b is a path through the boundaries: it implies the contiguity
b_{i+1} = b_i + n_i of the chosen cells, and its relaxation is tighter than that single equality.

With integer z each stage has one cell, and so its units and the one unit that it can begin at: y
needs no integrality.

With a theta given (`confirm`), points with t_p > theta go and theta is bounded below by it: what is
left of the relaxation gap is 1e-4, and the program closes in about one node. Times are in the unit
of `mist.milp.rows`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import pulp
from numpy.typing import NDArray

from mist.milp.highs import Outcome, SolverLimits, minimise
from mist.milp.problem import (
    Choice,
    InterStageProblem,
    InterStageSolution,
    chosen_step,
    chosen_times,
)
from mist.milp.rows import (
    Rows,
    layers_alike,
    place_rows,
    point_rows,
    time_unit_s,
    units_placed,
    useful_rows,
)

# How much above the step to confirm HiGHS may still look, so that rounding does not cut it off.
_SLACK: Final = 1e-6
# A gap below this is rounding in the change of units: HiGHS has closed it.
_CLOSED: Final = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variables:
    """`pick` [P], z; `place` [Y], y; `chain` [S], A; `exit`, E; `bottleneck`, theta."""

    pick: list[pulp.LpVariable]
    place: list[pulp.LpVariable]
    chain: list[pulp.LpVariable]
    exit: pulp.LpVariable
    bottleneck: pulp.LpVariable


def solve_milp(
    problem: InterStageProblem,
    *,
    upper_bound_s: float = math.inf,
    confirm: InterStageSolution | None = None,
    limits: SolverLimits | None = None,
) -> InterStageSolution | None:
    """The best assignment by HiGHS, or None when none is faster than `upper_bound_s` (seconds).

    With `confirm`, only assignments whose bottleneck has the stable time of its bottleneck are
    looked at, from its choices on: the bound holds for those, and for the whole problem only with a
    proof, such as that of `mist.milp.dynamic_program`, that no other bottleneck does better. Bounds
    hold to the tolerances of HiGHS, 1e-6. Raises MistError when HiGHS stops without an answer.
    """
    unit_s, theta = time_unit_s(problem), 0.0
    if confirm is not None:
        theta = float(chosen_times(problem, confirm.choices)[0].max()) / unit_s
        upper_bound_s = min(upper_bound_s, confirm.step_s * (1 + _SLACK))
    points = point_rows(problem, unit_s)
    points = points[useful_rows(problem, points, upper_bound_s / unit_s)]
    if confirm is not None:
        # Theta was divided by the same unit as the points: the comparison is exact.
        points = points[points["stable"] <= theta]
    if np.unique(points["stage"]).size < problem.num_stages:
        return None
    places = place_rows(problem, np.unique(points["cell"]).tolist())
    program = pulp.LpProblem("inter_stage", pulp.LpMinimize)
    variables = _variables(program, points, places, num_stages=problem.num_stages, theta=theta)
    for constraint in _constraints(problem, points, places, variables):
        program += constraint
    _aim(program, problem, variables, upper_bound_s / unit_s)
    if confirm is not None:
        _start(points, places, variables, confirm)
    outcome = minimise(program, variables.pick, limits or SolverLimits())
    solution = None if outcome is None else _solution(problem, points, outcome, unit_s)
    return solution if solution is not None and solution.step_s < upper_bound_s else None


def _solution(
    problem: InterStageProblem, points: Rows, outcome: Outcome, unit_s: float
) -> InterStageSolution:
    """The picked points, with their step time computed anew."""
    choices = tuple(
        Choice(stage=int(row["stage"]), cell=int(row["cell"]), point=int(row["point"]))
        for row in points[np.round(outcome.values) == 1]
    )
    # The objective of HiGHS is exact only to its tolerance; the choices are exact.
    step_s, bound_s = chosen_step(problem, choices), max(0.0, outcome.lower_bound) * unit_s
    return InterStageSolution(
        step_s=step_s,
        lower_bound_s=bound_s if bound_s < step_s * (1 - _CLOSED) else step_s,
        choices=choices,
        num_nodes=outcome.num_nodes,
        solver="milp",
    )


def _variables(
    program: pulp.LpProblem, points: Rows, places: Rows, *, num_stages: int, theta: float
) -> _Variables:
    create = program.add_variable
    return _Variables(
        pick=[create(f"z_{index}", 0, 1, pulp.LpInteger) for index in range(points.size)],
        place=[create(f"y_{index}", 0, 1) for index in range(places.size)],
        chain=[create(f"A_{stage}", 0) for stage in range(num_stages)],
        exit=create("E", 0),
        bottleneck=create("theta", theta),
    )


def _constraints(
    problem: InterStageProblem, points: Rows, places: Rows, variables: _Variables
) -> Iterator[pulp.LpConstraint]:
    """The constraints of every stage, and those that tie the stages together."""
    for stage in range(problem.num_stages):
        rows = np.flatnonzero(points["stage"] == stage)
        yield _one_point_each(variables, rows)
        yield _fill_chain(points, variables, stage, rows)
        yield _lone_exit(points, variables, stage, rows)
        yield _bottleneck(points, variables, rows)
    if layers_alike(problem):
        yield _total(variables.pick, points["count"], problem.num_layers)
    else:
        yield from _contiguous(variables.pick, points, problem.num_stages)
    if units_placed(problem):
        yield from _one_place_each(points, places, variables)
        yield from _contiguous(variables.place, places, problem.num_stages)
    elif problem.num_units is not None:
        yield _total(variables.pick, points["units"], problem.num_units)
    yield from _shared_limits(problem, points, variables)
    yield from _like_ties(points, variables)


def _aim(
    program: pulp.LpProblem,
    problem: InterStageProblem,
    variables: _Variables,
    upper_bound: float,
) -> None:
    """Add the objective, and the upper bound on it where there is one."""
    program += _objective(problem, variables)
    if math.isfinite(upper_bound):
        program += _objective(problem, variables) <= upper_bound


def _sum(
    unknowns: list[pulp.LpVariable], rows: NDArray[np.intp], factor: NDArray[np.float64]
) -> pulp.LpAffineExpression:
    """sum over `rows` of factor * unknown; `factor` has one entry per row."""
    return pulp.LpAffineExpression(
        zip([unknowns[row] for row in rows], factor.tolist(), strict=True)
    )


def _objective(problem: InterStageProblem, variables: _Variables) -> pulp.LpAffineExpression:
    """(G - 1) * theta + E."""
    return (problem.num_micro_batches - 1) * variables.bottleneck + variables.exit


def _one_point_each(variables: _Variables, rows: NDArray[np.intp]) -> pulp.LpConstraint:
    """sum_{p of i} z_p = 1."""
    return _sum(variables.pick, rows, np.ones(rows.size)) == 1


def _behind(variables: _Variables, stage: int) -> pulp.LpAffineExpression:
    """A_{i+1}; 0 behind the last stage."""
    return pulp.lpSum(variables.chain[stage + 1 : stage + 2])


def _fill_chain(
    points: Rows, variables: _Variables, stage: int, rows: NDArray[np.intp]
) -> pulp.LpConstraint:
    """A_i = sum_{p of i} f_p z_p + A_{i+1}."""
    own = _sum(variables.pick, rows, points["fill"][rows])
    return own + _behind(variables, stage) == variables.chain[stage]


def _lone_exit(
    points: Rows, variables: _Variables, stage: int, rows: NDArray[np.intp]
) -> pulp.LpConstraint:
    """E >= sum_{p of i} u_p z_p + A_{i+1}."""
    own = _sum(variables.pick, rows, points["lone"][rows])
    return own + _behind(variables, stage) <= variables.exit


def _bottleneck(points: Rows, variables: _Variables, rows: NDArray[np.intp]) -> pulp.LpConstraint:
    """theta >= sum_{p of i} t_p z_p."""
    return _sum(variables.pick, rows, points["stable"][rows]) <= variables.bottleneck


def _total(
    unknowns: list[pulp.LpVariable], count: NDArray[np.int64], total: int
) -> pulp.LpConstraint:
    """sum_p n_p z_p = L, or sum_p m_p z_p = N."""
    return _sum(unknowns, np.arange(count.size), count.astype(np.float64)) == total


def _contiguous(
    unknowns: list[pulp.LpVariable], rows: Rows, num_stages: int
) -> Iterator[pulp.LpConstraint]:
    """What leaves stage i at a boundary enters stage i+1 there, for each i and boundary.

    `rows`: stage, first and count of each unknown: points with their layers, or places with their
    units. That stage 0 starts at 0 and stage S-1 ends at L or N is true of every row left.
    """
    stage, first, end = rows["stage"], rows["first"], rows["first"] + rows["count"]
    for before in range(num_stages - 1):
        leaves, enters = stage == before, stage == before + 1
        for boundary in np.union1d(end[leaves], first[enters]):
            here = np.flatnonzero((leaves & (end == boundary)) | (enters & (first == boundary)))
            yield _sum(unknowns, here, np.where(leaves[here], 1.0, -1.0)) == 0


def _one_place_each(
    points: Rows, places: Rows, variables: _Variables
) -> Iterator[pulp.LpConstraint]:
    """sum_o y_co = sum_{p of c} z_p, for each cell c."""
    for cell in np.unique(points["cell"]):
        there, rows = (np.flatnonzero(of["cell"] == cell) for of in (places, points))
        placed = _sum(variables.place, there, np.ones(there.size))
        yield placed == _sum(variables.pick, rows, np.ones(rows.size))


def _shared_limits(
    problem: InterStageProblem, points: Rows, variables: _Variables
) -> Iterator[pulp.LpConstraint]:
    """sum_{p of stages of k} h_p z_p <= H_k for each limit, in units of the largest h."""
    for shared in problem.shared:
        rows = np.flatnonzero(np.isin(points["stage"], shared.stages))
        host = points["host"][rows]
        # Bytes near 1e10 and times near 1 in one program would scale it badly.
        unit = float(host.max(initial=0.0)) or 1.0
        yield _sum(variables.pick, rows, host / unit) <= shared.limit_bytes / unit


def _like_ties(points: Rows, variables: _Variables) -> Iterator[pulp.LpConstraint]:
    """sum_{p of i: tie k} z_p = sum_{p of j: tie k} z_p, for neighbours i, j among tied stages."""
    stage, tie = points["stage"], points["tie"]
    for before, after in pairwise(np.unique(stage[tie > 0]).tolist()):
        for each in np.unique(tie[np.isin(stage, (before, after))]).tolist():
            rows = np.flatnonzero(np.isin(stage, (before, after)) & (tie == each))
            yield _sum(variables.pick, rows, np.where(stage[rows] == before, 1.0, -1.0)) == 0


def _start(points: Rows, places: Rows, variables: _Variables, solution: InterStageSolution) -> None:
    """Give every variable the value that it has in the solution."""
    chosen = {(choice.cell, choice.point) for choice in solution.choices}
    keys = zip(points["cell"].tolist(), points["point"].tolist(), strict=True)
    picked = np.array([key in chosen for key in keys])
    stable, lone, fill = (points[name][picked] for name in ("stable", "lone", "fill"))
    chain = np.cumsum(fill[::-1])[::-1]
    units = points["units"][picked]
    taken = dict(
        zip(points["cell"][picked].tolist(), (units.cumsum() - units).tolist(), strict=True)
    )
    placed = np.array([taken.get(int(row["cell"])) == row["first"] for row in places], dtype=float)
    ends = [(lone + chain - fill).max(), stable.max()]
    values = [*picked.astype(float), *placed, *chain, *ends]
    unknowns = [*variables.pick, *variables.place, *variables.chain]
    unknowns += [variables.exit, variables.bottleneck]
    for unknown, value in zip(unknowns, values, strict=True):
        unknown.setInitialValue(float(value))
