"""`mist report`: a plan file judged anew, and what its pictures need beside the plan.

The plan file has the plan and its prediction. From the same stage cost come, without a search: the
layouts of the Pareto plot, other ways to run each stage, steps over the draws of what is uncertain,
and the plan where one thing is another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.errors import InputError
from mist.pareto.layouts import PricedLayout, plain_layout
from mist.pareto.strategies import priced
from mist.plans.breakdown import layout_words
from mist.plans.file import load_plan
from mist.plans.memory_levels import KEEPS_ALL, LEVELS, memory_of
from mist.plans.objectives import Candidate
from mist.plans.plan import Layout, Limits, Plan, StagePlan
from mist.plans.search_space import SearchSpace
from mist.plans.workload import MemoryLevel
from mist.report.gpu_count_tables import cost_words
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
from mist.search.robust_choice import drawn_jobs, plain_steps_on
from mist.search.tune import landscape
from mist.symbolic.estimate import estimate
from mist.symbolic.job import Job
from mist.symbolic.load_programs import Progress, quiet
from mist.symbolic.pipeline_costs import pipeline_inputs, pipeline_outputs, pipeline_step_s
from mist.symbolic.program import TIME_PARTS
from mist.units import GB
from mist.workflow.checking import check_plan, question_of
from mist.workflow.cluster_choice import offer_of, price_of
from mist.workflow.faster_links import faster_jobs
from mist.workflow.plan_model import UNDER_HERE, ModelAccess, model_of
from mist.workflow.request import Question, job_of, limits_of, prepare

WITHIN: Final = 3.0  # times the step of the plan: layouts that the Pareto plot shows
MOST_OTHERS: Final = 5  # layouts beside the plan whose draws are shown
MOST_POINTS: Final = 600  # of a plot
CARD_BYTES: Final = 80 * GB


def report_of(
    path: str | Path,
    *,
    margin_ratio: float | None = None,
    price: str | None = None,
    access: ModelAccess = UNDER_HERE,
    progress: Progress = quiet,
) -> PlanReport:
    """A plan file with everything that its report shows.

    `price`: USD per GPU hour, None for the cluster's own. Raises what `check_plan` does.
    """
    checked = check_plan(path, margin_ratio=margin_ratio, access=access, progress=progress)
    plan = checked.plan
    source = model_of(load_plan(path), Path(path), access)
    question = question_of(plan, Path(path), source, margin_ratio)
    job = prepare(question)
    sheet = Sheet(
        plan=plan,
        limits=checked.limits,
        host=checked.host,
        notes=checked.notes,
        cost=_cost(plan, job, price),
    )
    return PlanReport(sheet=sheet, judgement=_judgement(job, question, plan))


def _cost(plan: Plan, job: Job, price: str | None) -> str:
    """Dollars per token as a sentence; "" where no price is known."""
    offer = offer_of(str(plan.cluster.num_gpus), None, price, None)
    usd, source = price_of(job.platform, offer, 0)
    return cost_words(
        Candidate(
            num_gpus=plan.cluster.num_gpus,
            cluster=plan.cluster.name,
            device=plan.cluster.device,
            price_usd=usd,
            price_source=source,
            estimate=plan.estimate,
            why="",
        )
    )


def _judgement(job: Job, question: Question, plan: Plan) -> Judgement:
    limits = limits_of(job, question)
    points = list(
        landscape(
            job, priced(SearchSpace(), job), limits=limits, within_s=WITHIN * plan.estimate.step_s
        )
    )
    others = _fastest_of_kinds(job, plan, points, limits)
    return Judgement(
        paces=paces_of(job, plan.layout),
        points=tuple(_point(job, layout) for layout in _thinned(points)),
        stage_points=_stage_points(job, plan),
        draws=_draws(job, plan, others),
        what_ifs=tuple(_what_ifs(_Case(job=job, plan=plan, points=points), question, limits)),
    )


def _thinned(points: Sequence[PricedLayout]) -> list[PricedLayout]:
    """At most `MOST_POINTS`, the fastest at each peak among them, so that the frontier stays."""
    by_step = sorted(points, key=lambda layout: (layout.step_s, layout.peak_bytes))
    least = np.inf
    front: list[PricedLayout] = []
    rest: list[PricedLayout] = []
    for layout in by_step:
        (front if layout.peak_bytes < least else rest).append(layout)
        least = min(least, layout.peak_bytes)
    room = max(MOST_POINTS - len(front), 0)
    return front + rest[:: max(len(rest) // max(room, 1), 1)][:room]


def _point(job: Job, layout: PricedLayout) -> JudgedPoint:
    words = layout_words(plain_layout(job, layout))
    return JudgedPoint(layout=words, step_s=layout.step_s, peak_bytes=layout.peak_bytes)


def _fastest_of_kinds(
    job: Job, plan: Plan, points: Sequence[PricedLayout], limits: Limits
) -> list[Layout]:
    """The fastest few that fit, of unlike kinds, other than the plan."""
    best: dict[tuple[object, ...], PricedLayout] = {}
    for layout in points:
        known = best.get(layout.kind)
        if layout.peak_bytes <= limits.device_bytes and (
            known is None or layout.step_s < known.step_s
        ):
            best[layout.kind] = layout
    plain = (
        plain_layout(job, layout) for layout in sorted(best.values(), key=lambda one: one.step_s)
    )
    others = [layout for layout in plain if tuple(layout.stages) != plan.stages]
    return others[:MOST_OTHERS]


def paces_of(job: Job, layout: Layout) -> tuple[StagePace, ...]:
    """How long each stage works forward and backward, by part; together its stable time.

    Exposed collectives and copies count to the backward pass, kernel launches and transfers to both
    by halves.
    """
    inputs = pipeline_inputs(job, [layout])
    (outputs,) = pipeline_outputs(job.cost, inputs)
    costs = job.cost.costs(inputs.strategy)
    last = len(layout.stages) - 1
    paces = []
    for i, stage in enumerate(layout.stages):
        kinds = job.facts.layer_kinds()
        blocks = [str(kinds[x]) for first, n in stage.layers for x in range(first, first + n)]
        blocks += ["embed"] * (i == 0) + ["head"] * (i == last)
        whole = {part: float(outputs[f"{part}_s"][i]) for part in TIME_PARTS}
        forward = {
            "compute": sum(float(costs[f"cost_{x}_forward_s"][i]) for x in blocks),
            "tp": sum(float(costs[f"cost_{x}_tp_forward_s"][i]) for x in blocks),
            "launch": whole["launch"] / 2,
            "p2p": whole["p2p"] / 2,
        }
        paces.append(
            StagePace(
                forward_s=forward,
                backward_s={part: s - forward.get(part, 0.0) for part, s in whole.items()},
                weight_s=float(outputs["weight_s"][i]),
                once_s=float(outputs["lone_s"][i] - outputs["stable_s"][i]),
            )
        )
    return tuple(paces)


def _stage_points(job: Job, plan: Plan) -> tuple[tuple[StagePoint, ...], ...]:
    """Other ways to run each stage: ZeRO levels, memory levels, optimizer on the host.

    All stages change at once: what one of them costs does not depend on the others.
    """
    levels = priced(SearchSpace(), job).levels
    variants = list(_variants(plan, [x for x in levels if x in job.platform.runtime.levels]))
    layouts = [
        replace(plan.layout, stages=tuple(_varied(stage, change) for stage in plan.stages))
        for change in variants
    ]
    outputs = pipeline_outputs(job.cost, pipeline_inputs(job, [plan.layout, *layouts]))
    names = ["the plan", *(_variant_words(change) for change in variants)]
    return tuple(
        tuple(
            StagePoint(
                words=name,
                stable_s=float(each["stable_s"][i]),
                lone_s=float(each["lone_s"][i]),
                peak_bytes=float(each["peak_bytes"][i]),
            )
            for name, each in zip(names, outputs, strict=True)
        )
        for i in range(len(plan.stages))
    )


_Variant = tuple[
    int, MemoryLevel, float, float
]  # ZeRO, memory level, share of its layers, on the host


def _variants(plan: Plan, levels: Sequence[MemoryLevel]) -> Iterator[_Variant]:
    shares = (0.25, 0.5, 0.75, 1.0)
    zeros = range(4) if plan.stages[0].dp > 1 else (0,)
    for zero, level, hosted in product(zeros, levels, (0.0, 0.5, 1.0)):
        for share in shares if LEVELS[level].repeats != "nothing" else (1.0,):
            yield zero, level, share, hosted


def _varied(stage: StagePlan, change: _Variant) -> StagePlan:
    zero, level, share, hosted = change
    memory = memory_of(stage.num_layers, KEEPS_ALL)
    moved = round(share * stage.num_layers)
    memory[KEEPS_ALL] -= moved
    memory[level] += moved
    return replace(
        stage,
        zero=zero,  # type: ignore[arg-type]  # of ZERO_LEVELS
        dp_replicate=stage.dp_replicate if zero else 1,
        memory=memory,
        offload=replace(stage.offload, weights=0.0, grads=0.0, optimizer=hosted, activations=0.0),
    )


def _variant_words(change: _Variant) -> str:
    zero, level, share, hosted = change
    words = f"ZeRO-{zero}, memory level {level} in {share:.0%} of the layers"
    return f"{words}, optimizer {hosted:.0%} on the host" if hosted else words


def _draws(job: Job, plan: Plan, others: Sequence[Layout]) -> tuple[DrawnSteps, ...]:
    layouts = [plan.layout, *others]
    steps_s = plain_steps_on(drawn_jobs(job), layouts)
    return tuple(
        DrawnSteps(layout=layout_words(layout), steps_s=tuple(map(float, steps_s[:, i])))
        for i, layout in enumerate(layouts)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A plan, and layouts from which another might be chosen."""

    job: Job
    plan: Plan
    points: Sequence[PricedLayout]


