"""Levels that another one beats, of strategies whose terms are written down here."""

from collections.abc import Mapping

import numpy as np
import pytest

from mist.pareto.level_choice import (
    allowed_levels,
    fastest_levels,
    fastest_s,
    useful_levels,
)
from mist.pareto.strategies import Strategies
from mist.plans.search_space import OFFLOADED
from mist.plans.workload import MemoryLevel, ScheduleKind

NONE, DROP_ACTIVATION, DROP_NORM = (
    MemoryLevel(w) for w in ("none", "drop-activation", "drop-norm")
)
SELECTIVE, FULL = (MemoryLevel(w) for w in ("selective", "full"))
LEVELS = (NONE, DROP_ACTIVATION, DROP_NORM, SELECTIVE, FULL)
DEFAULT = ScheduleKind.ONE_F_ONE_B

# Seconds, bytes kept, working set of a layer: the exact steps keep less and cost next to nothing.
LADDER = {
    NONE: (10.0, 100.0, 20.0),
    DROP_ACTIVATION: (9.0, 60.0, 50.0),
    DROP_NORM: (9.5, 50.0, 50.0),
    SELECTIVE: (12.0, 55.0, 60.0),
    FULL: (14.0, 5.0, 110.0),
}


def strategies(ladder: Mapping[MemoryLevel, tuple[float, float, float]] = LADDER) -> Strategies:
    """Three: plain, divided by tensor parallelism, with offloaded activations."""
    terms = {}
    for level, (seconds, kept, working) in ladder.items():
        prefix = f"term_0_{level.column}"
        for name in ("stable_s", "lone_s"):
            terms[f"{prefix}_{name}"] = np.full(3, seconds)
        terms[f"{prefix}_kept_bytes"] = np.full(3, kept)
        terms[f"{prefix}_running_bytes"] = np.full(3, working)
    columns = dict.fromkeys(OFFLOADED, np.zeros(3)) | {"activations": np.array([0, 0, 0.5])}
    return Strategies(columns={**columns, "tp": np.array([1, 2, 1])}, terms=terms)


def useful(found: Strategies, kind: ScheduleKind = DEFAULT) -> list[list[MemoryLevel]]:
    """Of each strategy."""
    rows = useful_levels(found, allowed_levels(found, LEVELS, kind), 1)
    return [[level for level in LEVELS if rows[level][k]] for k in range(3)]


def test_only_levels_that_none_beats_are_useful() -> None:
    assert useful(strategies()) == [
        [DROP_ACTIVATION, DROP_NORM, FULL],
        [NONE, SELECTIVE, FULL],
        [NONE, FULL],
    ]


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({SELECTIVE: (9.4, 55.0, 60.0)}, {SELECTIVE}),  # faster than the smaller one
        ({SELECTIVE: (12.0, 49.0, 60.0)}, {SELECTIVE}),  # smaller
        ({SELECTIVE: (12.0, 55.0, 49.0)}, {SELECTIVE}),  # works in less
        ({NONE: (8.9, 100.0, 20.0)}, {NONE}),
        ({DROP_ACTIVATION: (9.0, 60.0, 61.0)}, {NONE}),  # a layer moved frees 40 and works in 41
        # Out of the table's order, which says what is gone as a level runs: nothing is ruled out.
        ({DROP_ACTIVATION: (9.0, 49.0, 50.0)}, {NONE, SELECTIVE}),
    ],
)
def test_a_level_that_is_best_in_anything_is_useful(
    changed: Mapping[MemoryLevel, tuple[float, float, float]], kept: set[MemoryLevel]
) -> None:
    (found, *_) = useful(strategies({**LADDER, **changed}))
    assert set(found) & {NONE, SELECTIVE} == kept


def test_of_equals_the_first_is_useful() -> None:
    same = {**LADDER, DROP_NORM: LADDER[DROP_ACTIVATION]}
    assert useful(strategies(same))[0] == [DROP_ACTIVATION, SELECTIVE, FULL]


def test_seconds_are_those_of_the_fastest_level_allowed() -> None:
    found = strategies()
    allowed = allowed_levels(found, LEVELS, DEFAULT)
    assert fastest_s(found, allowed, 0, "stable_s").tolist() == [9.0, 10.0, 10.0]
    fastest = fastest_levels(found, allowed, 1)
    assert fastest[DROP_ACTIVATION].tolist() == [True, False, False]
    assert fastest[NONE].tolist() == [False, True, True]


def test_split_backward_passes_convert_nothing() -> None:
    assert useful(strategies(), ScheduleKind.ZERO_BUBBLE)[0] == [NONE]
