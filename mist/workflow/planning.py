"""`mist plan`: search, judge, explain, assemble."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from time import perf_counter, process_time
from types import MappingProxyType
from typing import Final

from mist.errors import Infeasible, InputError, StatesTooLarge
from mist.milp import Method
from mist.pareto.layouts import PricedLayout, plain_layout
from mist.pareto.least_memory import ROUNDING_RATIO, leanest
from mist.pareto.strategies import expressible, priced
from mist.plans.breakdown import layout_words, losing_reason, overflow, step_parts
from mist.plans.host_memory import HostNeed
from mist.plans.objectives import OBJECTIVES, Objective
from mist.plans.plan import Alternative, Limits, Plan
from mist.plans.search_space import SearchSpace
from mist.search.robust_choice import DEFAULT_TOLERANCE_RATIO, RobustChoice
from mist.search.state_room import state_room
from mist.search.tune import Tuned, landscape, smallest_peak, tune
from mist.symbolic.estimate import estimate, priced_stages
from mist.symbolic.job import Job
from mist.symbolic.load_programs import Progress, quiet
from mist.symbolic.program import ModelPrograms
from mist.units import format_bytes, six_digits
from mist.workflow.advice import host_of, less_drawn, smallest, what_fits
from mist.workflow.request import (
    Question,
    compiled,
    job_of,
    limits_of,
    margin_of,
    notes_of,
    provenance_of,
    unsearched_plan,
)
from mist.workflow.robust_planning import Robust, chosen_robustly, robustness_of
from mist.workflow.sensitivity import PipelineTimes, change_words, memory_words, pipeline_of

MOST_EXCLUDED: Final = 3
GRACE_S: Final = 2.0  # after a time limit: to find a first layout, and for the picture
SOLVERS: Final[Mapping[Method, str]] = MappingProxyType(
    {
        "dp": "dynamic program",
        "milp": "HiGHS through PuLP",
        "both": "dynamic program, confirmed by HiGHS through PuLP",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan, the trace's notes, how long it took, and the layouts judged (for the plot)."""

    plan: Plan
    notes: tuple[str, ...]
    seconds: dict[str, float]
    points: tuple[PricedLayout, ...]
    limits: Limits
    host: HostNeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a search makes least, and how far it goes.

    After `time_limit_s` of processor time the best layout so far is the answer, with its gap;
    `GRACE_S` later there is none. A robust plan is within `tolerance_ratio` of the fastest if every
    figure is right. Raises InputError for a limit that is no time.
    """

    objective: Objective = Objective.THROUGHPUT
    num_alternatives: int = 5
    progress: Progress = quiet
    time_limit_s: float = math.inf
    method: Method = "both"
    tolerance_ratio: float = DEFAULT_TOLERANCE_RATIO

    def __post_init__(self) -> None:
        if not self.time_limit_s >= 0:  # nor is nan a limit
            raise InputError(f"--time-limit {self.time_limit_s}: expected seconds from 0 up.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deadline:
    """The processor time of this process at which the limit of a search has passed."""

    end_s: float

    def is_late(self) -> bool:
        return process_time() > self.end_s

    def is_over(self) -> bool:
        return process_time() > self.end_s + GRACE_S


DEFAULT_EFFORT: Final = Effort()


def make_plan(question: Question, space: SearchSpace, effort: Effort = DEFAULT_EFFORT) -> Planned:
    """Search the best layout that fits and say why others lose.

    Raises Infeasible when nothing fits, naming the tightest stage and the nearest fix.
    """
    start = perf_counter()
    # Of one degree that the user set; of several the search leaves out what the model does not do.
    tp = space.tp[0] if space.tp is not None and len(space.tp) == 1 else 1
    question = replace(question, levels=space.levels, heads=space.head)
    programs = compiled(question, effort.progress, tp, has_room=True)
    seconds = {"prepare": perf_counter() - start}
    try:
        planned = search_plan(question, programs, space, effort)
    except StatesTooLarge:  # nor is a layout priced to say what would fit
        raise
    except Infeasible as refusal:
        raise Infeasible(f"{refusal} {what_fits(programs, space, question)}") from None
    return replace(planned, seconds=seconds | planned.seconds)


def search_plan(
    question: Question, programs: ModelPrograms, space: SearchSpace, effort: Effort
) -> Planned:
    """The same, of a model whose costs are known; what refuses it does not say what would fit."""
    start = perf_counter()
    job = job_of(question, programs)
    space = priced(space, job)
    limits = limits_of(job, question)
    deadline = _Deadline(end_s=process_time() + effort.time_limit_s)
    state_room(job, limits).refuse()
    try:
        tuned, host = _search(job, space, limits, effort, deadline)
    except Infeasible:
        raise Infeasible(_infeasible_words(job, space, question)) from None
    row, choice = OBJECTIVES[effort.objective], None
    if row.robust and effort.tolerance_ratio > 0:
        choice = chosen_robustly(job, space, limits, tuned, _robust(job, limits, effort, deadline))
        host = host_of(job, choice.chosen.layout, limits)
    seconds = perf_counter() - start
    within_s = 3 * tuned.best.step_s
    # Of least memory the search looked at some numbers of stages only.
    listed = () if row.least_memory else tuned.listed
    points = tuple(
        landscape(
            job, space, limits=limits, within_s=within_s, is_over=deadline.is_over, listed=listed
        )
    )
    plan = _assemble(job, question, space, (tuned, choice), effort)
    if not row.least_memory:
        plan = replace(plan, excluded=_excluded(job, plan, points, limits))
    return Planned(
        plan=plan,
        notes=(*notes_of(job), *([row.note] if row.note else [])),
        seconds={"search": seconds},
        points=points,
        limits=limits,
        host=host,
    )


def _robust(job: Job, limits: Limits, effort: Effort, deadline: _Deadline) -> Robust:
    return Robust(
        progress=effort.progress,
        can_load=lambda layout: host_of(job, layout, limits).fits,
        is_late=deadline.is_late,
        tolerance_ratio=effort.tolerance_ratio,
    )


def _search(
    job: Job, space: SearchSpace, limits: Limits, effort: Effort, deadline: _Deadline
) -> tuple[Tuned, HostNeed]:
    """The best layout, and what it needs of host memory.

    The search sees to what is offloaded. Where its best cannot be loaded beside that, it searches
    again with room for what each rank draws. Raises Infeasible.
    """

    def best(limits: Limits) -> Tuned:
        allowed, within = _objective(job, space, limits, effort.objective)
        return tune(
            job,
            allowed,
            limits=within,
            num_alternatives=effort.num_alternatives,
            progress=effort.progress,
            is_late=deadline.is_late,
            is_over=deadline.is_over,
            method=effort.method,
        )

    tuned = best(limits)
    host = host_of(job, tuned.best, limits)
    if not host.fits:
        tuned = best(less_drawn(limits, host))
        host = host_of(job, tuned.best, limits)
    if not host.fits:
        raise Infeasible(f"{job.facts.name} cannot be loaded.")
    return tuned, host


def _objective(
    job: Job, space: SearchSpace, limits: Limits, objective: Objective
) -> tuple[SearchSpace, Limits]:
    """Where the fastest layout is the one that the objective asks for.

    Least memory: among layouts whose fullest GPU holds no more than the least that any reaches.
    Raises Infeasible when that does not fit, InputError for a space where it is not known.
    """
    if not OBJECTIVES[objective].least_memory:
        return space, limits
    if space.unequal_meshes:
        raise InputError(
            f"--objective {objective} with --space {space.name}: the least memory of stages of "
            "unequal size is not known. Try --space mist."
        )
    least = leanest(job, space, host_bytes=limits.host_bytes)
    if limits.device_bytes < least.peak_bytes < math.inf:
        raise Infeasible(f"{job.facts.name} does not fit.")
    if least.num_stages and least.peak_bytes < math.inf:
        space = replace(space, pp=least.num_stages)
    bytes_left = min(limits.device_bytes, least.peak_bytes * (1 + ROUNDING_RATIO))
    return space, replace(limits, device_bytes=bytes_left)


def _assemble(
    job: Job,
    question: Question,
    space: SearchSpace,
    found: tuple[Tuned, RobustChoice | None],
    effort: Effort,
) -> Plan:
    tuned, choice = found
    best = choice.chosen.layout if choice else tuned.best
    layout = plain_layout(job, best)
    judged = estimate(job, layout)
    winner = _Winner(
        parts=step_parts(judged, best.num_micro_batches),
        pipeline=pipeline_of(job, layout),
    )
    # The gap is of the fastest plan if every figure is right; a robust one may be slower.
    fastest_s = priced_stages(job, plain_layout(job, tuned.best)).step_s
    # Rounding to six digits must not lift the bound above the step.
    lower_bound_s = min(six_digits(tuned.lower_bound_s), fastest_s)
    provenance = provenance_of(
        job,
        solver=_solver_words(job, space, effort.method, tuned),
        gap=float(f"{1 - lower_bound_s / fastest_s:.3g}"),
        lower_bound_s=lower_bound_s,
        search=tuned.statistics
        | {"margin": margin_of(job.platform, question)}
        | {"restricted": ", ".join(space.restrictions) or "nothing"}
        | {"objective": effort.objective.value}
        | _refined_words(tuned),
    )
    return replace(
        unsearched_plan(job, question, layout, judged),
        alternatives=tuple(
            _alternative(job, other, winner)
            for other in _others(tuned, choice, effort.num_alternatives)
        ),
        provenance=provenance,
        robustness=robustness_of(job, choice, effort.tolerance_ratio) if choice else None,
    )


def _others(tuned: Tuned, choice: RobustChoice | None, num_alternatives: int) -> list[PricedLayout]:
    """Layouts to set beside the plan: the fastest, those that people compare with, other kinds."""
    compared = (tuned.best, choice.without_offload, choice.one_stage) if choice else ()
    told = [choice.chosen.layout.stages if choice else tuned.best.stages]
    others: list[PricedLayout] = []
    for other in (*compared, *tuned.others):
        if other is not None and other.stages not in told:
            told.append(other.stages)
            others.append(other)
    return sorted(others[:num_alternatives], key=lambda other: other.step_s)


def _solver_words(job: Job, space: SearchSpace, method: Method, tuned: Tuned) -> str:
    if not expressible(space, job.platform.runtime).unlike_stages:
        return "none: every layout of like stages was judged"
    words = SOLVERS["milp" if tuned.solver == "milp" else method]
    return f"{words}; stages share the host memory of a node" if tuned.shares_host else words


def _refined_words(tuned: Tuned) -> dict[str, int | float | str]:
    """What finer offload ratios gained, where they did."""
    gain = 1 - tuned.best.step_s / tuned.grid_step_s
    if gain <= 0:
        return {}
    words = f"offload ratios between those of the grid, {gain:.2%} faster; the bound is of the grid"
    return {"refined": words}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Winner:
    """The plan as others are compared with it."""

    parts: dict[str, float]
    pipeline: PipelineTimes


def _alternative(job: Job, layout: PricedLayout, winner: _Winner) -> Alternative:
    plain = plain_layout(job, layout)
    judged = priced_stages(job, plain)
    if judged.step_s < sum(winner.parts.values()) * (1 - ROUNDING_RATIO):
        reason, needs = "faster if every figure is right", "more regret where one is wrong"
    else:
        reason = losing_reason(step_parts(judged, plain.num_micro_batches), winner.parts)
        needs = change_words(pipeline_of(job, plain), winner.pipeline)
    return Alternative(
        layout=layout_words(plain),
        step_s=judged.step_s,
        peak_bytes=max(stage.peak_bytes for stage in judged.stages),
        reason=reason,
        needs=needs,
    )


def _excluded(
    job: Job, plan: Plan, points: Sequence[PricedLayout], limits: Limits
) -> tuple[Alternative, ...]:
    """Of the layouts for the plot those that are faster and do not fit: least over first."""
    best: dict[tuple[object, ...], PricedLayout] = {}
    for layout in points:
        known = best.get(layout.kind)
        faster = layout.step_s < plan.estimate.step_s and layout.peak_bytes > limits.device_bytes
        if faster and (known is None or layout.peak_bytes < known.peak_bytes):
            best[layout.kind] = layout
    nearest = sorted(best.values(), key=lambda layout: layout.peak_bytes)[:MOST_EXCLUDED]
    return tuple(_too_large(job, layout, limits) for layout in nearest)


def _too_large(job: Job, layout: PricedLayout, limits: Limits) -> Alternative:
    return Alternative(
        layout=layout_words(plain_layout(job, layout)),
        step_s=six_digits(layout.step_s),
        peak_bytes=round(layout.peak_bytes),
        reason="does not fit",
        needs=memory_words(layout.peak_bytes - limits.device_bytes),
    )


def _infeasible_words(job: Job, space: SearchSpace, question: Question) -> str:
    """The fullest stage of the layout that comes closest to fitting, and its bytes.

    And the host memory that would do, where it is what binds.
    """
    limits, device = limits_of(job, question), job.platform.device.name
    layout, host = smallest(job, space, limits)
    words = f"{job.facts.name} does not fit on {question.num_gpus} x {device}."
    if not host.fits:
        return f"{words} It cannot be loaded in host memory: it {host.over_words}. Try {host.fix}."
    plain = plain_layout(job, layout)
    judged = priced_stages(job, plain).stages
    index = max(range(len(judged)), key=lambda i: judged[i].peak_bytes)
    more = _host_words(job, space, limits)
    return (
        f"{words} {f'{more} Within it, even' if more else 'Even'} in the layout of least memory "
        f"({layout_words(plain)}) "
        f"{overflow(index, judged[index], device, limits.device_bytes)}."
    )


def _host_words(job: Job, space: SearchSpace, limits: Limits) -> str:
    """What host memory the layout of least memory needs to fit the devices; "" if it never does."""
    anywhere = smallest_peak(job, space)
    if anywhere.peak_bytes > limits.device_bytes:
        return ""
    fitting = [anywhere, *_less_offloaded(job, space, anywhere, limits)]
    hosts = [host_of(job, each, limits) for each in fitting]
    host = min(hosts, key=lambda host: host.needed_bytes)
    return (
        f"With offload it would need {format_bytes(host.needed_bytes)} of the "
        f"{format_bytes(host.limit_bytes)} of host memory per node that a plan may use "
        f"({host.limit_bytes / host.memory_bytes:.0%} of {format_bytes(host.memory_bytes)}, "
        f"{host.kind}: {host.source}). Try {host.fix}."
    )


def _less_offloaded(
    job: Job, space: SearchSpace, layout: PricedLayout, limits: Limits
) -> Iterator[PricedLayout]:
    """What still fits the devices with less of a layout's states in host memory."""
    for weights, optimizer in product(space.offload["weights"], space.offload["optimizer"]):
        stages = tuple(
            replace(
                stage,
                offload=replace(
                    stage.offload,
                    weights=min(stage.offload.weights, weights),
                    grads=min(stage.offload.grads, weights),
                    optimizer=min(stage.offload.optimizer, optimizer),
                ),
            )
            for stage in layout.stages
        )
        less = replace(layout, stages=stages)
        judged = priced_stages(job, plain_layout(job, less))
        if all(stage.peak_bytes <= limits.device_bytes for stage in judged.stages):
            yield less
