"""Every layout trains as one process does: losses within 2e-6, parameters within 5e-5.

fp32, three steps of AdamW (which turns rounding of 1e-7 in gradients into 1e-5 in parameters; a
wrong or missing reduction shows at 1e-3). One launch serves all variants of a world size.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.exec.layouts import write_models
from tests.exec.parity import run_variants
from tests.exec.variants import VARIANTS

Errors = Mapping[str, Mapping[str, float]]
SLOW_WORLD = 4  # ranks from which on two cores take most of a minute


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exec")
    write_models(made)
    return made


@cache
def errors_of(world_size: int, folder: Path) -> Errors:
    return run_variants([v for v in VARIANTS if v.world_size == world_size], folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, id=v.name, marks=[pytest.mark.slow] if v.world_size >= SLOW_WORLD else [])
        for v in VARIANTS
    ],
)
def test_parity_with_one_process(variant: object, folder: Path) -> None:
    found = errors_of(variant.world_size, folder)[variant.name]  # type: ignore[attr-defined]
    assert found["loss"] < 2e-6
    assert found["parameters"] < 5e-5


def test_there_are_enough_layouts() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS) >= 24
