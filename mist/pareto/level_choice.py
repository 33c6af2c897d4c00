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
_WORKING: Final = ("running_bytes", "adding_bytes", "working_bytes")


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
    useful = dict(allowed)
    beating = [level for level in allowed if level in CONVERTS]
    for level in reversed(tuple(allowed)):
        for other in beating:
            if other is not level:
                beaten = _beats(strategies, other, level, num_kinds)
                if level is KEEPS_ALL and num_kinds == 1:
                    beaten = beaten | _beats_all_kept(strategies, other, allowed)
                beaten = beaten & _in_order(strategies, other, level, useful, num_kinds)
                # Of two that beat each other the first stays, which is looked at last.
                useful[level] = useful[level] & ~(beaten & useful[other])
    return useful


def _in_order(
    strategies: Strategies,
    level: MemoryLevel,
    beaten: MemoryLevel,
    useful: LevelRows,
    num_kinds: int,
) -> NDArray[np.bool_]:
    """Where useful levels before one in the table keep as much at least, those behind no more."""
    table = list(useful)
    in_order = np.ones(len(strategies), dtype=np.bool_)
    for other in table:
        if other in {level, beaten}:
            continue
        first, last = sorted((level, other), key=table.index)
        for kind in range(num_kinds):
            most, least = (
                strategies.terms[f"term_{kind}_{each.column}_kept_bytes"] for each in (first, last)
            )
            in_order &= (most >= least) | ~useful[other]
    return in_order


def _beats(
    strategies: Strategies, level: MemoryLevel, other: MemoryLevel, num_kinds: int
) -> NDArray[np.bool_]:
    """Condition (1), [K]."""
    better = np.ones(len(strategies), dtype=np.bool_)
    for kind in range(num_kinds):
        prefix = f"term_{kind}_{other.column}_"
        for name in strategies.terms:
            if name.startswith(prefix):
                ours = f"term_{kind}_{level.column}_{name.removeprefix(prefix)}"
                better &= strategies.terms[ours] <= strategies.terms[name]
    return better


def _beats_all_kept(
    strategies: Strategies, level: MemoryLevel, levels: Sequence[MemoryLevel] | LevelRows
) -> NDArray[np.bool_]:
    """Condition (2), [K], of a level against the one that keeps everything."""

    def term(name: str, of: MemoryLevel) -> Floats:
        return strategies.terms[f"term_0_{of.column}_{name}"]

    kept, all_kept = term("kept_bytes", level), term("kept_bytes", KEEPS_ALL)
    better = kept <= all_kept
    for between in levels:
        if between is not KEEPS_ALL:
            better &= term("kept_bytes", between) <= kept
    for name in _TIMES:
        better &= term(name, level) <= term(name, KEEPS_ALL)
    for name in _WORKING:
        if f"term_0_{level.column}_{name}" in strategies.terms:
            better &= kept + term(name, level) <= all_kept + term(name, KEEPS_ALL)
    return better
