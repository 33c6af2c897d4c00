"""The Pareto plot: what is marked, what is shaded, and a PNG that is the same each time."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from mist.report.plot import pareto_front, plot, plot_png
from mist.units import GIB
from tests.sample_plans import LIMITS, sample_plan


@dataclass(frozen=True)
class Judged:
    step_s: float
    peak_bytes: float


POINTS = [
    Judged(5.0, 48 * GIB),
    Judged(4.0, 90 * GIB),
    Judged(6.0, 20 * GIB),
    Judged(7.0, 30 * GIB),
]


def test_the_plan_is_marked_and_what_does_not_fit_is_shaded() -> None:
    axes = plot(sample_plan(), POINTS, LIMITS.device_bytes).axes[0]
    layouts, plan = axes.collections
    assert layouts.get_offsets().tolist() == [[48, 5], [90, 4], [20, 6], [30, 7]]
    # The plan stands at its fullest stage, 48 GiB, and its step of 5 s, in a colour of its own.
    assert plan.get_offsets().tolist() == [[48, 5]]
    assert plan.get_facecolor()[0][:3].tolist() == pytest.approx(to_rgb("tab:red"))
    (shaded,) = axes.patches
    assert shaded.get_x() == 64
    assert shaded.get_x() + shaded.get_width() == axes.get_xlim()[1] == 90
    (front,) = axes.lines
    assert front.get_xydata().tolist() == [[20, 6], [48, 5], [90, 4]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "layouts judged",
        "Pareto frontier",
        "plan",
        "does not fit",
    ]
    assert axes.get_xlabel() == "predicted peak memory per GPU [GiB]"
    assert axes.get_ylabel() == "predicted step time [s]"
    assert axes.get_title() == "toy on 8 x h100-sxm"


def test_what_does_not_fit_is_seen_even_when_all_fits() -> None:
    axes = plot(sample_plan(), [], LIMITS.device_bytes).axes[0]
    assert axes.get_xlim() == (0, 80)  # a quarter beyond the 64 GiB


def test_the_same_plan_gives_the_same_png() -> None:
    first, second = (plot_png(sample_plan(), POINTS, LIMITS.device_bytes) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert first.endswith(b"IEND\xaeB`\x82")


sizes = st.integers(1, 6)


@given(st.lists(st.builds(Judged, step_s=sizes, peak_bytes=sizes)))
def test_the_frontier_holds_exactly_what_nothing_beats(points: list[Judged]) -> None:
    def beaten(p: Judged) -> bool:
        return any(q != p and q.step_s <= p.step_s and q.peak_bytes <= p.peak_bytes for q in points)

    front = pareto_front(points)
    assert {*front} == {p for p in points if not beaten(p)}
    assert front == sorted(front, key=lambda p: p.peak_bytes)
