"""The exact non-dominated set of candidates in (stable, lone).

A candidate dominates another when it is no slower in both times and faster in one. The step time
(`mist.plans.schedules`) is monotone in both, so no dominated candidate can improve a plan, whatever
the other stages do. Of candidates with the same two times the one with the lower peak stays, then
the one with the lower index: the result does not depend on the order of evaluation. Where stages
share host memory a candidate must be no worse in the bytes that it holds there either
(`lean_frontier`).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Slopes w of the lines w * stable + lone whose lowest candidates weed out the others before the
# sort. They decide how many are sorted, never which remain.
_PIVOT_SLOPES: Final = (0.0, 0.25, 1.0, 4.0, 64.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frontier:
    """P candidates, none of which dominates another, by rising stable time.

    `stable_s` [P], seconds, strictly ascending. `lone_s` [P], seconds (stable + delta: the time of
    a lone micro-batch), strictly descending. `peak_bytes` [P]. `choice` [P]: rows of the caller's
    table of candidates. P may be 0. Raises ValueError when the shapes or the order are not these.
    """

    stable_s: NDArray[np.float64]
    lone_s: NDArray[np.float64]
    peak_bytes: NDArray[np.float64]
    choice: NDArray[np.int64]

    def __post_init__(self) -> None:
        columns = (self.stable_s, self.lone_s, self.peak_bytes, self.choice)
        if any(column.shape != (self.choice.size,) for column in columns):
            raise ValueError(f"columns of a frontier differ: {[c.shape for c in columns]}")
        if not (np.all(np.diff(self.stable_s) > 0) and np.all(np.diff(self.lone_s) < 0)):
            raise ValueError("a frontier must rise in stable_s and fall in lone_s")

    def __len__(self) -> int:
        return int(self.choice.size)


def frontier(
    stable_s: ArrayLike, lone_s: ArrayLike, peak_bytes: ArrayLike, feasible: ArrayLike
) -> Frontier:
    """The non-dominated ones among the feasible candidates.

    `stable_s`, `lone_s` (seconds), `peak_bytes`, `feasible` (bool): shape [N]. What is not feasible
    is not looked at. `choice` of the result holds indices into the N. Raises ValueError when a
    feasible candidate has a time that is not finite.
    """
    choice = np.flatnonzero(np.asarray(feasible, dtype=np.bool_))
    stable, lone, peak = (
        np.asarray(column, dtype=np.float64)[choice] for column in (stable_s, lone_s, peak_bytes)
    )
    return _select(stable, lone, peak, choice)


def lean_frontier(
    stable_s: NDArray[np.float64],
    lone_s: NDArray[np.float64],
    host_bytes: NDArray[np.float64],
    feasible: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """The feasible candidates that none beats in (stable, lone, host bytes), in that order.

    Columns [N], seconds and bytes; the result holds indices into the N. Of equals the first stays.
    """
    left = np.flatnonzero(feasible)
    left = left[np.lexsort((left, host_bytes[left], lone_s[left], stable_s[left]))]
    kept = []
    while left.size:  # the first cannot be beaten by what is behind it
        kept.append(left[0])
        leaner = (lone_s[left] < lone_s[left[0]]) | (host_bytes[left] < host_bytes[left[0]])
        left = left[leaner]
    return np.array(kept, dtype=np.int64)


def _select(
    stable_s: NDArray[np.float64],
    lone_s: NDArray[np.float64],
    peak_bytes: NDArray[np.float64],
    choice: NDArray[np.int64],
) -> Frontier:
    """Sort by (stable, lone, peak, choice); keep what lowers the running minimum of lone."""
    if not (np.isfinite(stable_s).all() and np.isfinite(lone_s).all()):
        raise ValueError("a feasible candidate has a time that is not finite")
    kept = _weed(stable_s, lone_s)
    # lexsort sorts by its last key first; peak and index only break ties between equal times.
    kept = kept[np.lexsort((choice[kept], peak_bytes[kept], lone_s[kept], stable_s[kept]))]
    # Every earlier point has a stable time at least as short: one whose lone time is not below all
    # of theirs is dominated.
    before_s = np.minimum.accumulate(np.concatenate(([np.inf], lone_s[kept])))[:-1]
    kept = kept[lone_s[kept] < before_s]
    return Frontier(
        stable_s=stable_s[kept],
        lone_s=lone_s[kept],
        peak_bytes=peak_bytes[kept],
        choice=choice[kept].astype(np.int64),
    )


def _weed(stable_s: NDArray[np.float64], lone_s: NDArray[np.float64]) -> NDArray[np.intp]:
    """Indices of the candidates that no pivot dominates; equals of a pivot stay."""
    kept = np.arange(stable_s.size)
    for slope in _PIVOT_SLOPES if kept.size else ():
        stable, lone = stable_s[kept], lone_s[kept]
        pivot = np.argmin(slope * stable + lone)
        less = (stable < stable[pivot]) | (lone < lone[pivot])
        equal = (stable == stable[pivot]) & (lone == lone[pivot])
        kept = kept[less | equal]
    return kept
