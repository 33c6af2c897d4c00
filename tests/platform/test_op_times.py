"""Operation costs against published measurements, hand-computed cases and invariants."""

import csv
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.model.summary import Traffic
from mist.plans.workload import Precision
from tests.platform.samples import DEVICES, PUBLISHED, costs

sizes = st.integers(1, 65536)


def gemm_tflop_per_s(gpu: str, m: int, n: int, k: int) -> float:
    return 2e-12 * m * n * k / float(costs(gpu).gemm_s(1, m, n, k))


def causal_tflop_per_s(gpu: str, seq: int, head_dim: int) -> float:
    # 16 x 32 heads fill any GPU, as the published medians ask (batch * heads >= 16).
    flop = 2e-12 * 16 * 32 * seq * seq * head_dim
    return flop / float(costs(gpu).attention_forward_s(16, 32, seq, seq, head_dim, 1))


@pytest.mark.parametrize(
    ("gpu", "median_tflop_per_s"),
    [("a100-sxm-80", 262), ("h100-sxm", 771), ("h200", 774), ("b200", 1471), ("l40s", 206)],
)
def test_large_gemm_reaches_the_published_median_of_aiconfigurator(
    gpu: str, median_tflop_per_s: float
) -> None:
    # Medians over m, n, k >= 4096 of the trtllm tables; 5 % is the law's own median error there
    # (7.8 % on L40S).
    tolerance = 0.08 if gpu == "l40s" else 0.05
    assert gemm_tflop_per_s(gpu, 8192, 8192, 8192) == pytest.approx(
        median_tflop_per_s, rel=tolerance
    )


@pytest.mark.parametrize(
    ("m", "n", "k", "measured_s"),
    [
        (2048, 50304, 2048, 7.655e-3),
        (4096, 8192, 2048, 2.520e-3),
        (8192, 6144, 2048, 3.773e-3),
        (16384, 2048, 8192, 9.935e-3),
    ],
)
def test_l4_linear_layers_of_the_mist_artifact(m: int, n: int, k: int, measured_s: float) -> None:
    # Medians of its op database cache_NVIDIA_L4; the fit's median error over 20 layers is 1.2 %.
    assert float(costs("l4").gemm_s(1, m, n, k)) == pytest.approx(measured_s, rel=0.03)


def test_gemm_by_hand() -> None:
    # 1024^3 on H100, bf16: 2.147e9 FLOP / (.777 * 989e12) = 2.7945 us, 6.291e6 B / (.816 * 3.35e12)
    # = 2.3015 us; (2.7945^2.59 + 2.3015^2.59)^(1/2.59) = 3.3545 us, and 3.01 us to launch.
    assert float(costs("h100-sxm").gemm_s(1, 1024, 1024, 1024)) == pytest.approx(
        6.3645e-6, rel=1e-4
    )


def test_batched_gemm_launches_once() -> None:
    h100 = costs("h100-sxm")
    launch_s = h100.device.gemm[Precision.BF16].launch_s.value
    one, many = (float(h100.gemm_s(batch, 2048, 2048, 128)) for batch in (1, 64))
    assert many - launch_s == pytest.approx(64 * (one - launch_s))


@pytest.mark.parametrize(
    ("seq", "tflop_per_s"), [(2048, 174), (4096, 193), (8192, 201), (16384, 205)]
)
def test_a100_flash_forward_of_aiconfigurator(seq: int, tflop_per_s: float) -> None:
    # The published law misses 4.0 % of these (median) and up to 9.2 % (p90).
    assert causal_tflop_per_s("a100-sxm-80", seq, 128) == pytest.approx(tflop_per_s, rel=0.05)


