"""`mist plan`: search, judge, explain, assemble."""

from dataclasses import dataclass, replace
from time import perf_counter

from mist.errors import Infeasible, InputError
from mist.estimate import Job, estimate
from mist.explain import layout_words, losing_reason, overflow, step_parts
from mist.plans import Alternative, Plan
from mist.programs import Progress, quiet
from mist.spec import SearchSpace
from mist.symbolic.program import ModelPrograms
from mist.tune import Layout, Point, Tuned, landscape, smallest_peak, stage_plans, tune
from mist.workflow.question import (
    Question,
    compiled,
    job_of,
    limit_of,
    margin_of,
    provenance_of,
    unsearched_plan,
)

MOST_GPUS_SUGGESTED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan, the trace's notes, how long it took, and the layouts judged (for the plot)."""

    plan: Plan
    notes: tuple[str, ...]
    seconds: dict[str, float]
    points: tuple[Point, ...]
    limit_bytes: float


def make_plan(
    question: Question, space: SearchSpace, *, num_alternatives: int = 5, progress: Progress = quiet
) -> Planned:
    """Search the fastest layout that fits and say why others lose.

    Raises Infeasible when nothing fits, naming the tightest stage and the nearest fix.
    """
    start = perf_counter()
    programs = compiled(question, progress)
    job = job_of(question, programs)
    prepared = perf_counter()
    limit = limit_of(job, question)
    try:
        tuned = tune(
            job, space, limit_bytes=limit, num_alternatives=num_alternatives, progress=progress
        )
    except Infeasible:
        fix = _what_fits(programs, space, question)
        raise Infeasible(f"{_infeasible_words(job, space, question)} {fix}") from None
    searched = perf_counter()
    points = landscape(job, space, limit_bytes=limit, within_s=3 * tuned.best.step_s)
    seconds = {"prepare": prepared - start, "search": searched - prepared}
    plan = _assemble(job, question, space, tuned)
    return Planned(
        plan=plan,
        notes=job.facts.notes,
        seconds=seconds,
        points=tuple(points),
        limit_bytes=limit,
    )


def _assemble(job: Job, question: Question, space: SearchSpace, tuned: Tuned) -> Plan:
    num_micro_batches = tuned.best.group.num_micro_batches
    stages = stage_plans(job, tuned.best)
    judged = estimate(job, stages, num_micro_batches)
    winner = step_parts(judged, num_micro_batches)
    provenance = provenance_of(
        job,
        solver="dynamic program, confirmed by HiGHS through PuLP",
        gap=float(f"{tuned.gap:.3g}"),
        lower_bound_s=float(f"{tuned.lower_bound_s:.6g}"),
        search=tuned.statistics
        | {"margin": margin_of(job.platform, question)}
        | {"restricted": ", ".join(space.restrictions) or "nothing"},
    )
    return replace(
        unsearched_plan(job, question, stages, num_micro_batches, judged),
        alternatives=tuple(_alternative(job, other, winner) for other in tuned.others),
        provenance=provenance,
    )


def _alternative(job: Job, layout: Layout, winner: dict[str, float]) -> Alternative:
    num_micro_batches = layout.group.num_micro_batches
    stages = stage_plans(job, layout)
    judged = estimate(job, stages, num_micro_batches)
    return Alternative(
        layout=layout_words(stages, num_micro_batches),
        step_s=judged.step_s,
        peak_bytes=max(stage.peak_bytes for stage in judged.stages),
        reason=losing_reason(step_parts(judged, num_micro_batches), winner),
    )


def _infeasible_words(job: Job, space: SearchSpace, question: Question) -> str:
    """The fullest stage of the layout that comes closest to fitting, and its bytes."""
    layout = smallest_peak(job, space)
    stages, num_micro_batches = stage_plans(job, layout), layout.group.num_micro_batches
    judged = estimate(job, stages, num_micro_batches).stages
    index = max(range(len(judged)), key=lambda i: judged[i].peak_bytes)
    device = job.platform.device.name
    return (
        f"{job.facts.name} does not fit on {question.num_gpus} x {device}. Even in the layout of "
        f"least memory ({layout_words(stages, num_micro_batches)}) "
        f"{overflow(index, judged[index], device, limit_of(job, question))}."
    )


def _what_fits(programs: ModelPrograms, space: SearchSpace, question: Question) -> str:
    """The first doubling of the GPUs on which something fits."""
    num_gpus = 2 * question.num_gpus
    while num_gpus <= MOST_GPUS_SUGGESTED:
        try:
            larger = job_of(replace(question, num_gpus=num_gpus), programs)
            if smallest_peak(larger, space).peak_bytes <= limit_of(larger, question):
                return f"Try --gpus {num_gpus}."
        except InputError:  # a number that fills no nodes, or that the global batch does not divide
            pass
        num_gpus *= 2
    return f"No doubling of the GPUs up to {MOST_GPUS_SUGGESTED} fits."
