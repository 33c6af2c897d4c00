"""Attention with numbers of its own is divided: what one process gets, to float64's last digits."""

from pathlib import Path

import pytest

from mist.errors import ModelError
from tests.exec.forking import RunRanks
from tests.exec.layouts import S, Variant, plan_of
from tests.exec.parity import far, run_variants
from tests.exec.sized_layouts import COPIED, SIZED, WITH_ENCODER, write_sized_models
from tests.exec.subjects import known_subject

# One of fused matrices, one of numbers that are globals with scores by hand, one with an encoder.
FAST = {"unlike sp"}
LAYOUTS = {
    "few": [each for each in (*SIZED, *WITH_ENCODER) if each.name in FAST],
    "others": [each for each in (*SIZED, *WITH_ENCODER) if each.name not in FAST],
}


@pytest.mark.slow
@pytest.mark.parametrize("some", ["few", pytest.param("others", marks=pytest.mark.slow)])
def test_written_numbers_of_heads_are_a_ranks(some: str, tmp_path: Path, forked: RunRanks) -> None:
    write_sized_models(tmp_path)
    found = run_variants(LAYOUTS[some], tmp_path, forked)
    assert set(found) == {variant.name for variant in LAYOUTS[some]}
    assert far(found) == {}


def test_a_cut_of_a_copy_is_refused(tmp_path: Path) -> None:
    """It may cut queries, keys or values: a rank would read a part of the wrong ones."""
    write_sized_models(tmp_path)
    copied = Variant(name=COPIED, model=f"{COPIED}.py", stages=(S(tp=2),), micro=8)
    with pytest.raises(ModelError) as refusal:
        known_subject(plan_of(copied, tmp_path))
    assert str(refusal.value) == (
        "tp 2: mist apply cannot divide copied: layers.0.attn.c_attn holds several matrices in "
        "one, of unknown widths; use tp 1"
    )
