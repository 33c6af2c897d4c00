"""The inter-stage problem as a mixed-integer linear program, for HiGHS through PuLP.

Sets        stages i = 0..S-1; points p of stage i, over all its cells: stable time t_p, lone time
            u_p, f_p = (t_p - w_p) / v that it adds to filling and draining, first layer b_p
            (unless layers are alike) and layer count n_p                              (_points)
Variables   z_p in {0, 1}    stage i takes point p                                  (_variables)
            A_i >= 0         sum of f of stages i..S-1
            E >= 0           when a lone micro-batch has left the pipeline
            theta >= 0       the stable time of the bottleneck
Objective   minimise (G - 1) * theta + E                                             (_objective)
Subject to  sum_{p of i} z_p = 1                                               (_one_point_each)
            A_i = sum_{p of i} f_p z_p + A_{i+1}                                  (_fill_chain)
            E >= sum_{p of i} u_p z_p + A_{i+1}                                    (_lone_exit)
            theta >= sum_{p of i} t_p z_p                                         (_bottleneck)
            sum_p n_p z_p = L                              layers alike         (_layers_alike)
            sum_{p of i: b_p + n_p = b} z_p = sum_{p of i+1: b_p = b} z_p
                 for all i and b; stage 0 starts at 0, stage S-1 ends at L   (_layers_contiguous)

There is no variable for the layers of a stage and none for its times: T_i and U_i are written out.
The chain A makes the rows sparse, and both together the relaxation tight: on cells of real models
its bound is 0.90 to 0.93 of the optimum, where the form with separate layer binaries reaches 0.27.
The balance per boundary b is a path through the boundaries: it implies the contiguity
b_{i+1} = b_i + n_i of the chosen cells, and its relaxation is tighter than that single equality.

With a theta given (`confirm`), points with t_p > theta go and theta is bounded below by it: what is
left of the relaxation gap is 1e-4, and the program closes in about one node. With an upper bound UB
on T, points go that no plan faster than UB takes, as (G - 1) t_p + E reaches UB with

    E >= min_{p of 0} (u_p - f_p) + f_p + sum_{j != i} min f_j                          (_useful)

Times are divided by a time that some stage needs (`_unit_s`): tolerances of HiGHS are absolute.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import pulp
from numpy.typing import NDArray

from mist.milp.highs import Limits, Outcome, minimise
from mist.milp.problem import (
    Choice,
    InterStageProblem,
    InterStageSolution,
    chosen_step,
    chosen_times,
)

# How much above the step to confirm HiGHS may still look, so that rounding does not cut it off.
_SLACK: Final = 1e-6
# A gap below this is rounding in the change of units: HiGHS has closed it.
_CLOSED: Final = 1e-10

# A point of a cell; times are in the unit of the program (`_unit_s`).
_POINT: Final = np.dtype(
    [
        ("stage", np.int64),
        ("cell", np.int64),
        ("point", np.int64),
        ("first", np.int64),
        ("count", np.int64),
        ("stable", np.float64),
        ("lone", np.float64),
        ("fill", np.float64),
    ]
)
_Points = NDArray[np.void]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variables:
    """`pick` [P], z; `chain` [S], A; `exit`, E; `bottleneck`, theta."""

    pick: list[pulp.LpVariable]
    chain: list[pulp.LpVariable]
    exit: pulp.LpVariable
    bottleneck: pulp.LpVariable


def solve_milp(
    problem: InterStageProblem,
    *,
    upper_bound_s: float = math.inf,
    confirm: InterStageSolution | None = None,
    limits: Limits | None = None,
) -> InterStageSolution | None:
    """The best assignment by HiGHS, or None when none is faster than `upper_bound_s` (seconds).

    With `confirm`, only assignments whose bottleneck has the stable time of its bottleneck are
    looked at, from its choices on: the bound holds for those, and for the whole problem only with a
    proof, such as that of `mist.milp.exact`, that no other bottleneck does better. Bounds hold to
    the tolerances of HiGHS, 1e-6. Raises MistError when HiGHS stops without an answer.
    """
    unit_s, theta = _unit_s(problem), 0.0
    if confirm is not None:
        theta = float(chosen_times(problem, confirm.choices)[0].max()) / unit_s
        upper_bound_s = min(upper_bound_s, confirm.step_s * (1 + _SLACK))
    points = _points(problem, unit_s)
    points = points[_useful(problem, points, upper_bound_s / unit_s)]
    if confirm is not None:
        points = points[points["stable"] <= theta]
    if np.unique(points["stage"]).size < problem.num_stages:
        return None
    program = pulp.LpProblem("inter_stage", pulp.LpMinimize)
    variables = _variables(program, problem, points, theta)
    _constrain(program, problem, points, variables)
    _aim(program, problem, variables, upper_bound_s / unit_s)
    if confirm is not None:
        _start(points, variables, confirm)
    outcome = minimise(program, variables.pick, limits or Limits())
    solution = None if outcome is None else _solution(problem, points, outcome, unit_s)
    return solution if solution is not None and solution.step_s < upper_bound_s else None


def _solution(
    problem: InterStageProblem, points: _Points, outcome: Outcome, unit_s: float
) -> InterStageSolution:
    """The picked points, with their step time computed anew."""
    choices = tuple(
        Choice(stage=int(row["stage"]), cell=int(row["cell"]), point=int(row["point"]))
        for row in points[np.round(outcome.values) == 1]
    )
    step_s, bound_s = chosen_step(problem, choices), outcome.lower_bound * unit_s
    return InterStageSolution(
        step_s=step_s,
        lower_bound_s=bound_s if bound_s < step_s * (1 - _CLOSED) else step_s,
        choices=choices,
        num_nodes=outcome.num_nodes,
    )


def _unit_s(problem: InterStageProblem) -> float:
    """Seconds that some stage needs at least, so that no step is shorter than 1 unit; or 1."""
    least = np.full((problem.num_stages, 2), np.inf)
    bottleneck = min(1, problem.num_micro_batches - 1)
    for cell in (cell for cell in problem.cells if cell.stable_s.size):
        times_s = (bottleneck * float(cell.stable_s[0]), float(cell.lone_s[-1]))
        least[cell.stage] = np.minimum(least[cell.stage], times_s)
    unit_s = float(least.max())
    return unit_s if 0.0 < unit_s < math.inf else 1.0


def _points(problem: InterStageProblem, unit_s: float) -> _Points:
    """The points of all cells, by stage; where layers are alike, `first` is 0."""
    cells = sorted(enumerate(problem.cells), key=lambda item: item[1].stage)
    rows = [_cell_points(problem, index, unit_s) for index, _ in cells]
    return np.concatenate([np.empty(0, _POINT), *rows])


def _cell_points(problem: InterStageProblem, index: int, unit_s: float) -> _Points:
    cell = problem.cells[index]
    points = np.empty(cell.stable_s.size, _POINT)
    points["stage"], points["cell"] = cell.stage, index
    points["first"], points["count"] = cell.first or 0, cell.count
    points["point"] = np.arange(points.size)
    points["stable"], points["lone"] = cell.stable_s / unit_s, cell.lone_s / unit_s
    points["fill"] = problem.fill_s(cell) / unit_s
    return points


def _useful(problem: InterStageProblem, points: _Points, upper_bound: float) -> NDArray[np.bool_]:
    """Which points an assignment faster than the upper bound may take."""
    stage, fill = points["stage"], points["fill"]
    least = np.full(problem.num_stages, np.inf)
    np.minimum.at(least, stage, fill)
    min_delta = (points["lone"] - fill)[stage == 0].min(initial=np.inf)
    exit_least = min_delta + fill + (least.sum() - least[stage])
    useful = (problem.num_micro_batches - 1) * points["stable"] + exit_least < upper_bound
    if not _alike(problem):
        end = points["first"] + points["count"]
        useful &= (stage > 0) | (points["first"] == 0)
        useful &= (stage < problem.num_stages - 1) | (end == problem.num_layers)
    return np.asarray(useful, dtype=np.bool_)


def _alike(problem: InterStageProblem) -> bool:
    return all(cell.first is None for cell in problem.cells)


def _variables(
    program: pulp.LpProblem, problem: InterStageProblem, points: _Points, theta: float
) -> _Variables:
    create = program.add_variable
    return _Variables(
        pick=[create(f"z_{index}", 0, 1, pulp.LpInteger) for index in range(points.size)],
        chain=[create(f"A_{stage}", 0) for stage in range(problem.num_stages)],
        exit=create("E", 0),
        bottleneck=create("theta", theta),
    )


def _constrain(
    program: pulp.LpProblem, problem: InterStageProblem, points: _Points, variables: _Variables
) -> None:
    """Add the constraints of every stage, and those that tie the layers of the stages."""
    for stage in range(problem.num_stages):
        rows = np.flatnonzero(points["stage"] == stage)
        program += _one_point_each(variables, rows)
        program += _fill_chain(points, variables, stage, rows)
        program += _lone_exit(points, variables, stage, rows)
        program += _bottleneck(points, variables, rows)
    layers = _layers_alike if _alike(problem) else _layers_contiguous
    for constraint in layers(problem, points, variables):
        program += constraint


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
    variables: _Variables, rows: NDArray[np.intp], factor: NDArray[np.float64]
) -> pulp.LpAffineExpression:
    """sum over the points `rows` of factor * z; `factor` has one entry per row."""
    return pulp.LpAffineExpression(
        zip([variables.pick[row] for row in rows], factor.tolist(), strict=True)
    )


def _objective(problem: InterStageProblem, variables: _Variables) -> pulp.LpAffineExpression:
    """(G - 1) * theta + E."""
    return (problem.num_micro_batches - 1) * variables.bottleneck + variables.exit


def _one_point_each(variables: _Variables, rows: NDArray[np.intp]) -> pulp.LpConstraint:
    """sum_{p of i} z_p = 1."""
    return _sum(variables, rows, np.ones(rows.size)) == 1


def _behind(variables: _Variables, stage: int) -> pulp.LpAffineExpression:
    """A_{i+1}; 0 behind the last stage."""
    return pulp.lpSum(variables.chain[stage + 1 : stage + 2])


def _fill_chain(
    points: _Points, variables: _Variables, stage: int, rows: NDArray[np.intp]
) -> pulp.LpConstraint:
    """A_i = sum_{p of i} f_p z_p + A_{i+1}."""
    own = _sum(variables, rows, points["fill"][rows])
    return own + _behind(variables, stage) == variables.chain[stage]


def _lone_exit(
    points: _Points, variables: _Variables, stage: int, rows: NDArray[np.intp]
) -> pulp.LpConstraint:
    """E >= sum_{p of i} u_p z_p + A_{i+1}."""
    own = _sum(variables, rows, points["lone"][rows])
    return own + _behind(variables, stage) <= variables.exit


def _bottleneck(
    points: _Points, variables: _Variables, rows: NDArray[np.intp]
) -> pulp.LpConstraint:
    """theta >= sum_{p of i} t_p z_p."""
    return _sum(variables, rows, points["stable"][rows]) <= variables.bottleneck


def _layers_alike(
    problem: InterStageProblem, points: _Points, variables: _Variables
) -> list[pulp.LpConstraint]:
    """sum_p n_p z_p = L."""
    rows = np.arange(points.size)
    return [_sum(variables, rows, points["count"].astype(np.float64)) == problem.num_layers]


def _layers_contiguous(
    problem: InterStageProblem, points: _Points, variables: _Variables
) -> list[pulp.LpConstraint]:
    """sum_{p of i: b_p + n_p = b} z_p = sum_{p of i+1: b_p = b} z_p, for each i and b.

    That stage 0 starts at 0 and stage S-1 ends at L is already true of every point left.
    """
    stage, first, end = points["stage"], points["first"], points["first"] + points["count"]
    constraints = []
    for before in range(problem.num_stages - 1):
        leaves, enters = stage == before, stage == before + 1
        for boundary in np.union1d(end[leaves], first[enters]):
            rows = np.flatnonzero((leaves & (end == boundary)) | (enters & (first == boundary)))
            constraints.append(_sum(variables, rows, np.where(leaves[rows], 1.0, -1.0)) == 0)
    return constraints


def _start(points: _Points, variables: _Variables, solution: InterStageSolution) -> None:
    """Give every variable the value that it has in the solution."""
    chosen = {(choice.cell, choice.point) for choice in solution.choices}
    keys = zip(points["cell"].tolist(), points["point"].tolist(), strict=True)
    picked = np.array([key in chosen for key in keys])
    stable, lone, fill = (points[name][picked] for name in ("stable", "lone", "fill"))
    chain = np.cumsum(fill[::-1])[::-1]
    values = [*picked.astype(float), *chain, (lone + chain - fill).max(), stable.max()]
    unknowns = [*variables.pick, *variables.chain, variables.exit, variables.bottleneck]
    for unknown, value in zip(unknowns, values, strict=True):
        unknown.setInitialValue(float(value))
