"""What would make another layout as fast as the plan: one change, true when it is recomputed.

A part p of the step (compute, recomputation, collectives, the bubble, ...) takes the share x less
in both layouts, since a faster network or a shorter recomputation serves both. The step is computed
again from the stages' times, with the slowest stage that then results:

    T(x) = step_time(G, t - x p, u - x p, fill)        and for the bubble    T(x) = T - x bubble

and the change asked for is the least x of any part with T_other(x) = T_plan(x).
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.plans.breakdown import PART_NAMES, ROUNDING_RATIO
from mist.plans.plan import Layout, Schedule
from mist.plans.schedules import fill_time, spare_time, step_time
from mist.symbolic.job import Job
from mist.symbolic.pipeline_costs import StageTimes, stage_times
from mist.units import GIB

NUM_SHARES: Final = 1000  # shares tried between 0 and 1; the first that ties is then bisected
NUM_BISECTIONS: Final = 60  # from 1e-3 to below the rounding of a double

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTimes:
    """A layout's times, from which its step is computed again under a change."""

    num_micro_batches: int
    schedule: Schedule
    times: StageTimes

    def step_s(self, part: str, shares: Floats) -> Floats:
        """Seconds of a step when a part takes a share of 0..1 less: [X] for `shares` [X]."""
        if part == "bubble":
            whole_s = self._step_s("compute", np.zeros(1))
            return np.asarray(whole_s - shares * (whole_s - self._busy_s()))
        return self._step_s(part, shares)

    def _step_s(self, part: str, shares: Floats) -> Floats:
        left = (1.0 - shares)[:, None]
        parts = {
            name: s * (left if name == part else 1.0) for name, s in self.times.parts_s.items()
        }
        stable_s = np.asarray(sum(parts.values()))
        delta_s = self.times.delta_s * (left if part == "delta" else 1.0)
        weight_s = self.times.weight_s * (left if part == "compute" else 1.0)
        stable_s = np.broadcast_to(stable_s, (len(shares), stable_s.shape[-1]))
        spare_s = spare_time(self.schedule.kind, weight_s)
        fill_s = fill_time(stable_s, spare_s, chunks=self.schedule.vpp)
        return step_time(self.num_micro_batches, stable_s, stable_s + delta_s, fill_s)

    def _busy_s(self) -> float:
        """What the slowest stage works in a step."""
        stable_s = np.asarray(sum(self.times.parts_s.values()))
        slowest = int(stable_s.argmax())
        return float(self.num_micro_batches * stable_s[slowest] + self.times.delta_s[slowest])


def pipeline_of(job: Job, layout: Layout) -> PipelineTimes:
    """The times of a layout."""
    return PipelineTimes(
        num_micro_batches=layout.num_micro_batches,
        schedule=layout.schedule,
        times=stage_times(job, layout),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A part of the step that takes `share` (0..1) less in both layouts."""

    part: str
    share: float


def least_change(other: PipelineTimes, plan: PipelineTimes) -> Change | None:
    """The least share of one part with which both layouts take as long; None if none does."""
    found = [
        Change(part=part, share=share)
        for part in PART_NAMES
        if (share := _share(other, plan, part)) is not None
    ]
    return min(found, key=lambda change: change.share, default=None)


def _share(other: PipelineTimes, plan: PipelineTimes, part: str) -> float | None:
    """The least share of a part with which the other layout is no slower."""

    def behind_s(shares: Floats) -> Floats:
        return other.step_s(part, shares) - plan.step_s(part, shares)

    # The slowest stage may change on the way, so the difference may cross zero more than once: a
    # grid brackets the first crossing before the bisection.
    shares = np.linspace(0.0, 1.0, NUM_SHARES + 1)
    ahead = np.flatnonzero(behind_s(shares) <= 0)
    if not len(ahead):
        return None
    high = float(shares[ahead[0]])
    low = float(shares[max(ahead[0] - 1, 0)])
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if behind_s(np.array([middle]))[0] <= 0 else (middle, high)
    return high


def change_words(other: PipelineTimes, plan: PipelineTimes) -> str:
    """The least change with which two layouts tie, its share rounded up."""
    none = np.zeros(1)
    plan_s = float(plan.step_s("compute", none)[0])
    if float(other.step_s("compute", none)[0]) - plan_s <= ROUNDING_RATIO * plan_s:
        return "equal within rounding"
    change = least_change(other, plan)
    if change is None:
        return "no single part decides"
    per_cent = math.ceil(1000 * change.share) / 10
    return f"ties if {PART_NAMES[change.part]} took {per_cent:.1f} % less in both"


def memory_words(over_bytes: float) -> str:
    """With what a faster layout that does not fit would win, rounded up."""
    return f"wins with {math.ceil(10 * over_bytes / GIB) / 10:.1f} GiB more memory per GPU"
