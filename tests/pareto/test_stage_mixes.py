"""The sets of kinds and levels that stages have: of ten kinds a few of 2^20 occur."""

import numpy as np
import pytest

from mist.pareto.stage_mixes import _TABLE, _distinct


@pytest.mark.parametrize("num_members", [1, 5, _TABLE, _TABLE + 1, 70])
def test_sets_are_numbered_as_they_occur(num_members: int) -> None:
    draw = np.random.default_rng(0)
    known = draw.random((3, num_members)) < 0.5
    wanted = np.moveaxis(known[draw.integers(0, 3, (40, 7))], -1, 0)  # [members, K, R]
    sets, number = _distinct(wanted)
    assert (np.moveaxis(sets[number], -1, 0) == wanted).all()
    assert len(sets) == len({row.tobytes() for row in wanted.reshape(num_members, -1).T})