@pytest.mark.parametrize(
    ("gpu", "head_dim", "rates"),
    [
        ("h100-sxm", 128, (163, 221, 265, 294, 308, 328)),
        ("h100-sxm", 64, (141, 192, 232, 257, 273, 284)),
        ("a100-sxm-80", 128, (99, 133, 155, 173, 182, 189)),
    ],
)
def test_flash_forward_and_backward_of_the_flash_attention_readme(
    gpu: str, head_dim: int, rates: tuple[int, ...]
) -> None:
    # Causal, 16k tokens in all, width 2048, at 512 .. 16k tokens per sequence. The H100 law was
    # fitted to these, within 2 %; the A100 law was fitted to other tables, which differ by 6 %.
    tolerance = 0.06 if gpu == "a100-sxm-80" else 0.025
    for exponent, rate in enumerate(rates):
        seq, heads = 512 * 2**exponent, 2048 // head_dim
        batch = 16384 // seq
        args = (batch, heads, seq, seq, head_dim, 1)
        total_s = float(costs(gpu).attention_forward_s(*args)) + float(
            costs(gpu).attention_backward_s(*args)
        )
        # The papers count the causal backward as 2.5 forwards.
        flop = 3.5 * 2e-12 * batch * heads * seq * seq * head_dim
        assert flop / total_s == pytest.approx(rate, rel=tolerance), seq


@pytest.mark.parametrize(
    ("seq", "tflop_per_s"), [(512, 309), (1024, 350), (2048, 362), (8192, 370), (16384, 370)]
)
def test_h100_flash_without_mask_of_the_flashattention_3_figure(
    seq: int, tflop_per_s: float
) -> None:
    # FA2, head 128. The causal law with a quarter of its ramp; its asymptote is 3.5 % lower, and
    # the launch weighs 2 % in the shorter runs.
    batch = 16384 // seq
    flop = 4e-12 * batch * 16 * seq * seq * 128
    time_s = float(costs("h100-sxm").attention_forward_s(batch, 16, seq, seq, 128, 0))
    assert flop / time_s == pytest.approx(tflop_per_s, rel=0.06)


@pytest.mark.parametrize(
    ("batch", "forward_s", "backward_s"),
    [(1, 0.473e-3, 1.272e-3), (4, 1.650e-3, 5.230e-3), (8, 3.292e-3, 10.701e-3)],
)
def test_l4_flash_of_the_mist_artifact(batch: int, forward_s: float, backward_s: float) -> None:
    # 2048 tokens, 16 heads of 128. The backward follows the ratio of other GPUs, hence the 15 %.
    args = (batch, 16, 2048, 2048, 128, 1)
    assert float(costs("l4").attention_forward_s(*args)) == pytest.approx(forward_s, rel=0.02)
    assert float(costs("l4").attention_backward_s(*args)) == pytest.approx(backward_s, rel=0.15)


@pytest.mark.parametrize(("seq", "ratio"), [(128, 3.69), (512, 3.69), (2048, 3.06), (8192, 2.90)])
def test_flash_backward_over_forward(seq: int, ratio: float) -> None:
    # 2.85 + 430 / s of the FlashAttention-3 figures, held at its 512-token value below.
    args = (4, 16, seq, seq, 128, 1)
    h100 = costs("h100-sxm")
    measured = h100.attention_backward_s(*args) / h100.attention_forward_s(*args)
    assert float(measured) == pytest.approx(ratio, abs=0.01)


def test_attention_between_and_beyond_head_sizes() -> None:
    rates = [causal_tflop_per_s("h100-sxm", 8192, size) for size in (32, 64, 96, 128, 256)]
    assert rates[0] == pytest.approx(rates[1], rel=0.03)  # the same law, but a launch weighs more
    assert rates[1] < rates[2] < rates[3]
    assert rates[3] == pytest.approx(rates[4], rel=0.01)


def test_memory_bound_by_hand() -> None:
    # 3.35e9 B at .90 of 3.35e12 B/s is 1/900 s; three kernels launch in 2 us each.
    taken = costs("h100-sxm").memory_s(3.35e9, 3, Traffic.POINTWISE)
    assert float(taken) == pytest.approx(1 / 900 + 6e-6)


@pytest.mark.parametrize("traffic", Traffic)
def test_every_class_of_traffic_is_priced(traffic: Traffic) -> None:
    h100 = costs("h100-sxm")
    assert 0 < h100.effective_hbm_bytes_per_s(traffic) < h100.device.hbm_bytes_per_s.value