def _what_ifs(case: _Case, question: Question, limits: Limits) -> Iterator[WhatIf]:
    """The plan with twice the bandwidth, more memory, and half the sequence."""
    job, plan = case.job, case.plan
    yield _what_if("as it is", job, case, limits)
    platform = job.platform
    for where, other in faster_jobs(job, 2.0).items():
        yield _what_if(f"twice the bandwidth {where}", other, case, limits)
    share = limits.device_bytes / platform.usable_bytes
    twice = CARD_BYTES if platform.device.memory_bytes.value < CARD_BYTES * 0.9 else 2 * CARD_BYTES
    more = replace(limits, device_bytes=share * twice)
    yield _what_if(f"cards of {twice / GB:.0f} GB", job, case, more)
    seq_len = plan.workload.seq_len // 2
    try:
        half = job_of(replace(question, seq_len=seq_len), job.programs)
    except InputError:  # below what the model was traced for
        return
    yield _what_if(f"half the sequence ({seq_len})", half, case, limits)


def _what_if(change: str, job: Job, case: _Case, limits: Limits) -> WhatIf:
    judged = estimate(job, case.plan.layout)
    best, best_s = "", judged.step_s
    pool = sorted(case.points, key=lambda layout: layout.step_s)[:MOST_POINTS]
    plain = [plain_layout(case.job, layout) for layout in pool]
    for layout, columns in zip(plain, _priced(job, plain), strict=True):
        step_s = pipeline_step_s(layout, columns)
        if step_s < best_s and columns["peak_bytes"].max() <= limits.device_bytes:
            best, best_s = layout_words(layout), step_s
    return WhatIf(
        change=change,
        tokens_per_s=judged.tokens_per_s,
        peak_bytes=max(stage.peak_bytes for stage in judged.stages),
        limit_bytes=limits.device_bytes,
        best=best,
        best_tokens_per_s=job.workload.tokens_per_step / best_s,
    )


def _priced(job: Job, layouts: Sequence[Layout]) -> list[dict[str, NDArray[np.float64]]]:
    return pipeline_outputs(job.cost, pipeline_inputs(job, layouts)) if layouts else []
