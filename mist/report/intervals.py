"""How sure a prediction is, in words: the one place that says it on the screen."""

import math

from mist.plans.plan import Estimate
from mist.units import format_seconds


def step_words(estimate: Estimate) -> str:
    """The step in s with its interval: "15.1 s per step (11.3 s to 18.9 s, not calibrated)"."""
    step_s, sure = estimate.step_s, estimate.uncertainty
    ends = (sure.step_low_ratio, sure.step_high_ratio)
    low, high = (format_seconds(step_s * end) for end in ends)
    calibrated = "calibrated" if sure.calibrated else "not calibrated"
    return f"{format_seconds(step_s)} per step ({low} to {high}, {calibrated})"


def peak_words(estimate: Estimate) -> str:
    """How far off the peak of memory may be, and the chance that it fits the device."""
    # Rounded down: no chance below one is printed as certain.
    percent = math.floor(100 * estimate.fit_probability)
    return f"peak +-{estimate.uncertainty.memory_ratio:.0%}, P(fits) {percent}%"


def highest_peak_bytes(estimate: Estimate) -> float:
    """The upper end of the interval of the fullest GPU's peak, in bytes."""
    peak_bytes = max(stage.peak_bytes for stage in estimate.stages)
    return peak_bytes * (1 + estimate.uncertainty.memory_ratio)
