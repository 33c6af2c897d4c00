"""What a GPU is asked is beyond its caches and launches, and what its driver says is read."""

import pytest

from mist.exec.profiling.profile_worker import gpu_state
from mist.exec.profiling.sizes import SIZES
from mist.plans.workload import Precision
from mist.units import MIB

GPU, CPU = SIZES["cuda"], SIZES["cpu"]
L2_BYTES = 50 * MIB  # of an H100 (its data sheet)
LAUNCH_S = 10e-6
HBM_BYTES_PER_S, FLOP_PER_S = 3.35e12, 989e12  # of an H100 SXM


def test_memory_is_measured_beyond_the_caches() -> None:
    assert min(GPU.memory_bytes) > 2 * L2_BYTES
    assert GPU.beside_bytes > 2 * L2_BYTES
    assert GPU.num_params * GPU.num_tensors >= 256 * 2**20


def test_nothing_is_measured_that_a_launch_outlasts() -> None:
    assert min(GPU.memory_bytes) / HBM_BYTES_PER_S > 3 * LAUNCH_S
    assert 2 * GPU.probe**3 / FLOP_PER_S > 3 * LAUNCH_S
    assert 2 * GPU.beside_width**3 / FLOP_PER_S > 3 * LAUNCH_S


def test_attention_is_that_of_training() -> None:
    assert GPU.attention is Precision.BF16
    assert max(GPU.seq_lens) == 8192
    assert max(GPU.collective_bytes) == 512 * MIB  # a layer of 8 B gathers some 436 MB


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (
            "1755, 2619, 612.41, 61\n",
            {
                "sm_clock_mhz": 1755,
                "memory_clock_mhz": 2619,
                "power_w": 612.41,
                "temperature_c": 61,
            },
        ),
        (
            "1755, 2619, [N/A], 61",
            {"sm_clock_mhz": 1755, "memory_clock_mhz": 2619, "temperature_c": 61},
        ),
        ("", {}),
    ],
)
def test_clocks_and_power_are_read(line: str, want: dict[str, float]) -> None:
    assert gpu_state(line) == want
