"""Predictions beside published runs of the same stack (FSDP2, eager), one of 48 it is fitted to."""

import pytest

import mist


@pytest.mark.slow
def test_llama3_70b_on_64_a100_pytorch_torchtitan_24_7_seconds() -> None:
    """pytorch/torchtitan docs/performance.md at 217cc94e2 (2024): 331 tokens/s per GPU, full AC.

    The interval is the one that the prediction itself states.
    """
    measured_s = 8192 / 331
    judged = mist.check(
        "llama3-70b",
        gpus=64,
        gpu="a100-sxm-80",
        zero=3,
        micro_batch=1,
        global_batch=64,
        checkpoint="full",
    )
    estimate = judged.plan.estimate
    assert judged.fits
    ends = (estimate.uncertainty.step_low_ratio, estimate.uncertainty.step_high_ratio)
    assert ends[0] <= measured_s / estimate.step_s <= ends[1]
    assert estimate.step_s == pytest.approx(measured_s, rel=0.08)  # the bar of a calibrated runtime
