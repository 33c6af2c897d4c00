"""Every layout ends where one process ends: 3 AdamW steps in fp32.

A sum of the same numbers in another order differs by some 1e-7; AdamW divides by the root of the
second moment, which makes it some 1e-5 in parameters after three steps at this learning rate.
Mistakes show at 1e-3 and more. All variants of one number of ranks share a launch.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from mist.spec import Precision
from tests.exec.layouts import Variant, write_models
from tests.exec.parity import run_variants
from tests.exec.variants import SLOW, VARIANTS

# bf16 has 8 bits: 4e-3 of a loss of 5.5 is 2e-2, of which a mean over 512 tokens keeps little;
# AdamW moves a parameter by at most about the learning rate (1e-3) in a step, either way.
MAX_LOSS = {Precision.FP32: 2e-6, Precision.BF16: 2e-3}
MAX_PARAMETER = {Precision.FP32: 5e-5, Precision.BF16: 6e-3}
RANKS = [  # with 3 or more, two cores take long
    pytest.param(n, marks=[pytest.mark.slow] if n >= 3 else [])
    for n in sorted({variant.world_size for variant in VARIANTS})
]

Errors = Mapping[str, Mapping[str, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("parity")
    write_models(path)
    return path


def assert_parity(found: Errors, variants: list[Variant]) -> None:
    assert set(found) == {variant.name for variant in variants}
    far = {
        variant.name: found[variant.name]
        for variant in variants
        if found[variant.name]["loss"] > MAX_LOSS[variant.precision]
        or found[variant.name]["parameters"] > MAX_PARAMETER[variant.precision]
    }
    assert far == {}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_layouts_agree_with_one_process(num_ranks: int, folder: Path) -> None:
    variants = [variant for variant in VARIANTS if variant.world_size == num_ranks]
    assert_parity(run_variants(variants, folder), variants)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", sorted({variant.world_size for variant in SLOW}))
def test_large_layouts_agree_with_one_process(num_ranks: int, folder: Path) -> None:
    variants = [variant for variant in SLOW if variant.world_size == num_ranks]
    assert_parity(run_variants(variants, folder), variants)


def test_there_are_at_least_24_layouts() -> None:
    names = [variant.name for variant in (*VARIANTS, *SLOW)]
    assert len(names) == len(set(names)) >= 24
