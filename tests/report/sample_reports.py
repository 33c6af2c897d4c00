"""A report made by hand: the sample plan, and a judgement of two of everything."""

from mist.plans.plan import Plan
from mist.report.plan_report import (
    DrawnSteps,
    JudgedPoint,
    Judgement,
    PlanReport,
    StagePoint,
    WhatIf,
)
from mist.report.plan_screen import Sheet
from mist.report.step_timeline import StagePace
from mist.units import GIB
from tests.sample_plans import HOST, LIMITS, sample_plan


def pace_of(stable_s: float, once_s: float) -> StagePace:
    """A third of the time forward; a quarter of all is tensor parallelism."""
    return StagePace(
        forward_s={"compute": stable_s / 4, "tp": stable_s / 12},
        backward_s={"compute": stable_s / 2, "tp": stable_s / 6, "dp": 0.0},
        weight_s=stable_s / 4,
        once_s=once_s,
    )


def sample_judgement(plan: Plan) -> Judgement:
    """Of a plan of any stages."""
    stages = plan.estimate.stages
    return Judgement(
        paces=tuple(pace_of(stage.stable_s, stage.delta_s) for stage in stages),
        points=(
            JudgedPoint(layout="pp1 dp8", step_s=6.0, peak_bytes=30.0 * GIB),
            JudgedPoint(layout="pp2 dp4", step_s=7.0, peak_bytes=40.0 * GIB),
            JudgedPoint(layout="pp8 dp1", step_s=4.0, peak_bytes=400.0 * GIB),
        ),
        stage_points=tuple(
            (
                StagePoint(words="the plan", stable_s=0.5, lone_s=0.6, peak_bytes=40.0 * GIB),
                StagePoint(words="ZeRO-3", stable_s=0.6, lone_s=0.6, peak_bytes=20.0 * GIB),
                StagePoint(words="ZeRO-0", stable_s=0.4, lone_s=0.5, peak_bytes=90.0 * GIB),
            )
            for _ in stages
        ),
        draws=(
            DrawnSteps(layout="pp2 dp2", steps_s=(4.5, 5.0, 6.0)),
            DrawnSteps(layout="pp1 dp8", steps_s=(5.5, 5.5, 5.5)),
        ),
        what_ifs=(
            WhatIf(
                change="as it is",
                tokens_per_s=13_000.0,
                peak_bytes=48.0 * GIB,
                limit_bytes=64.0 * GIB,
                best="",
                best_tokens_per_s=13_000.0,
            ),
            WhatIf(
                change="cards of 40 GB",
                tokens_per_s=13_000.0,
                peak_bytes=48.0 * GIB,
                limit_bytes=32.0 * GIB,
                best="pp1 dp8",
                best_tokens_per_s=14_000.0,
            ),
        ),
    )


def sample_report(**changes: object) -> PlanReport:
    """The sample plan with these changes."""
    plan = sample_plan(**changes)
    sheet = Sheet(plan=plan, limits=LIMITS, host=HOST, notes=["no list of layers"])
    return PlanReport(sheet=sheet, judgement=sample_judgement(plan))
