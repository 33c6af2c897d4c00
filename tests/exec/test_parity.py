"""Every layout ends where one process ends: 2 AdamW steps, in float64 (tests/exec/double.py).

The second step reads all that the first one wrote: parameters, moments, what lives on the host.
Sums in another order then differ by some 1e-15, on any CPU; mistakes show at 1e-3 and more. What
fp32 and bf16 change is bounded by their unit round-off. All variants of one number of ranks share
a launch.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from mist.plans.workload import Precision
from tests.exec.double import MAX_LOSS, MAX_PARAMETER
from tests.exec.forking import RunRanks, interpreters
from tests.exec.layouts import NUM_LAYERS, Variant, write_models
from tests.exec.parity import EVERY, LR, run_variants
from tests.exec.variants import SLOW, VARIANTS

EXACT = {"loss": MAX_LOSS, "norm": MAX_LOSS, "gradients": MAX_LOSS, "parameters": MAX_PARAMETER}

UNIT_ROUND_OFF = {Precision.FP32: 2.0**-24, Precision.BF16: 2.0**-8}
# Results that are rounded on the way of a token through a Llama layer: two norms (3 operations
# each), q, k, v, both rotations, scores, attention, o, sum, gate, up, SiLU, product, down, sum.
ROUNDINGS = 4 + 21 * NUM_LAYERS
# Rounding n times moves a result by more than 5 sqrt(n) u with a probability below 2 n exp(-12)
# (Higham and Mary 2019, theorem 2.4). Logits are below 1 at this width and initial spread: 64
# normalised inputs times weights of .02 are .16 in the mean square. A loss moves by at most twice
# what a logit does.
MAX_LOGIT = 1.0
# A step moves a parameter by at most 1.004 times the learning rate in up to three steps of these
# betas (Cauchy-Schwarz on the two running means), either way.
MAX_MOVED = 2 * 1.004 * LR

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


def rounding(precision: Precision) -> float:
    """How far rounding to a precision may move the loss."""
    return float(2 * MAX_LOGIT * 5 * ROUNDINGS**0.5 * UNIT_ROUND_OFF[precision])


def limits(variant: Variant) -> Mapping[str, float]:
    if not variant.rounded:
        return EXACT
    parameters = variant.num_steps * MAX_MOVED
    return {"loss": rounding(variant.precision), "parameters": parameters}


def assert_parity(found: Errors, variants: list[Variant]) -> None:
    assert set(found) == {variant.name for variant in variants}
    far = {
        (variant.name, what): found[variant.name][what]
        for variant in variants
        for what, most in limits(variant).items()
        if not found[variant.name][what] <= most
    }
    assert far == {}
    for variant in variants:
        if variant.precision is Precision.BF16:  # it is bf16 that computes: fp32 is not so far off
            assert found[variant.name]["loss"] > rounding(Precision.FP32)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_layouts_agree_with_one_process(num_ranks: int, folder: Path, forked: RunRanks) -> None:
    variants = [variant for variant in VARIANTS if variant.world_size == num_ranks]
    assert_parity(run_variants(variants, folder, forked), variants)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", sorted({variant.world_size for variant in SLOW}))
def test_large_layouts_agree_with_one_process(num_ranks: int, folder: Path) -> None:
    variants = [variant for variant in SLOW if variant.world_size == num_ranks]
    assert_parity(run_variants(variants, folder, interpreters), variants)


def test_there_are_at_least_24_layouts() -> None:
    assert len((*VARIANTS, *SLOW)) >= 24
    names = [variant.name for variant in EVERY]  # by which ranks are told what to run
    assert len(names) == len(set(names))
