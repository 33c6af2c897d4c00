"""Which memory levels a strategy's layers may have, which of them are worth a look, how fast.

Levels that convert layers may be faster than keeping everything, and keep less: then others cannot
be part of a best plan. A stage with layers at B, moved to A, is no slower and no larger if

    every time and all bytes of A are at most those of B                                     (1)

B = keep everything, one kind of layer: what lives as a backward pass begins, or ends, is n f k + w
with n layers that keep k each for f micro-batches, and the working set w of the worst layer, k
included once as it ends. If no other level keeps an amount between, it is enough that

    times of A <= times of B,  k_A <= k_B,  k_A + w_A <= k_B + w_B                           (2)

since each layer moved frees k_B - k_A at least once.

Both hold where levels that come first in the table keep most: what those of a stage free before the
next level runs (`mist.symbolic.stage_memory`) is then no less at A. Strategies at which another
useful level is out of that order keep both levels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.pareto.strategies import Floats, Strategies
from mist.plans.memory_levels import CONVERTS, KEEPS_ALL
from mist.plans.workload import MemoryLevel, ScheduleKind
from mist.rules.levels import may_have
from mist.rules.rule import Columns

LevelRows = Mapping[MemoryLevel, NDArray[np.bool_]]
"""Strategies [K] by level."""

_TIMES: Final = ("stable_s", "lone_s")
SOME_HAVE: Final = "forward_bytes"  # where a block has no such term it is 0
_WORKING: Final = ("running_bytes", "adding_bytes", "working_bytes", SOME_HAVE)


def allowed_levels(
    strategies: Strategies, levels: Sequence[MemoryLevel], schedule: ScheduleKind
) -> LevelRows:
    """Which strategies [K] may have layers at each level."""
    # Rules look at few numbers, which groups share; to ask them takes longer than to look up.
    columns = (strategies[name].astype(np.float64).tobytes() for name in ("activations", "tp"))
    return dict(zip(levels, _allowed(tuple(levels), schedule, *columns), strict=True))


@lru_cache(maxsize=1024)
def _allowed(
    levels: tuple[MemoryLevel, ...], schedule: ScheduleKind, activations: bytes, tp: bytes
) -> NDArray[np.bool_]:
    """The same of columns as bytes, [L, K]."""
    columns: Columns = {
        "activations": np.frombuffer(activations),
        "tp": np.frombuffer(tp),
        "schedule": schedule.value,
    }
    allowed = may_have(np.array(levels, dtype=np.str_)[:, None], columns)
    return np.broadcast_to(allowed, (len(levels), len(np.frombuffer(tp))))


def fastest_s(strategies: Strategies, allowed: LevelRows, kind: int, name: str) -> Floats:
    """Seconds `name` of a layer of a kind at the fastest level of each strategy, [K]."""
    # Where none is allowed there is no stage, and any bound of it holds.
    some = np.logical_or.reduce([*allowed.values()])
    found = np.where(some, np.inf, strategies.terms[f"term_{kind}_{KEEPS_ALL}_{name}"])
    for level, rows in allowed.items():
        seconds = strategies.terms[f"term_{kind}_{level.column}_{name}"]
        found = np.where(rows, np.minimum(found, seconds), found)
    return found


def fastest_levels(strategies: Strategies, allowed: LevelRows, num_kinds: int) -> LevelRows:
    """Which strategies [K] no other level makes faster than this one, in any time.

    Of those that convert nothing the first, which repeats least, stands for all.
    """
    levels = [level for i, level in enumerate(allowed) if i == 0 or level in CONVERTS]
    names = [(kind, name) for kind in range(num_kinds) for name in _TIMES]
    fastest = {}
    for level in levels:
        rows = allowed[level]
        for other in levels:
            slower = [
                strategies.terms[f"term_{kind}_{level.column}_{name}"]
                > strategies.terms[f"term_{kind}_{other.column}_{name}"]
                for kind, name in names
            ]
            rows = rows & ~(allowed[other] & np.logical_or.reduce(slower))
        fastest[level] = rows
    return fastest


def useful_levels(strategies: Strategies, allowed: LevelRows, num_kinds: int) -> LevelRows:
    """The allowed levels without those that another one beats for a strategy."""
    levels = tuple(allowed)
    beating = [index for index, level in enumerate(levels) if level in CONVERTS]
    if not beating:
        return allowed
    costs = _Costs.of(strategies, levels, num_kinds)
    useful = np.array([*allowed.values()])
    beaten = {index: costs.beaten_by(index) for index in beating}
    if KEEPS_ALL in allowed and num_kinds == 1:
        for index in beating:
            beaten[index][levels.index(KEEPS_ALL)] |= costs.beats_all_kept(index)
    in_order = {index: costs.in_order(index) for index in beating}
    for index in reversed(range(len(levels))):
        for other in beating:
            if other != index:
                rest = [i for i in range(len(levels)) if i not in {index, other}]
                ordered = (in_order[other][rest] | ~useful[rest]).all(axis=0)
                # Of two that beat each other the first stays, which is looked at last.
                useful[index] &= ~(beaten[other][index] & ordered & useful[other])
    return dict(zip(levels, useful, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Costs:
    """What a layer costs: `values` [L, Q, C, K] by level, kind, cost and strategy.

    One table, as numpy's calls take the time; `names` [C].
    """

    levels: tuple[MemoryLevel, ...]
    names: tuple[str, ...]
    values: Floats

    @classmethod
    def of(
        cls, strategies: Strategies, levels: tuple[MemoryLevel, ...], num_kinds: int
    ) -> "_Costs":
        first = f"term_0_{levels[0].column}_"
        names = [name.removeprefix(first) for name in strategies.terms if name.startswith(first)]
        rows = [f"term_{kind}_{level.column}" for level in levels for kind in range(num_kinds)]
        if any(f"{row}_{SOME_HAVE}" in strategies.terms for row in rows):
            names = [*dict.fromkeys([*names, SOME_HAVE])]
        none = np.zeros(len(strategies))
        values = [strategies.terms.get(f"{row}_{name}", none) for row in rows for name in names]
        shape = (len(levels), num_kinds, len(names), len(strategies))
        return cls(levels=levels, names=tuple(names), values=np.array(values).reshape(shape))

    def beaten_by(self, level: int) -> NDArray[np.bool_]:
        """Levels that meet condition (1) as B, with this one as A, [L, K]."""
        return np.asarray((self.values[level] <= self.values).all(axis=(1, 2)))

    def beats_all_kept(self, level: int) -> NDArray[np.bool_]:
        """Condition (2), [K], of a level against the one that keeps everything."""
        all_kept = self.levels.index(KEEPS_ALL)
        kept = self.values[:, 0, self.names.index("kept_bytes")]
        least = np.delete(kept, all_kept, axis=0) <= kept[level]
        better = least.all(axis=0) & (kept[level] <= kept[all_kept])
        for index, name in enumerate(self.names):
            own, its = self.values[[level, all_kept], 0, index]
            if name in _TIMES:
                better &= own <= its
            elif name in _WORKING:
                better &= kept[level] + own <= kept[all_kept] + its
        return np.asarray(better)

    def in_order(self, level: int) -> NDArray[np.bool_]:
        """Levels before one that keep as much at least, those behind it no more, [L, K]."""
        kept = self.values[:, :, self.names.index("kept_bytes")]
        before = np.arange(len(self.levels))[:, None, None] < level
        in_order = np.where(before, kept >= kept[level], kept <= kept[level]).all(axis=1)
        return np.asarray(in_order)
