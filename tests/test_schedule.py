"""The step time against Mist's own form of it, and against numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.schedule import step_time


def paper_form(num_micro_batches: int, stable: list[float], delta: list[float]) -> float:
    """(G - 1) max t + sum t + max (d_i - sum_{j<i} t_j): Mist, EuroSys'25, section 5."""
    waits = [delta[i] - sum(stable[:i]) for i in range(len(stable))]
    return (num_micro_batches - 1) * max(stable) + sum(stable) + max(waits)


STAGES = st.lists(st.tuples(st.floats(0, 10), st.floats(-10, 10)), min_size=1, max_size=8)


@given(st.integers(1, 512), STAGES)
def test_equals_the_form_of_the_paper(num: int, stages: list[tuple[float, float]]) -> None:
    stable, delta = ([*column] for column in zip(*stages, strict=True))
    lone = np.array(stable) + np.array(delta)
    # 1e-12 of the largest term: rounding of sums of at most 8 stages.
    expected = pytest.approx(paper_form(num, stable, delta), rel=1e-12, abs=1e-9)
    assert float(step_time(num, np.array(stable), lone)) == expected


@pytest.mark.parametrize(
    ("num", "stable", "lone", "expected"),
    [
        # 7 * 5 + max(5 + 4.9, 10.4) = 35 + 10.4
        (8, [5.0, 4.9], [5.0, 10.4], 45.4),
        # 7 * 5 + max(5 + 3, 13) = 35 + 13
        (8, [5.0, 3.0], [5.0, 13.0], 48.0),
        # one stage, one micro-batch: its lone time
        (1, [2.0], [3.0], 3.0),
        # one micro-batch through three stages: max(2 + 5, 4 + 3, 1)
        (1, [1.0, 2.0, 3.0], [2.0, 4.0, 1.0], 7.0),
    ],
)
def test_by_hand(num: int, stable: list[float], lone: list[float], expected: float) -> None:
    assert float(step_time(num, np.array(stable), np.array(lone))) == pytest.approx(expected)


def test_filling_and_draining_by_hand() -> None:
    # 1 * 6 + max(6 + 1 + 2, 5 + 2, 4): what a stage adds behind another is its fill, not its time
    stable, lone, fill = np.array([6.0, 4.0, 3.0]), np.array([6.0, 5.0, 4.0]), np.array([3.0, 1, 2])
    assert float(step_time(2, stable, lone, fill)) == 6 + 9


def test_a_fill_of_the_stable_times_changes_nothing() -> None:
    stable, lone = np.random.default_rng(1).uniform(0, 1, (2, 4, 5))
    np.testing.assert_array_equal(step_time(3, stable, lone, stable), step_time(3, stable, lone))


def test_many_pipelines_at_once() -> None:
    rng = np.random.default_rng(0)
    stable, lone = rng.uniform(0, 1, (2, 3, 4, 5))
    num = rng.integers(1, 9, (3, 4))
    found = step_time(num, stable, lone)
    assert found.shape == (3, 4)
    for index in np.ndindex(3, 4):
        one = step_time(int(num[index]), stable[index], lone[index])
        assert found[index] == one
        assert one.shape == ()
