"""Intervals of steps against random draws of the constants, and by hand where steps have a kink."""

from collections.abc import Mapping

import numpy as np
import pytest

from mist.plans.provenance import Kind
from mist.platform.calibration import Calibration, scaled
from mist.platform.quantity import Quantity
from mist.platform.step_interval import step_interval

RATE, NETWORK = "device.tensor_time_scale", "cluster.network.efficiency_ratio"
TENTH, LOW, HIGH = 0.1, 1.2, 1.4


def number(value: float) -> Quantity:
    return Quantity(value=value, source="test", kind=Kind.CALIBRATED)


def known(covariance: tuple[tuple[float, ...], ...], rest: float = 0.0) -> Calibration:
    return Calibration(
        schema="mist.calibration/1",
        runtime="torch",
        device="h100-sxm",
        rest_deviation=number(rest),
        low_deviations=number(LOW),
        high_deviations=number(HIGH),
        values={RATE: number(1.0), NETWORK: number(0.5)},
        covariance=covariance,
    )


def log_steps(moved: Mapping[str, Quantity]) -> np.ndarray:
    """Of a run that computes, and of one that does nothing but send: in products no kink."""
    rate = moved.get(RATE, number(1.0)).value
    network = moved.get(NETWORK, number(0.5)).value
    return np.log([rate * 3.0, rate**0.5 * 4.0 / network])


def test_deviations_are_those_of_drawn_constants() -> None:
    """Of products of constants the logarithm is a sum: drawn steps have exactly this spread."""
    covariance, rest = np.array([[0.02, -0.01], [-0.01, 0.09]]), 0.05
    calibration = known(((0.02,), (-0.01, 0.09)), rest)
    low, high = step_interval(calibration, calibration.values, log_steps)
    random = np.random.default_rng(7)
    drawn = random.multivariate_normal([0.0, 0.0], covariance, 200_000)
    steps = np.array([drawn[:, 0], 0.5 * drawn[:, 0] - drawn[:, 1]])
    spread = (steps + rest * random.standard_normal(steps.shape)).std(axis=1)
    # Of 200,000 draws a standard deviation is known to 0.2 %.
    assert np.log(high) / HIGH == pytest.approx(spread, rel=0.01)
    assert -np.log(low) / LOW == pytest.approx(spread, rel=0.01)


def test_a_kink_is_seen_from_its_side() -> None:
    """A host nearly as slow as the GPU: only a slower one changes the step."""

    def waits(moved: Mapping[str, Quantity]) -> np.ndarray:
        return np.log([max(1.0, moved.get(RATE, number(1.0)).value)])

    calibration = known(((0.04,), (0.0, 0.0)))
    low, high = step_interval(calibration, calibration.values, waits)
    assert (low, high) == (pytest.approx(1.0), pytest.approx(np.exp(HIGH * 0.2)))


def test_what_the_user_set_is_sure() -> None:
    calibration = known(((0.02,), (-0.01, 0.09)), TENTH)
    own = {RATE: calibration.values[RATE]}
    _, high = step_interval(calibration, own, log_steps)
    assert high == pytest.approx(np.exp(HIGH * np.sqrt([0.02 + 0.01, 0.02 / 4 + 0.01])))


def test_no_network_is_faster_than_its_line() -> None:
    assert scaled(NETWORK, number(0.5), 3.0).value == 1.0
    assert scaled(RATE, number(0.5), 3.0).value == 1.5


def test_without_a_calibration_the_error_to_expect() -> None:
    low, high = step_interval(number(0.25), {}, log_steps)
    assert (low.tolist(), high.tolist()) == ([0.75, 0.75], [1.25, 1.25])
