"""Runtimes as some published runs use them: whole sharding, frozen weights in four bits."""

import pytest

from mist.plans.numerics import NUMERICS
from mist.plans.workload import Optimizer, Precision
from mist.platform.profiles import load_device, load_runtime
from mist.platform.states import StateItem, check_states, sum_states
from mist.validate.cases import grouped
from mist.validate.runtime_variants import fully_sharded, with_coded_weights
from mist.validate.sources import load_sources
from tests.validate.rows import run

MEGATRON = load_runtime("megatron").profile


def bytes_per_param(zero: int, dp: int, *, sharded: bool = True, frozen: bool = False) -> float:
    runtime = fully_sharded(MEGATRON) if sharded else MEGATRON
    states = runtime.states_of(Precision.BF16, Optimizer.ADAMW)
    return sum_states(states, zero, StateItem, frozen=frozen).bytes_per_param(dp)


def test_whole_sharding_divides_all_eighteen_bytes() -> None:
    """dist_optimizer.md: 18 bytes of weights, gradients, master copy and moments."""
    assert bytes_per_param(3, 8) == pytest.approx(18 / 8)
    assert (
        bytes_per_param(1, 8) == bytes_per_param(1, 8, sharded=False) == pytest.approx(6 + 12 / 8)
    )
    whole = fully_sharded(MEGATRON)
    check_states(whole.states, whole.knobs.zero_levels)
    assert fully_sharded(load_runtime("torch").profile) is load_runtime("torch").profile


def test_coded_weights_take_half_a_byte_where_they_are_not_trained() -> None:
    torch = with_coded_weights(load_runtime("torch").profile)
    states = torch.states_of(Precision.BF16, Optimizer.ADAMW)
    frozen = sum_states(states, 3, StateItem, frozen=True).bytes_per_param(1)
    assert frozen == pytest.approx(4 / 8 + 1 / 64 + 4 / 16384, abs=1e-3)
    trained = sum_states(states, 3, StateItem).bytes_per_param(1)
    assert trained == 16


@pytest.mark.parametrize(
    ("columns", "coded", "sharded", "rank"),
    [
        ({"task": "lora"}, False, False, 32),
        ({"task": "qlora", "precision": "bf16+nf4-weights"}, True, False, 32),
        ({"source": "own", "zero_or_fsdp": "megatron-fsdp-full"}, False, True, 0),
        ({"precision": "tf32"}, False, False, 0),
    ],
)
def test_runs_that_nothing_was_fitted_to_have_the_interval_of_no_calibration(
    columns: dict[str, object], coded: bool, sharded: bool, rank: int
) -> None:
    groups, reasons = grouped([run(**columns)], load_sources(), calibrated=True)
    assert not reasons
    key = groups[0].key
    assert (key.coded, key.sharded, key.config.adapter_rank) == (coded, sharded, rank)
    assert not key.is_fitted and groups[0].step_error.value == 0.25
    (usual,), _ = grouped([run()], load_sources(), calibrated=True)
    assert usual.key.is_fitted


@pytest.mark.parametrize(
    ("gpu", "word", "times"),
    [("a100-sxm-80", "tf32", 0.5), ("h100-sxm", "tf32", 0.5), ("b200", "nvfp4", 4.0)],
)
def test_rates_of_tensor_cores_over_bf16(gpu: str, word: str, times: float) -> None:
    """Datasheets: 156 of 312, 494.7 of 989, 9,000 of 2,250 TFLOP/s."""
    device = load_device(gpu).profile
    law, plain = device.gemm_law(NUMERICS[word].products), device.gemm_law(Precision.BF16)
    assert law is not None and plain is not None
    assert law.peak_flop_per_s.value / plain.peak_flop_per_s.value == pytest.approx(times, rel=1e-3)
    assert load_device("v100-sxm-32").profile.gemm_law(NUMERICS[word].products) is None
