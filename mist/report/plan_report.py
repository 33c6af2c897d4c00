"""What a report shows of a plan: the plan itself, and what was judged anew for its pictures."""

from dataclasses import dataclass

from mist.plans.host_memory import HostNeed
from mist.plans.plan import Limits, Plan, fullest_host_bytes
from mist.plans.provenance import Kind
from mist.report.plan_screen import Sheet
from mist.report.step_timeline import StagePace


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPoint:
    """A layout in words with its step and the peak of its fullest GPU."""

    layout: str
    step_s: float
    peak_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePoint:
    """Another way to run one stage of the plan; `lone_s`: of a single micro-batch."""

    words: str
    stable_s: float
    lone_s: float
    peak_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSteps:
    """The steps of a layout over the draws of what is uncertain."""

    layout: str
    steps_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The plan where one thing is another: its step, its peak and what a plan may use.

    `best`: the fastest that fits then of the layouts that were judged, where it is another one.
    """

    change: str
    tokens_per_s: float
    peak_bytes: float
    limit_bytes: float
    best: str
    best_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What is computed anew for the pictures; the plan file has no room for it.

    `stage_points`: of each stage, in order. `draws`: of the plan first, then of the fastest others.
    """

    paces: tuple[StagePace, ...]
    points: tuple[JudgedPoint, ...]
    stage_points: tuple[tuple[StagePoint, ...], ...]
    draws: tuple[DrawnSteps, ...]
    what_ifs: tuple[WhatIf, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A sheet as the screen shows it, and what only pictures need; None: nothing was judged."""

    sheet: Sheet
    judgement: Judgement | None = None

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.sheet.plan


def sheet_of(plan: Plan) -> Sheet:
    """A sheet of a plan alone: it may use what its margin says, and what it has on the host."""
    margin = plan.provenance.search.get("margin", 0.0)
    usable_bytes = plan.estimate.stages[0].usable_bytes
    hosted = [stage.host_bytes for stage in plan.estimate.stages]
    held_bytes = round(fullest_host_bytes(plan.stages, hosted, plan.cluster.gpus_per_node))
    share = 1.0 - (margin if isinstance(margin, float) else 0.0)
    return Sheet(
        plan=plan,
        limits=Limits(device_bytes=share * usable_bytes, host_bytes=float(held_bytes)),
        host=HostNeed(
            held_bytes=held_bytes,
            loading_bytes=None,
            drawn_bytes=None,
            memory_bytes=max(held_bytes, 1),
            limit_bytes=held_bytes,
            kind=Kind.GUESS,
            source="the plan, which was made within the memory of its nodes",
        ),
    )
