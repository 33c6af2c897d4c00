"""The Pareto plot: step time against peak memory of the layouts judged, the plan marked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mist.plans.plan import Plan
from mist.report.png_file import png_of
from mist.units import GIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Judged(Protocol):
    """A layout as the plot needs it."""

    @property
    def step_s(self) -> float:
        """Seconds per step."""

    @property
    def peak_bytes(self) -> float:
        """Of the fullest device."""


def plot_png(plan: Plan, points: Sequence[Judged], limit_bytes: float) -> bytes:
    """The plot as a PNG file's content; the same plan and points give the same bytes."""
    return png_of(plot(plan, points, limit_bytes))


def plot(plan: Plan, points: Sequence[Judged], limit_bytes: float) -> "Figure":
    """Step time in s against peak memory in GiB, the plan marked, what does not fit shaded."""
    from matplotlib.figure import Figure

    # Figure without pyplot: no global state, and no display is needed.
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    peaks = [point.peak_bytes / GIB for point in points]
    axes.scatter(peaks, [p.step_s for p in points], s=12, color="0.65", label="layouts judged")
    front = pareto_front(points)
    front_gib = [point.peak_bytes / GIB for point in front]
    front_s = [point.step_s for point in front]
    axes.step(front_gib, front_s, where="post", color="tab:blue", label="Pareto frontier")
    chosen_gib = max(stage.peak_bytes for stage in plan.estimate.stages) / GIB
    at = ([chosen_gib], [plan.estimate.step_s])
    axes.scatter(*at, marker="*", s=220, color="tab:red", label="plan", zorder=3)
    limit_gib = limit_bytes / GIB
    right = max([limit_gib * 1.25, chosen_gib, *(peak for peak in peaks if peak < 3 * limit_gib)])
    axes.axvspan(limit_gib, right, color="tab:red", alpha=0.08, label="does not fit")
    axes.set(
        xlim=(0, right),
        ylim=(0, None),
        xlabel="predicted peak memory per GPU [GiB]",
        ylabel="predicted step time [s]",
    )
    title = f"{plan.model.name} on {plan.cluster.num_gpus} x {plan.cluster.device}"
    axes.set_title(title, parse_math=False)
    axes.legend()
    return figure


def pareto_front(points: Sequence[Judged]) -> list[Judged]:
    """Layouts that no other beats in both step time and peak memory, by rising memory."""
    front: list[Judged] = []
    # Of layouts with the same peak the fastest comes first, and the others do not enter.
    for point in sorted(points, key=lambda p: (p.peak_bytes, p.step_s)):
        if not front or point.step_s < front[-1].step_s:
            front.append(point)
    return front
