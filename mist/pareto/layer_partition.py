"""Even pipelines: one strategy for all stages, layers split so that the worst stage is best.

For every strategy at once, over stages i and layer boundaries x:

    best[0, 0] = -inf
    best[i + 1, x] = min over ranges r that end at x of max(best[i, first_r], value[i, r])

With value = stable time this is the layout a person would write down: an upper bound for the search
and the pool of alternatives. With value = peak bytes it tells how close to fitting a model comes.
With a sum in the place of the maximum it is the least of what the stages need together.
"""

from dataclasses import dataclass

import numpy as np

from mist.pareto.layer_ranges import Ranges
from mist.pareto.strategies import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Placed:
    """Layer ranges at every place, ordered by end; `row` is the range that prices each.

    `starts`: where the ranges of each end begin.
    """

    first: Ints
    end: Ints
    row: Ints
    starts: Ints

    def ending(self, num_layers: int) -> Ints:
        """The ranges that end at each boundary, [L + 1, most]; -1 behind the last of them."""
        counts = np.diff(self.starts, append=len(self.end))
        table = np.full((num_layers + 1, counts.max(initial=0)), -1)
        table[self.end, np.arange(len(self.end)) - np.repeat(self.starts, counts)] = np.arange(
            len(self.end)
        )
        return table


def even_split(ranges: Ranges, num_layers: int, value: Floats) -> Ints:
    """The range of every stage under each strategy, shape [K, S]; a row of -1 where there is none.

    `value` [K, S, R], infinite where not allowed: its maximum over the stages is made least.
    """
    num_strategies, num_stages, _ = value.shape
    placed = _placed(ranges, num_layers)
    best = np.full((num_stages + 1, num_strategies, num_layers + 1), np.inf)
    best[0, :, 0] = -np.inf
    for i in range(num_stages):
        worst = np.maximum(best[i][:, placed.first], value[:, i, placed.row])
        # Ranges are ordered by their end, so reduceat takes one minimum for each boundary.
        least = np.minimum.reduceat(worst, placed.starts, axis=1)
        best[i + 1][:, placed.end[placed.starts]] = least
    chosen = np.full((num_strategies, num_stages), -1)
    possible = np.isfinite(best[-1, :, -1])
    chosen[possible] = _backtrack(placed, best[:, possible], value[possible])
    return chosen


def least_sum(ranges: Ranges, num_layers: int, value: Floats) -> float:
    """The least sum of `value` [S, R] over the stages of any split of the layers; inf for none."""
    placed = _placed(ranges, num_layers)
    best = np.full(num_layers + 1, np.inf)
    best[0] = 0.0
    for own in value if len(placed.end) else ():
        total = best[placed.first] + own[placed.row]
        best = np.full(num_layers + 1, np.inf)
        best[placed.end[placed.starts]] = np.minimum.reduceat(total, placed.starts)
    return float(best[-1])


def _placed(ranges: Ranges, num_layers: int) -> _Placed:
    """Ranges in place: as they are, or every shift of them where all layers are alike."""
    first, count, row = ranges.first, ranges.count, np.arange(len(ranges))
    if ranges.alike:
        grid = np.meshgrid(np.arange(num_layers), row, indexing="ij")
        first, row = (axis.ravel() for axis in grid)
        count = ranges.count[row]
    inside = np.flatnonzero(first + count <= num_layers)
    order = inside[np.argsort((first + count)[inside], kind="stable")]
    end = (first + count)[order]
    starts = np.flatnonzero(np.diff(end, prepend=-1))
    return _Placed(first=first[order], end=end, row=row[order], starts=starts)


def _backtrack(placed: _Placed, best: Floats, value: Floats) -> Ints:
    """The ranges behind best[S, :, L], [K, S]: `best` [S + 1, K, L + 1], `value` [K, S, R]."""
    num_strategies, num_stages, _ = value.shape
    num_layers = best.shape[2] - 1
    ending, each = placed.ending(num_layers), np.arange(num_strategies)
    boundary = np.full(num_strategies, num_layers)
    rows = np.empty((num_strategies, num_stages), dtype=np.int64)
    for i in reversed(range(num_stages)):
        own = ending[boundary]
        before, after = best[i][each[:, None], placed.first[own]], value[each, i]
        worst = np.maximum(before, after[each[:, None], placed.row[own]])
        worst[own < 0] = np.inf
        pick = own[each, worst.argmin(axis=1)]
        rows[:, i], boundary = placed.row[pick], placed.first[pick]
    return rows
