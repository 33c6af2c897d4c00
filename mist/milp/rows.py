"""The points and the places of an inter-stage problem as rows, one per unknown of the program.

A point is one of a cell's; a place is a cell and the first of the units of devices that it takes,
where some cell says which these may be. Times are divided by a time that some stage needs
(`time_unit_s`): tolerances of HiGHS are absolute. With an upper bound UB on T, points go that no
plan faster than UB takes (`useful_rows`), as (G - 1) t_p + E reaches UB with

    E >= min_{p of 0} (u_p - f_p) + f_p + sum_{j != i} min f_j
"""

import math
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.milp.problem import InterStageProblem

# A point of a cell; times are in the unit of the program (`time_unit_s`).
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
        ("units", np.int64),
        ("host", np.float64),
        ("tie", np.int64),
    ]
)
# A place of a cell: its stage, and the units `first` to `first` + `count`.
_PLACE: Final = np.dtype([(name, np.int64) for name in ("stage", "cell", "first", "count")])
Rows = NDArray[np.void]


def time_unit_s(problem: InterStageProblem) -> float:
    """Seconds that some stage needs at least, so that no step is shorter than 1 unit; or 1."""
    least = np.full((problem.num_stages, 2), np.inf)
    # With one micro-batch the bottleneck costs nothing: only lone times bound the step.
    bottleneck = min(1, problem.num_micro_batches - 1)
    for cell in (cell for cell in problem.cells if cell.stable_s.size):
        times_s = (bottleneck * float(cell.stable_s.min()), float(cell.lone_s.min()))
        least[cell.stage] = np.minimum(least[cell.stage], times_s)
    unit_s = float(least.max())
    return unit_s if 0.0 < unit_s < math.inf else 1.0


def point_rows(problem: InterStageProblem, unit_s: float) -> Rows:
    """The points of all cells [P], by stage; `first` is 0 where layers are alike, `tie` if none."""
    cells = sorted(enumerate(problem.cells), key=lambda item: item[1].stage)
    ties = {tie: number for number, tie in enumerate((None, *problem.ties))}
    rows = [_cell_points(problem, index, unit_s) for index, _ in cells]
    for (_, cell), own in zip(cells, rows, strict=True):
        own["tie"] = ties[cell.tie]
    return np.concatenate([np.empty(0, _POINT), *rows])


def _cell_points(problem: InterStageProblem, index: int, unit_s: float) -> Rows:
    cell = problem.cells[index]
    points = np.empty(cell.stable_s.size, _POINT)
    points["stage"], points["cell"] = cell.stage, index
    points["first"], points["count"] = cell.first or 0, cell.count
    points["point"] = np.arange(points.size)
    points["stable"], points["lone"] = cell.stable_s / unit_s, cell.lone_s / unit_s
    points["fill"] = problem.fill_s(cell) / unit_s
    points["units"] = cell.units
    points["host"] = 0.0 if cell.host_bytes is None else cell.host_bytes
    return points


def useful_rows(problem: InterStageProblem, points: Rows, upper_bound: float) -> NDArray[np.bool_]:
    """Which points [P] an assignment faster than `upper_bound`, in the unit, may take."""
    stage, fill = points["stage"], points["fill"]
    least = np.full(problem.num_stages, np.inf)
    # ufunc.at, because many points share a stage: indexed assignment would use one of them.
    np.minimum.at(least, stage, fill)
    min_delta = (points["lone"] - fill)[stage == 0].min(initial=np.inf)
    exit_least = min_delta + fill + (least.sum() - least[stage])
    useful = (problem.num_micro_batches - 1) * points["stable"] + exit_least < upper_bound
    if not layers_alike(problem):
        useful &= _within(points, problem.num_stages, problem.num_layers)
    return np.asarray(useful, dtype=np.bool_)


def layers_alike(problem: InterStageProblem) -> bool:
    """Whether cells do not name their first layers."""
    return all(cell.first is None for cell in problem.cells)


def place_rows(problem: InterStageProblem, cells: Iterable[int]) -> Rows:
    """The places [Y] of these cells, by cell; none where no cell of the problem has offsets."""
    if problem.num_units is None or not units_placed(problem):
        return np.empty(0, _PLACE)
    rows = [np.empty(0, _PLACE)]
    for index in cells:
        cell = problem.cells[index]
        ends = range(problem.num_units - cell.units + 1)
        firsts = np.array(ends if cell.offsets is None else sorted(set(cell.offsets)), np.int64)
        own = np.empty(firsts.size, _PLACE)
        own["stage"], own["cell"] = cell.stage, index
        own["first"], own["count"] = firsts, cell.units
        rows.append(own)
    places = np.concatenate(rows)
    return places[_within(places, problem.num_stages, problem.num_units)]


def units_placed(problem: InterStageProblem) -> bool:
    """Whether a cell says which units it may begin at."""
    return any(cell.offsets is not None for cell in problem.cells)


def _within(rows: Rows, num_stages: int, length: int) -> NDArray[np.bool_]:
    """Which rows of the first stage begin at 0, and of the last end at `length`."""
    stage, end = rows["stage"], rows["first"] + rows["count"]
    begins = (stage > 0) | (rows["first"] == 0)
    return np.asarray(begins & ((stage < num_stages - 1) | (end == length)), dtype=np.bool_)
