"""The inter-stage problem solved exactly: a scalar dynamic program inside a branch and bound.

    minimise  T = (G - 1) * theta + E,   theta = max_i t_i,   E = max_i ( u_i + sum_{j>i} f_j )

f = (t - w) / v, what a stage adds to filling and draining, rises with t within a cell. For a
threshold on theta and a budget e on E, walk from the last stage to the first. With
A = A_{q-1}(lam - count), the least sum of f of the stages behind,

    A_q(lam) = min over cells of  A + min { f in the cell : t <= theta, u <= e - A }     (_suffix_s)

A smaller A loosens every budget ahead and is the sum that is minimised, so one number per state is
enough. On a frontier the least f with u <= e - A is the first such point: one searchsorted, for all
states and all scenarios (theta, e) at once.

Branch and bound (`solve_exact`) over boxes of consecutive distinct values theta_low..theta_high of
all stable times. A plan of a box that is faster than c has t <= theta_high and
E <= c - (G - 1) * theta_low, so (`_examine`):
  - when that scenario is infeasible, the box holds no plan faster than c;
  - when it is feasible with sum A, every such plan takes (G - 1) * theta_low + A +
    min (u_0 - f_0) or more, because E >= u_0 + sum_{j>0} f_j = (u_0 - f_0) + sum f (u_0 - f_0 may
    be negative: it cannot be left out). Its choices are a plan, and may be a new cut-off.
Boxes split (`_split`) until none can beat the cut-off, which proves the best plan optimal. A state
of the dynamic program is lam, or lam and the units of devices behind; a new cut-off leaves fewer of
both and of cells to look at (`_narrowed`). Where cells have ties, each tie is a problem of its own,
whose cut-off is the best plan of those before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.milp.moves import FrontierTimes, Position, positions
from mist.milp.problem import Choice, Floats, InterStageProblem, InterStageSolution, chosen_step
from mist.milp.pruning import pruned

# A plan counts as faster when it gains more than this share of the step: above the rounding of a
# sum of 100 stages (1e-14), far below what a cost model can tell.
_ROUNDING: Final = 1e-12
# Scenarios of one dynamic program; more fill the vectors, fewer profit sooner from a new cut-off.
_BATCH: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """Plans whose bottleneck is one of thetas[low..high]: T >= `bound_s` and E >= `exit_s`."""

    bound_s: float
    exit_s: float
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _DynamicProgram:
    """What one search knows: the moves that a plan faster than `cutoff_s` may take, and the rest.

    `thetas` [N], seconds, ascending; `floors_s` = (G - 1) * thetas; `min_delta_s`: the least
    u - f of the first stage.
    """

    problem: InterStageProblem
    positions: tuple[Position, ...]
    cutoff_s: float
    thetas: Floats
    floors_s: Floats
    min_delta_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    """The fastest plan so far (none yet: no choices); the next must not exceed `cutoff_s`."""

    cutoff_s: float
    step_s: float
    choices: tuple[Choice, ...]


def solve_exact(
    problem: InterStageProblem, *, upper_bound_s: float = math.inf
) -> InterStageSolution | None:
    """The optimum, or None when no assignment is faster than `upper_bound_s` (seconds).

    Optimal to a relative 1e-12, the size of rounding; the bound is therefore the step itself.
    """
    best, num_nodes = None, 0
    # The best plan of one tie is the cut-off of the next, whose search then closes sooner.
    for tie in problem.ties or (None,):
        found = _solve_tie(problem, tie, upper_bound_s)
        if found is not None:
            best, upper_bound_s = found, found.step_s
            num_nodes += found.num_nodes
    return None if best is None else replace(best, num_nodes=num_nodes)


def _solve_tie(
    problem: InterStageProblem, tie: tuple[int, ...] | None, upper_bound_s: float
) -> InterStageSolution | None:
    """The optimum of the cells with this tie, or none."""
    moves = positions(problem, tie)
    if moves is None:
        return None
    search, num_nodes = _search(problem, moves), 0
    cutoff_s = min(search.cutoff_s, _faster_than(upper_bound_s))
    best = _Best(cutoff_s=cutoff_s, step_s=upper_bound_s, choices=())
    boxes = [_Box(bound_s=0.0, exit_s=0.0, low=0, high=len(search.thetas) - 1)]
    while boxes and (narrowed := _narrowed(search, best.cutoff_s)) is not None:
        search = narrowed
        # Least bound first: a good plan early closes the boxes behind it.
        boxes.sort(key=lambda box: (box.bound_s, box.low))
        batch, rest = boxes[:_BATCH], boxes[_BATCH:]
        best, open_boxes = _examine(search, batch, best)
        # A node is a scenario of the dynamic program, and each box is examined at several targets.
        num_nodes += len(batch) * (_BATCH // len(batch))
        # Few open boxes split into many parts, so that the next batch is full.
        parts = max(2, _BATCH // max(1, len(open_boxes)))
        boxes = rest + [part for box in open_boxes for part in _split(search, box, parts)]
        boxes = [box for box in boxes if box.bound_s < best.cutoff_s]
    if not best.choices:
        return None
    return InterStageSolution(
        step_s=best.step_s,
        lower_bound_s=best.step_s,
        choices=best.choices,
        num_nodes=num_nodes,
        solver="dp",
    )


def _search(problem: InterStageProblem, moves: tuple[Position, ...]) -> _DynamicProgram:
    """The distinct stable times in reach; for G = 1 the bottleneck costs nothing: the largest."""
    thetas = np.unique(np.concatenate([p.stable_s for q in moves for p in q.frontiers]))
    thetas = thetas[-1:] if problem.num_micro_batches == 1 else thetas
    deltas = [-points.negative_lone_s - points.fill_s[:-1] for points in moves[-1].frontiers]
    return _DynamicProgram(
        problem=problem,
        positions=moves,
        cutoff_s=_worst_s(problem, moves),
        thetas=thetas,
        floors_s=(problem.num_micro_batches - 1) * thetas,
        min_delta_s=float(min(delta.min() for delta in deltas)),
    )


def _worst_s(problem: InterStageProblem, moves: tuple[Position, ...]) -> float:
    """A finite step time that no plan exceeds, so that the first budgets are finite."""
    frontiers = [position.frontiers for position in moves]
    theta_s = max(points.stable_s[-1] for row in frontiers for points in row)
    # `fill_s` ends in inf: its largest time is the last entry but one.
    sum_s = sum(max(points.fill_s[-2] for points in row) for row in frontiers)
    lone_s = max(-points.negative_lone_s[0] for row in frontiers for points in row)
    worst_s = (problem.num_micro_batches - 1) * theta_s + sum_s + lone_s
    return float(worst_s) * (1 + _ROUNDING)


def _narrowed(search: _DynamicProgram, cutoff_s: float) -> _DynamicProgram | None:
    """The search below a cut-off; None when no move leads to a plan that is faster."""
    if cutoff_s >= search.cutoff_s:
        return search
    kept = pruned(
        search.positions,
        num_micro_batches=search.problem.num_micro_batches,
        min_delta_s=search.min_delta_s,
        cutoff_s=cutoff_s,
    )
    return None if kept is None else replace(search, positions=kept, cutoff_s=cutoff_s)


def _faster_than(step_s: float) -> float:
    return step_s * (1 - _ROUNDING)


def _examine(search: _DynamicProgram, boxes: list[_Box], best: _Best) -> tuple[_Best, list[_Box]]:
    """Evaluate every box at several targets up to the cut-off, in one dynamic program.

    Returns the best plan and the boxes that may hold a better one, with their new bounds. Targets
    below the cut-off use up the batch: an infeasible one lifts the bound, a feasible one finds a
    better plan at once.
    """
    num_targets = _BATCH // len(boxes)
    floor_s = search.floors_s[[box.low for box in boxes]]
    theta_s = search.thetas[[box.high for box in boxes]]
    # The last target is the cut-off itself: a box that is infeasible there holds no better plan.
    target_s = np.linspace([box.bound_s for box in boxes], best.cutoff_s, num_targets + 1, axis=1)
    budget_s = target_s[:, 1:] - floor_s[:, None]
    sum_s, picks = _suffix_s(search, np.repeat(theta_s, num_targets), budget_s.ravel())
    sum_s = sum_s.reshape(budget_s.shape)
    open_boxes = []
    for row in np.flatnonzero(np.isfinite(sum_s[:, -1])):
        # The first feasible target gives a plan; the one before it is infeasible: a bound.
        column = int(np.argmax(np.isfinite(sum_s[row])))
        scenario = [picked[:, row * num_targets + column] for picked in picks]
        best = _better(search, best, _choices(search, scenario, budget_s[row, column]))
        # From the loosest budget: the sum under a tighter one is larger and bounds fewer plans.
        exit_s = float(sum_s[row, -1]) + search.min_delta_s
        bound_s = max(float(target_s[row, column]), float(floor_s[row]) + exit_s)
        open_boxes.append(replace(boxes[row], bound_s=bound_s, exit_s=exit_s))
    return best, open_boxes


def _better(search: _DynamicProgram, best: _Best, choices: tuple[Choice, ...]) -> _Best:
    step_s = chosen_step(search.problem, choices)
    if step_s >= best.step_s:
        return best
    return _Best(cutoff_s=min(best.cutoff_s, _faster_than(step_s)), step_s=step_s, choices=choices)


def _split(search: _DynamicProgram, box: _Box, parts: int) -> list[_Box]:
    """At most `parts` boxes that cover this one, each with the bound of its own least theta."""
    # A box with fewer thetas than parts gives the same edge twice.
    edges = np.unique(np.linspace(box.low, box.high + 1, parts + 1).astype(np.int64))
    return [
        _Box(
            bound_s=max(box.bound_s, float(search.floors_s[low]) + box.exit_s),
            exit_s=box.exit_s,
            low=int(low),
            high=int(high) - 1,
        )
        for low, high in pairwise(edges)
    ]


def _suffix_s(
    search: _DynamicProgram, theta_s: Floats, budget_s: Floats
) -> tuple[Floats, list[NDArray[np.int32]]]:
    """A_{S-1}(L) for B scenarios (theta, budget of E): seconds [B], inf where infeasible.

    Also returns which frontier was taken, for each position [states, B].
    """
    behind_s, picks = np.zeros((1, theta_s.size)), []
    for position in search.positions:
        shape = (position.num_targets, theta_s.size)
        sum_s, picked = np.full(shape, np.inf), np.zeros(shape, dtype=np.int32)
        for index, own in enumerate(position.runs()):
            source, target = position.source[own], position.target[own]
            added_s = _added_s(position.frontiers[index], behind_s[source], theta_s, budget_s)
            # Targets within one run are distinct, so plain index assignment loses no update. A tie
            # stays with the earlier frontier: the same problem gives the same plan.
            better = added_s < sum_s[target]
            sum_s[target] = np.where(better, added_s, sum_s[target])
            picked[target] = np.where(better, index, picked[target])
        behind_s = sum_s
        picks.append(picked)
    return behind_s[-1], picks


def _added_s(points: FrontierTimes, behind_s: Floats, theta_s: Floats, budget_s: Floats) -> Floats:
    """A + min { f : t <= theta, u <= e - A }, seconds; `behind_s`, A: [M, B]; the others: [B]."""
    # u <= e - A reads -u >= A - e. Where no point satisfies it, the index is that of the inf.
    point = np.searchsorted(points.negative_lone_s, behind_s - budget_s)
    fill_s = points.fill_s[point]
    # side="right", because a point with t equal to theta is allowed.
    fill_s[point >= np.searchsorted(points.stable_s, theta_s, side="right")] = np.inf
    fill_s += behind_s
    return fill_s


def _choices(
    search: _DynamicProgram, picks: Sequence[NDArray[np.int32]], budget_s: float
) -> tuple[Choice, ...]:
    """The choices of one feasible scenario, first stage first. `picks`: per position, [states]."""
    path, state = [], 0
    for position, picked in zip(reversed(search.positions), reversed(picks), strict=True):
        own = position.runs()[picked[state]]
        move = own.start + np.searchsorted(position.target[own], state)
        path.append((position.frontiers[picked[state]], int(position.cell[move])))
        state = int(position.source[move])
    choices, tail_s = [], 0.0
    for behind, (points, cell) in enumerate(reversed(path)):
        # The same sums in the same order as `_added_s`, so that rounding picks the same point.
        point = int(np.searchsorted(points.negative_lone_s, tail_s - budget_s))
        tail_s = tail_s + float(points.fill_s[point])
        stage = len(path) - 1 - behind
        choices.append(Choice(stage=stage, cell=cell, point=int(points.point[point])))
    return tuple(reversed(choices))
