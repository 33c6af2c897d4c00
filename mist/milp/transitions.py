"""The stages of an inter-stage problem as moves on the number of layers behind, last stage first.

Position q = S-1-i counts stages from the last. A state lam is the number of layers in positions
0..q, so a cell of `count` layers moves lam - count to lam; a cell that names its first layer has
the one move that ends at lam = L - first. Both kinds of problem are the same from here on.
Only moves on a path from 0 to L layers are kept. `_moves` lists them, `_reachable` filters them.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mist.milp.problem import Cell, InterStageProblem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moves:
    """The moves of one position that share one frontier of P points and one layer count.

    `stable_s` [P] and `negative_lone_s` [P] ascend, for searchsorted; so does `fill_s` [P+1], whose
    end is inf and stands for "no point is good enough". `source`, `target`, `cell` [M]: states
    before and after, by rising target, and the index of the cell in the problem.
    """

    stable_s: NDArray[np.float64]
    negative_lone_s: NDArray[np.float64]
    fill_s: NDArray[np.float64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    cell: NDArray[np.int64]


def positions(problem: InterStageProblem) -> tuple[tuple[Moves, ...], ...] | None:
    """The moves of each position, last stage first; None when no assignment covers the layers."""
    moves = [_moves(problem, stage) for stage in reversed(range(problem.num_stages))]
    kept = _reachable(problem.num_layers, moves)
    if not all(kept):
        return None
    return tuple(tuple(_grouped(problem, position)) for position in kept)


# A move: (source state, target state, index of the cell).
_Move = tuple[int, int, int]


def _moves(problem: InterStageProblem, stage: int) -> list[_Move]:
    """Every move of a stage whose cells have a point."""
    cells = ((index, c) for index, c in enumerate(problem.cells) if c.stage == stage)
    return [
        (target - cell.count, target, index)
        for index, cell in cells
        if cell.stable_s.size
        for target in _targets(cell, problem.num_layers)
    ]


def _targets(cell: Cell, num_layers: int) -> range:
    """Numbers of layers from the first of the cell's layers to the end of the model."""
    if cell.first is None:
        return range(cell.count, num_layers + 1)
    return range(num_layers - cell.first, num_layers - cell.first + 1)


def _reachable(num_layers: int, moves: list[list[_Move]]) -> list[list[_Move]]:
    """The moves that lie on a path from 0 layers before position 0 to all layers after the last."""
    states, forward = {0}, []
    for position in moves:
        forward.append([move for move in position if move[0] in states])
        states = {target for _, target, _ in forward[-1]}
    states, backward = {num_layers}, []
    for position in reversed(forward):
        backward.append([move for move in position if move[1] in states])
        states = {source for source, _, _ in backward[-1]}
    return backward[::-1]


def _grouped(problem: InterStageProblem, moves: list[_Move]) -> list[Moves]:
    """One Moves per distinct count, frontier and spare; of equal moves the earlier cell stays."""
    groups: defaultdict[tuple[object, ...], dict[int, _Move]] = defaultdict(dict)
    for move in moves:
        cell = problem.cells[move[2]]
        key = (cell.count, cell.stable_s.tobytes(), cell.lone_s.tobytes(), cell.spare_s)
        groups[key].setdefault(move[1], move)
    return [_joined(problem, sorted(group.values())) for group in groups.values()]


def _joined(problem: InterStageProblem, moves: list[_Move]) -> Moves:
    source, target, cells = np.array(moves, dtype=np.int64).T
    cell = problem.cells[moves[0][2]]
    return Moves(
        stable_s=cell.stable_s,
        negative_lone_s=-cell.lone_s,
        fill_s=np.append(problem.fill_s(cell), np.inf),
        source=source,
        target=target,
        cell=cells,
    )
