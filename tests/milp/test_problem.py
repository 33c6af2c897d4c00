"""Illegal problems do not construct."""

import numpy as np
import pytest

from mist.milp import Cell, InterStageProblem, InterStageSolution, Shared

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
        ({"units": 0}, "cell of stage 0: 0 units from anywhere"),
        ({"offsets": (2, -1)}, r"cell of stage 0: 1 units from \(2, -1\)"),
        ({"host_bytes": np.ones(3)}, "host_bytes must be one finite number for each point"),
        ({"host_bytes": np.array([1.0, -1.0])}, "host_bytes must be .* not negative"),
        ({"host_bytes": np.array([1.0, np.inf])}, "host_bytes must be one finite number"),
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
        ((1, 1, 1), [{}, {"tie": (1,)}], "either every cell has a tie, or none has"),
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


@pytest.mark.parametrize(
    ("change", "cell", "message"),
    [
        ({"num_units": 0}, {}, "must be at least 1"),
        ({}, {"offsets": (0,)}, r"cell \(stage 0, 1 units from \(0,\)\) is outside no units"),
        ({"num_units": 1}, {"units": 2}, r"\(stage 0, 2 units from anywhere\) is outside 1 units"),
        ({"num_units": 2}, {"units": 2, "offsets": (1,)}, r"2 units from \(1,\)\) is outside 2"),
        ({"shared": (Shared(stages=(1,), limit_bytes=1.0),)}, {}, r"limit of stages \[1\] of 1"),
        (
            {"shared": (Shared(stages=(0,), limit_bytes=1.0),)},
            {},
            "a cell of stage 0 does not say its host_bytes",
        ),
    ],
)
def test_illegal_devices_and_limits(change: dict, cell: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterStageProblem(
            num_layers=1,
            num_stages=1,
            num_micro_batches=1,
            cells=(Cell(**{**LEGAL, **cell}),),
            **change,
        )


def test_host_bytes_may_come_in_any_order() -> None:
    times = {"stable_s": np.array([2.0, 1.0]), "lone_s": np.array([1.0, 2.0])}
    Cell(**{**LEGAL, **times, "host_bytes": np.zeros(2)})
    with pytest.raises(ValueError, match="stable_s must rise and lone_s fall"):
        Cell(**{**LEGAL, **times})


def test_a_bound_above_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bound 2.0 s above the step 1.0 s"):
        InterStageSolution(step_s=1.0, lower_bound_s=2.0, choices=(), num_nodes=0, solver="dp")


def test_gap_is_a_share_of_the_step() -> None:
    found = InterStageSolution(step_s=4.0, lower_bound_s=3.0, choices=(), num_nodes=0, solver="dp")
    assert found.gap == 0.25
