"""Masked labels give the loss and the gradient of one process under every layout.

All in float64, where sums in another order differ by some 1e-15; what a mean of means or a label
too many changes is 1e-3 and more.
"""

import json
from pathlib import Path

import pytest

from tests.exec.forking import RunRanks, interpreters
from tests.exec.layouts import Variant
from tests.exec.masked_layouts import LAYOUTS, MORE, write_masked_models

MAX_ERROR = 1e-9
OF_TWO = tuple(each for each in LAYOUTS if each.world_size == 2)


@pytest.mark.parametrize(
    ("layouts", "num_ranks"),
    [
        pytest.param(OF_TWO[:2], 2, id="2 ranks"),
        pytest.param(OF_TWO[2:], 2, id="others of 2 ranks", marks=pytest.mark.slow),
        pytest.param(LAYOUTS, 4, id="4 ranks", marks=pytest.mark.slow),
        pytest.param(MORE, 2, id="more of 2 ranks", marks=pytest.mark.slow),
        pytest.param(MORE, 4, id="more of 4 ranks", marks=pytest.mark.slow),
    ],
)
def test_masked_labels_agree_with_one_process(
    layouts: tuple[Variant, ...], num_ranks: int, tmp_path: Path, forked: RunRanks
) -> None:
    write_masked_models(tmp_path)
    out = tmp_path / "found.json"
    names = [each.name for each in layouts if each.world_size == num_ranks]
    run = forked if layouts == OF_TWO[:2] else interpreters
    run("tests.exec.masked", tmp_path, out, *names, num_ranks=num_ranks)
    found = json.loads(out.read_text())
    assert set(found) == {*names} != set()
    far = {
        (name, index): step
        for name, steps in found.items()
        for index, step in enumerate(steps)
        if max(step["loss"], step["norm"], step["gradients"]) > MAX_ERROR
    }
    assert far == {}
    for masked, empty in found.values():
        assert masked["known_loss"] > 5.0
        assert masked["known_norm"] > 0.1
        assert (empty["known_loss"], empty["known_norm"]) == (0.0, 0.0)
