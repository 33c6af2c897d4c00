"""Even pipelines: one strategy for all stages, layers split so that the worst stage is best.

For every strategy at once, over stages i and layer boundaries x:

    best[0, 0] = -inf
    best[i + 1, x] = min over ranges r that end at x of max(best[i, first_r], value[i, r])

With value = stable time this is the layout a person would write down: an upper bound for the search
and the pool of alternatives. With value = peak bytes it tells how close to fitting a model comes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mist.pareto.table import Floats, StageTable

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Placed:
    """Layer ranges at every place, ordered by end; `row` is the table's range that prices each."""

    first: Ints
    end: Ints
    row: Ints
    num_layers: int


def even_split(table: StageTable, value: Floats) -> Ints:
    """The range of every stage under each strategy, shape [K, S]; a row of -1 where there is none.

    `value` [K, S, R], infinite where not allowed: its maximum over the stages is made least.
    """
    placed = _placed(table)
    starts = np.flatnonzero(np.diff(placed.end, prepend=-1))
    num_strategies, num_stages, _ = value.shape
    best = np.full((num_stages + 1, num_strategies, placed.num_layers + 1), np.inf)
    best[0, :, 0] = -np.inf
    for i in range(num_stages):
        worst = np.maximum(best[i][:, placed.first], value[:, i, placed.row])
        best[i + 1][:, placed.end[starts]] = np.minimum.reduceat(worst, starts, axis=1)
    chosen = np.full((num_strategies, num_stages), -1)
    for k in np.flatnonzero(np.isfinite(best[-1, :, -1])):
        chosen[k] = _backtrack(placed, best[:, k], value[k])
    return chosen


def _placed(table: StageTable) -> _Placed:
    """Ranges in place: as they are, or every shift of them where all layers are alike."""
    num_layers = int(table.count.max()) + table.group.num_stages - 1
    first, count, row = table.first, table.count, np.arange(len(table.count))
    if table.alike:
        shifts = np.arange(num_layers)
        grid = np.meshgrid(shifts, row, indexing="ij")
        first, row = (axis.ravel() for axis in grid)
        count = table.count[row]
    inside = np.flatnonzero(first + count <= num_layers)
    order = inside[np.argsort((first + count)[inside], kind="stable")]
    return _Placed(
        first=first[order], end=(first + count)[order], row=row[order], num_layers=num_layers
    )


def _backtrack(placed: _Placed, best: Floats, value: Floats) -> Ints:
    """The ranges behind best[S, L]: `best` [S + 1, L + 1] and `value` [S, R] of one strategy."""
    num_stages, boundary = len(value), placed.num_layers
    rows = np.empty(num_stages, dtype=np.int64)
    for i in reversed(range(num_stages)):
        ending = np.flatnonzero(placed.end == boundary)
        worst = np.maximum(best[i][placed.first[ending]], value[i, placed.row[ending]])
        pick = ending[np.argmin(worst)]
        rows[i], boundary = placed.row[pick], placed.first[pick]
    return rows
