"""Even pipelines: one strategy for all stages, layers split so that the worst stage is best.

For every strategy at once, over stages i and layer boundaries x:

    best[0, 0] = -inf
    best[i + 1, x] = min over ranges r that end at x of max(best[i, first_r], value[i, r])

With value = stable time this is the layout a person would write down: an upper bound for the search
and the pool of alternatives. With value = peak bytes it tells how close to fitting a model comes.
"""

from dataclasses import dataclass

import numpy as np

from mist.pareto.layer_ranges import Ranges
from mist.pareto.strategies import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Placed:
    """Layer ranges at every place, ordered by end; `row` is the range that prices each."""

    first: Ints
    end: Ints
    row: Ints


def even_split(ranges: Ranges, num_layers: int, value: Floats) -> Ints:
    """The range of every stage under each strategy, shape [K, S]; a row of -1 where there is none.

    `value` [K, S, R], infinite where not allowed: its maximum over the stages is made least.
    """
    num_strategies, num_stages, _ = value.shape
    placed = _placed(ranges, num_layers)
    # Ranges are ordered by their end, so reduceat takes one minimum for each boundary.
    starts = np.flatnonzero(np.diff(placed.end, prepend=-1))
    best = np.full((num_stages + 1, num_strategies, num_layers + 1), np.inf)
    best[0, :, 0] = -np.inf
    for i in range(num_stages):
        worst = np.maximum(best[i][:, placed.first], value[:, i, placed.row])
        best[i + 1][:, placed.end[starts]] = np.minimum.reduceat(worst, starts, axis=1)
    chosen = np.full((num_strategies, num_stages), -1)
    for k in np.flatnonzero(np.isfinite(best[-1, :, -1])):
        chosen[k] = _backtrack(placed, best[:, k], value[k])
    return chosen


def _placed(ranges: Ranges, num_layers: int) -> _Placed:
    """Ranges in place: as they are, or every shift of them where all layers are alike."""
    first, count, row = ranges.first, ranges.count, np.arange(len(ranges))
    if ranges.alike:
        grid = np.meshgrid(np.arange(num_layers), row, indexing="ij")
        first, row = (axis.ravel() for axis in grid)
        count = ranges.count[row]
    inside = np.flatnonzero(first + count <= num_layers)
    order = inside[np.argsort((first + count)[inside], kind="stable")]
    return _Placed(first=first[order], end=(first + count)[order], row=row[order])


def _backtrack(placed: _Placed, best: Floats, value: Floats) -> Ints:
    """The ranges behind best[S, L]: `best` [S + 1, L + 1] and `value` [S, R] of one strategy."""
    num_stages, boundary = len(value), best.shape[1] - 1
    rows = np.empty(num_stages, dtype=np.int64)
    for i in reversed(range(num_stages)):
        ending = np.flatnonzero(placed.end == boundary)
        worst = np.maximum(best[i][placed.first[ending]], value[i, placed.row[ending]])
        pick = ending[np.argmin(worst)]
        rows[i], boundary = placed.row[pick], placed.first[pick]
    return rows
