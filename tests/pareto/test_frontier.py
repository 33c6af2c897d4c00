"""Frontiers against the definition of dominance, candidate by candidate."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.pareto.frontier import Frontier, frontier, lean_frontier

# Few distinct values, so that ties in one time, in both, and in the peak are common.
TIMES = st.integers(0, 6).map(float)
CANDIDATES = st.lists(st.tuples(TIMES, TIMES, st.integers(1, 3).map(float), st.booleans()))


def of(candidates: list[tuple[float, float, float, bool]]) -> Frontier:
    stable, lone, peak, feasible = np.array(candidates, dtype=np.float64).reshape(-1, 4).T
    return frontier(stable, lone, peak, feasible.astype(bool))


def rows(found: Frontier) -> list[tuple[float, float, float, int]]:
    columns = (found.stable_s, found.lone_s, found.peak_bytes, found.choice)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def by_definition(
    candidates: list[tuple[float, float, float, bool]],
) -> list[tuple[float, float, float, int]]:
    """Candidates that none beats: lower in one time and no higher in the other, or equal in both
    and lower in (peak, index)."""
    feasible = [(t, u, m, i) for i, (t, u, m, ok) in enumerate(candidates) if ok]

    def beats(a: tuple[float, float, float, int], b: tuple[float, float, float, int]) -> bool:
        if a[:2] == b[:2]:
            return a[2:] < b[2:]
        return a[0] <= b[0] and a[1] <= b[1]

    return sorted(x for x in feasible if not any(beats(y, x) for y in feasible))


@given(CANDIDATES)
def test_equals_the_definition(candidates: list[tuple[float, float, float, bool]]) -> None:
    assert rows(of(candidates)) == by_definition(candidates)


@given(CANDIDATES)
def test_lean_ones_equal_the_definition(
    candidates: list[tuple[float, float, float, bool]],
) -> None:
    """The third column counts as bytes in host memory: none may be lower in one and not higher."""
    stable, lone, host, feasible = np.array(candidates, dtype=np.float64).reshape(-1, 4).T
    rows = [(*row[:3], i) for i, row in enumerate(candidates) if row[3]]
    want = sorted(
        a
        for a in rows
        if not any(
            all(x <= y for x, y in zip(b[:3], a[:3], strict=True))
            and (b[:3] != a[:3] or b[3] < a[3])
            for b in rows
        )
    )
    found = lean_frontier(stable, lone, host, feasible.astype(bool))
    assert found.tolist() == [index for *_, index in want]


@given(CANDIDATES)
def test_is_non_dominated_and_covers_every_feasible_candidate(
    candidates: list[tuple[float, float, float, bool]],
) -> None:
    kept = rows(of(candidates))
    for a, b in itertools.permutations(kept, 2):
        assert not (a[0] <= b[0] and a[1] <= b[1])
    for stable, lone, _, feasible in candidates:
        assert not feasible or any(k[0] <= stable and k[1] <= lone for k in kept)


@given(CANDIDATES, st.randoms(use_true_random=False))
def test_does_not_depend_on_the_order(candidates: list, random) -> None:  # noqa: ANN001
    shuffled = list(candidates)
    random.shuffle(shuffled)
    # The choice is an index, so it moves with the order; what it stands for does not.
    assert [row[:3] for row in rows(of(shuffled))] == [row[:3] for row in rows(of(candidates))]


@given(CANDIDATES, st.integers(0, 20))
def test_what_a_part_drops_the_whole_drops_too(candidates: list, cut: int) -> None:
    feasible = np.array([ok for *_, ok in candidates], dtype=bool)
    index = np.arange(len(candidates))
    stable, lone, peak = np.array(candidates, dtype=np.float64).reshape(-1, 4).T[:3]
    parts = [frontier(stable, lone, peak, feasible & side) for side in (index < cut, index >= cut)]
    left = np.isin(index, np.concatenate([part.choice for part in parts]))
    assert rows(frontier(stable, lone, peak, left)) == rows(of(candidates))


def test_large_random_sets_equal_a_sort_and_scan() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 10, 10_000):
        stable, delta = rng.uniform(1, 2, size), rng.normal(0, 0.3, size)
        found = frontier(stable, stable + delta, np.ones(size), np.ones(size, dtype=bool))
        expected, least = [], np.inf
        for index in np.argsort(stable):
            if stable[index] + delta[index] < least:
                expected.append(index)
                least = stable[index] + delta[index]
        assert found.choice.tolist() == expected


def test_middle_point_above_the_convex_hull_is_kept() -> None:
    # (4.9, 10.4) lies above the line from (3, 13) to (7, 7), where a weighted sum would not see it.
    found = frontier([3.0, 4.9, 7.0], [13.0, 10.4, 7.0], [1.0] * 3, [True] * 3)
    assert found.choice.tolist() == [0, 1, 2]


def test_nothing_feasible_is_an_empty_frontier() -> None:
    assert len(frontier([1.0, np.inf], [1.0, np.nan], [1.0, 1.0], [False, False])) == 0
    assert len(of([])) == 0


def test_infeasible_candidates_may_hold_anything() -> None:
    found = frontier([2.0, np.nan, 0.0], [2.0, 0.0, 0.0], [1.0] * 3, [True, False, False])
    assert rows(found) == [(2.0, 2.0, 1.0, 0)]


def test_a_feasible_candidate_must_have_finite_times() -> None:
    with pytest.raises(ValueError, match="a feasible candidate has a time that is not finite"):
        frontier([1.0, np.nan], [1.0, 1.0], [1.0, 1.0], [True, True])


@pytest.mark.parametrize(
    ("stable", "lone", "message"),
    [
        ([1.0, 2.0], [1.0, 1.0], "a frontier must rise in stable_s and fall in lone_s"),
        ([2.0, 1.0], [2.0, 1.0], "a frontier must rise in stable_s and fall in lone_s"),
        ([1.0], [1.0, 0.5], "columns of a frontier differ"),
    ],
)
def test_an_illegal_frontier_does_not_construct(
    stable: list[float], lone: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Frontier(
            stable_s=np.array(stable),
            lone_s=np.array(lone),
            peak_bytes=np.ones(2),
            choice=np.arange(2),
        )
