"""The Pareto plot: step time against peak memory of the layouts judged, the plan marked."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mist.planfile import write_bytes
from mist.plans import Plan
from mist.units import GIB


class Judged(Protocol):
    """A layout as the plot needs it."""

    @property
    def step_s(self) -> float:
        """Seconds per step."""

    @property
    def peak_bytes(self) -> float:
        """Of the fullest device."""


def save_plot(plan: Plan, points: Sequence[Judged], limit_bytes: float, path: Path) -> None:
    """Write the plot as PNG; the file appears whole or not at all.

    Raises OutputError when the folder is missing or not writable.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    peaks = [point.peak_bytes / GIB for point in points]
    steps = [point.step_s for point in points]
    axes.scatter(peaks, steps, s=12, color="0.65", label="layouts judged")
    front = pareto_front(points)
    axes.step(
        [point.peak_bytes / GIB for point in front],
        [point.step_s for point in front],
        where="post",
        color="tab:blue",
        label="Pareto frontier",
    )
    chosen_gib = max(stage.peak_bytes for stage in plan.estimate.stages) / GIB
    axes.scatter(
        [chosen_gib],
        [plan.estimate.step_s],
        marker="*",
        s=220,
        color="tab:red",
        label="plan",
        zorder=3,
    )
    limit_gib = limit_bytes / GIB
    right = max([limit_gib * 1.25, chosen_gib, *(peak for peak in peaks if peak < 3 * limit_gib)])
    axes.axvspan(limit_gib, right, color="tab:red", alpha=0.08, label="does not fit")
    axes.set_xlim(0, right)
    axes.set_ylim(0)
    axes.set_xlabel("predicted peak memory per GPU [GiB]")
    axes.set_ylabel("predicted step time [s]")
    axes.set_title(f"{plan.model.name} on {plan.cluster.num_gpus} x {plan.cluster.device}")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def pareto_front(points: Sequence[Judged]) -> list[Judged]:
    """Layouts that no other beats in both step time and peak memory, by rising memory."""
    front: list[Judged] = []
    for point in sorted(points, key=lambda p: (p.peak_bytes, p.step_s)):
        if not front or point.step_s < front[-1].step_s:
            front.append(point)
    return front
