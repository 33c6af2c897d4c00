"""The sets of kinds and levels that stages have: of ten kinds a few of 2^20 occur."""

import numpy as np
import pytest

from mist.pareto.stage_mixes import _TABLE, _distinct


@pytest.mark.parametrize("num_members", [1, 5, _TABLE, _TABLE + 1, 70])
def test_sets_are_numbered_as_they_occur(num_members: int) -> None:
    draw = np.random.default_rng(0)
    known = draw.random((3, num_members)) < 0.5
    wanted = known[draw.integers(0, 3, (40, 7))]  # [K, R, members]
    sets, number = _distinct([wanted[..., i] for i in range(num_members)])
    assert (sets[number] == wanted).all()
    assert len(sets) == len({row.tobytes() for row in wanted.reshape(-1, num_members)})
