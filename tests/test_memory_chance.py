"""The chance that a peak fits, against the table of the normal distribution."""

import math

import pytest

from mist.plans.memory_chance import EIGHT_OF_TEN, SURE, fit_probability, sure_margin

# Phi of a standard table: one, two and three standard deviations, and the ends of 80 %.
TABLE = [(0.0, 0.5), (1.0, 0.8413), (2.0, 0.9772), (3.0, 0.9987), (-1.0, 0.1587), (1.2816, 0.9)]


@pytest.mark.parametrize(("deviations", "chance"), TABLE)
def test_of_so_many_standard_deviations_of_room(deviations: float, chance: float) -> None:
    ratio = 0.1
    usable = 60e9 * (1 + ratio) ** (deviations / EIGHT_OF_TEN)
    assert fit_probability(60e9, usable, ratio) == pytest.approx(chance, abs=1e-4)


def test_the_interval_holds_eight_of_ten() -> None:
    low, high = (fit_probability(1.0, end, 0.1) for end in (1 / 1.1, 1.1))
    assert high - low == pytest.approx(0.8, abs=1e-4)


def test_a_plan_under_the_default_margin_is_sure_to_98_percent() -> None:
    for ratio in (0.05, 0.1, 0.11):
        margin = sure_margin(ratio)
        assert fit_probability(1 - margin, 1.0, ratio) >= SURE
        assert fit_probability(1 - margin + 0.002, 1.0, ratio) < SURE
    assert sure_margin(0.0) == 0.0


def test_what_is_certain() -> None:
    assert fit_probability(0, 8e9, 0.1) == 1.0
    assert fit_probability(8e9, 8e9, 0.0) == 1.0
    assert fit_probability(8e9 + 1, 8e9, 0.0) == 0.0
    assert fit_probability(8e9, 0, 0.1) == 0.0
    chances = [fit_probability(peak, 8e9, 0.1) for peak in (6e9, 7e9, 8e9, 9e9)]
    assert chances == sorted(chances, reverse=True) and not any(map(math.isnan, chances))
