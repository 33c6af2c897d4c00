"""The stages of an inter-stage problem as moves between states, last stage first.

Position q = S-1-i counts stages from the last. A state is the number of layers and the number of
units of devices in positions 0..q, flattened to layers * (N + 1) + units; N = 0, and no stage has
units, where devices play no role. A cell of `count` layers on `units` units is a move from every
state to the state with so many more of both (`_targets`); a cell that names its first layer, or the
units that it may begin at, has only the moves that end there: first layer = L - layers behind,
first unit = N - units behind. All these problems are the same from here on.

Only moves on a path from nothing to everything are kept, and states are numbered anew by position,
so that arrays over states have no holes (`linked`).
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mist.milp.problem import Cell, Floats, InterStageProblem
from mist.pareto.frontier import frontier

Indices = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrontierTimes:
    """A frontier of P points as the dynamic program reads it, seconds.

    `stable_s` [P] and `negative_lone_s` [P] ascend, for searchsorted; so does `fill_s` [P+1], whose
    end is inf and stands for "no point is good enough". `point` [P]: indices into the cell.
    """

    stable_s: Floats
    negative_lone_s: Floats
    fill_s: Floats
    point: NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Position:
    """The M moves of one stage, by rising (frontier, target).

    `source`, `target` [M]: states before and after, below `num_sources` and `num_targets`.
    `frontier` [M]: index into `frontiers`, of which no two with the same count and units are equal.
    `cell` [M]: index of the cell in the problem.
    """

    frontiers: tuple[FrontierTimes, ...]
    num_sources: int
    num_targets: int
    source: Indices
    target: Indices
    frontier: Indices
    cell: Indices

    def where(self, kept: NDArray[np.bool_]) -> "Position":
        """Only the moves `kept` [M]."""
        return replace(
            self,
            source=self.source[kept],
            target=self.target[kept],
            frontier=self.frontier[kept],
            cell=self.cell[kept],
        )

    def runs(self) -> list[slice]:
        """For each frontier, which moves are its own."""
        edges = np.searchsorted(self.frontier, np.arange(len(self.frontiers) + 1)).tolist()
        return [slice(begin, end) for begin, end in itertools.pairwise(edges)]


def positions(
    problem: InterStageProblem, tie: tuple[int, ...] | None = None
) -> tuple[Position, ...] | None:
    """The moves of each position, last stage first; None when no assignment fits together.

    `tie`: that of the cells that have one; others with one are left out.
    """
    return linked(_position(problem, stage, tie) for stage in reversed(range(problem.num_stages)))


def linked(positions: Iterable[Position]) -> tuple[Position, ...] | None:
    """The moves on a path from state 0 before the first position to the last state of the last.

    None when there is no such path. The first and the last state stay the first and the last.
    """
    # Forward drops what no path reaches, backward what leads nowhere: one pass each is enough.
    states, forward = np.zeros(1, dtype=np.int32), []
    for position in positions:
        forward.append(position.where(_marked(states, position.num_sources)[position.source]))
        states = forward[-1].target
    states, backward = np.array([forward[-1].num_targets - 1], dtype=np.int32), []
    for position in reversed(forward):
        backward.append(position.where(_marked(states, position.num_targets)[position.target]))
        states = backward[-1].source
    if not states.size:
        return None
    return tuple(_numbered(position) for position in reversed(backward))


def _marked(states: Indices, num_states: int) -> NDArray[np.bool_]:
    marks = np.zeros(num_states, dtype=np.bool_)
    marks[states] = True
    return marks


def _numbered(position: Position) -> Position:
    """With the states and the frontiers that occur as 0, 1, .. in the same order."""
    used = _marked(position.frontier, len(position.frontiers))
    # The running count of marks, less one, numbers the marked states without holes.
    before = _marked(position.source, position.num_sources).cumsum(dtype=np.int32)
    after = _marked(position.target, position.num_targets).cumsum(dtype=np.int32)
    return replace(
        position,
        frontiers=tuple(itertools.compress(position.frontiers, used)),
        num_sources=int(before[-1]),
        num_targets=int(after[-1]),
        source=before[position.source] - 1,
        target=after[position.target] - 1,
        frontier=used.cumsum(dtype=np.int32)[position.frontier] - 1,
    )


def _position(problem: InterStageProblem, stage: int, tie: tuple[int, ...] | None) -> Position:
    """Every move of a stage; of equal moves that of the earlier cell stays."""
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, cell in enumerate(problem.cells):
        if cell.stage == stage and cell.tie in (None, tie) and cell.stable_s.size:
            alike[_key(cell)].append(index)
    moves = [np.empty((4, 0), np.int32)]
    moves += [_moves(problem, key, group) for key, group in enumerate(alike.values())]
    source, target, frontier, cells = np.concatenate(moves, axis=1)
    num_states = (problem.num_layers + 1) * _width(problem)
    return Position(
        frontiers=tuple(_points(problem, problem.cells[group[0]]) for group in alike.values()),
        num_sources=num_states,
        num_targets=num_states,
        source=source,
        target=target,
        frontier=frontier,
        cell=cells,
    )


def _key(cell: Cell) -> tuple[object, ...]:
    """Equal for cells whose moves differ in nothing but the states."""
    columns = (cell.stable_s, cell.lone_s, cell.host_bytes)
    # Arrays cannot be keys of a dictionary; their bytes can, and they compare exactly.
    times = (None if column is None else column.tobytes() for column in columns)
    return (cell.count, cell.units, cell.spare_s, *times)


def _width(problem: InterStageProblem) -> int:
    return (problem.num_units or 0) + 1


def _moves(problem: InterStageProblem, frontier: int, cells: Sequence[int]) -> Indices:
    """Rows source, target, frontier and cell [4, M] of alike cells, by rising target."""
    first = problem.cells[cells[0]]
    step = first.count * _width(problem) + (0 if problem.num_units is None else first.units)
    targets = [_targets(problem, problem.cells[index]) for index in cells]
    # unique returns the index of the first occurrence: that of the earlier cell.
    target, kept = np.unique(np.concatenate(targets), return_index=True)
    moves = np.empty((4, target.size), np.int32)
    moves[0], moves[1], moves[2] = target - step, target, frontier
    moves[3] = np.repeat(cells, [states.size for states in targets])[kept]
    return moves


def _targets(problem: InterStageProblem, cell: Cell) -> NDArray[np.int64]:
    """The states behind which a stage with this cell may begin, ascending."""
    num_layers, num_units = problem.num_layers, problem.num_units
    layers = np.arange(cell.count, num_layers + 1)
    if cell.first is not None:
        layers = np.array([num_layers - cell.first])
    if num_units is None:
        return layers
    units = np.arange(cell.units, num_units + 1)
    if cell.offsets is not None:
        # Offsets count from the first unit, states from the last: descending offsets ascend here.
        units = num_units - np.array(sorted(cell.offsets, reverse=True), dtype=np.int64)
    return (layers[:, None] * _width(problem) + units).ravel()


def _points(problem: InterStageProblem, cell: Cell) -> FrontierTimes:
    """The frontier of a cell in (stable, lone): all points, where host memory makes no more."""
    point = np.arange(cell.stable_s.size)
    if cell.host_bytes is not None:
        point = frontier(cell.stable_s, cell.lone_s, cell.host_bytes, np.ones(point.size)).choice
    return FrontierTimes(
        stable_s=cell.stable_s[point],
        negative_lone_s=-cell.lone_s[point],
        fill_s=np.append(problem.fill_s(cell)[point], np.inf),
        point=point,
    )