def test_host_copies_by_hand() -> None:
    a100 = costs("a100-sxm-80")
    assert float(a100.host_to_device_s(25e9)) == pytest.approx(1.0)
    assert float(a100.device_to_host_s(50e9)) == pytest.approx(2.0)


def test_fp32_is_slower_than_bf16() -> None:
    shape = (1, 4096, 4096, 4096)
    fp32, bf16 = (
        float(costs("h100-sxm", p).gemm_s(*shape)) for p in (Precision.FP32, Precision.BF16)
    )
    assert fp32 > 10 * bf16


@given(m=sizes, n=sizes, k=sizes, gpu=st.sampled_from(DEVICES))
def test_gemm_time_grows_with_every_dimension(m: int, n: int, k: int, gpu: str) -> None:
    cost = costs(gpu)
    times = cost.gemm_s(1, [m, m + 1, m, m], [n, n, n + 1, n], [k, k, k, k + 1])
    assert np.isfinite(times).all()
    assert (times[1:] >= times[0]).all()


@given(seq=sizes, heads=st.integers(1, 128), gpu=st.sampled_from(DEVICES))
def test_attention_time_grows_with_tokens_and_the_mask_saves(
    seq: int, heads: int, gpu: str
) -> None:
    cost = costs(gpu)
    shorter, longer = cost.attention_forward_s(1, heads, [seq, seq + 1], [seq, seq + 1], 128, 1)
    assert 0 < shorter <= longer
    assert (cost.attention_backward_s(1, heads, seq, seq, 128, [1, 0]) > 0).all()


def test_results_broadcast_over_candidates() -> None:
    h100 = costs("h100-sxm")
    assert h100.gemm_s(1, np.ones((3, 1)), np.ones(4), 8).shape == (3, 4)
    assert h100.attention_backward_s(np.ones((2, 1)), 8, 128, np.ones(5), 64, 1).shape == (2, 5)
    assert h100.all_reduce_s(np.ones((2, 1)), np.full(3, 8), 8).shape == (2, 3)
    assert h100.p2p_s(np.ones(7), 1).dtype == np.float64


def test_a_million_candidates_price_in_a_third_of_a_second() -> None:
    # The budget is 0.3 us per element; the slowest law took 0.13 us on one shared core. The best
    # of three runs is asked, because the machine is shared.
    rng = np.random.default_rng(0)
    num_bytes, group = 2.0 ** rng.uniform(8, 32, 200_000), rng.choice([1, 2, 4, 8, 16, 64], 200_000)
    best = min(_seconds_of_all_gathers(num_bytes, group) for _ in range(3))
    assert best / num_bytes.size < 0.3e-6


def _seconds_of_all_gathers(num_bytes: np.ndarray, group: np.ndarray) -> float:
    start = time.process_time()
    costs("h100-sxm").all_gather_s(num_bytes, group, np.minimum(group, 8))
    return time.process_time() - start


@pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published tables are not beside the repository"
)
@pytest.mark.parametrize(
    ("gpu", "system", "table"),
    [
        ("a100-sxm-80", "a100_sxm", "trtllm/1.0.0"),
        ("h100-sxm", "h100_sxm", "trtllm/1.3.0rc20"),
        ("h200", "h200_sxm", "trtllm/1.3.0rc20"),
        ("b200", "b200_sxm", "trtllm/1.3.0rc20"),
        ("l40s", "l40s", "trtllm/1.3.0rc20"),
    ],
)
def test_gemm_laws_are_those_fitted_to_the_tables(gpu: str, system: str, table: str) -> None:
    with (PUBLISHED / "gemm_law.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == "bfloat16"]
    row = next(row for row in rows if (row["system"], row["table"]) == (system, table))
    law = costs(gpu).device.gemm[Precision.BF16]
    assert law.peak_flop_per_s.value == float(row["peak_TF"]) * 1e12
    assert law.efficiency_ratio.value == float(row["eff_peak"])
    assert law.bandwidth_scale.value == float(row["eff_bw"])
    assert law.launch_s.value * 1e6 == pytest.approx(float(row["t0_us"]), abs=0.01)
    assert law.exponent.value == float(row["s"])
