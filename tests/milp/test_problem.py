"""Illegal problems do not construct."""

import numpy as np
import pytest

from mist.milp import Cell, InterStageProblem, InterStageSolution

LEGAL = {
    "stage": 0,
    "first": None,
    "count": 1,
    "stable_s": np.array([1.0, 2.0]),
    "lone_s": np.array([3.0, 2.5]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": -1}, "cell of stage -1: layers from None, count 1"),
        ({"count": 0}, "cell of stage 0: layers from None, count 0"),
        ({"first": -1}, "cell of stage 0: layers from -1, count 1"),
        ({"lone_s": np.ones(3)}, r"cell of stage 0: \(2,\) and \(3,\) differ"),
        ({"stable_s": np.array([2.0, 1.0])}, "cell of stage 0: stable_s must rise"),
        ({"lone_s": np.array([1.0, 2.0])}, "cell of stage 0: stable_s must rise and lone_s fall"),
        ({"lone_s": np.array([np.inf, 1.0])}, "times must be finite and not negative"),
        ({"stable_s": np.array([-1.0, 1.0])}, "times must be finite and not negative"),
        ({"lone_s": np.array([1.0, -1.0])}, "times must be finite and not negative"),
        ({"spare_s": -0.5}, "spare_s -0.5 must be within 0 and the least stable_s"),
        ({"spare_s": 1.5}, "spare_s 1.5 must be within 0 and the least stable_s"),
        ({"spare_s": np.nan}, "spare_s nan must be within 0 and the least stable_s"),
    ],
)
def test_illegal_cell(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell(**{**LEGAL, **change})


@pytest.mark.parametrize(
    ("sizes", "cells", "message"),
    [
        ((0, 1, 1), [{}], "must be at least 1"),
        ((1, 0, 1), [{}], "must be at least 1"),
        ((1, 1, 0), [{}], "must be at least 1"),
        ((1, 1, 1, 0), [{}], "must be at least 1"),
        ((1, 1, 1), [{}, {"first": 0}], "either every cell names its first layer, or none does"),
        ((1, 1, 1), [{"stage": 1}], r"cell \(stage 1, first None, count 1\) is outside 1 stages"),
        ((2, 1, 1), [{"first": 2}], r"cell \(stage 0, first 2, count 1\) is outside"),
    ],
)
def test_illegal_problem(sizes: tuple[int, ...], cells: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterStageProblem(
            num_layers=sizes[0],
            num_stages=sizes[1],
            num_micro_batches=sizes[2],
            num_chunks=sizes[3] if len(sizes) > 3 else 1,
            cells=tuple(Cell(**{**LEGAL, **change}) for change in cells),
        )


def test_a_bound_above_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bound 2.0 s above the step 1.0 s"):
        InterStageSolution(step_s=1.0, lower_bound_s=2.0, choices=(), num_nodes=0)


def test_gap_is_a_share_of_the_step() -> None:
    found = InterStageSolution(step_s=4.0, lower_bound_s=3.0, choices=(), num_nodes=0)
    assert found.gap == 0.25
