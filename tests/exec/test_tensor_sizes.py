"""Attention with numbers of its own is divided: what one process gets, to float64's last digits."""

from pathlib import Path

import pytest

from tests.exec.forking import RunRanks
from tests.exec.parity import far, run_variants
from tests.exec.sized_layouts import SIZED, WITH_ENCODER, write_sized_models

# One of fused matrices, one of numbers that are globals with scores by hand, one with an encoder.
FAST = {"three_first sp", "scores", "t5"}
LAYOUTS = {
    "few": [each for each in (*SIZED, *WITH_ENCODER) if each.name in FAST],
    "others": [each for each in (*SIZED, *WITH_ENCODER) if each.name not in FAST],
}


@pytest.mark.parametrize("some", ["few", pytest.param("others", marks=pytest.mark.slow)])
def test_written_numbers_of_heads_are_a_ranks(some: str, tmp_path: Path, forked: RunRanks) -> None:
    write_sized_models(tmp_path)
    found = run_variants(LAYOUTS[some], tmp_path, forked)
    assert set(found) == {variant.name for variant in LAYOUTS[some]}
    assert far(found) == {}
