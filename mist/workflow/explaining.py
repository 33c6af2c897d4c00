"""`mist plan --explain`: the search again with a little more of one thing, and in smaller spaces.

Each is a whole search of the fastest plan if every figure is right, so that a gain is what the best
plan gains, not what the chosen layout does. A robust plan may be slower than the fastest.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from mist.errors import Infeasible, InputError
from mist.pareto.layouts import plain_layout
from mist.pareto.strategies import priced
from mist.plans.breakdown import layout_words, short_layout
from mist.plans.plan import Limits
from mist.plans.search_space import SearchSpace
from mist.plans.space_ladder import LADDER
from mist.report.explanation import Explanation, SearchedAgain, bindings_of
from mist.search.tune import tune
from mist.symbolic.job import Job
from mist.symbolic.load_programs import Progress, quiet
from mist.symbolic.program import ModelPrograms
from mist.units import GIB
from mist.workflow.faster_links import faster_jobs
from mist.workflow.planning import Planned
from mist.workflow.request import Question, compiled, job_of, limits_of

MORE: Final = 1.1  # times a bandwidth

Narrow = Callable[[SearchSpace], SearchSpace]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Again:
    """The question that was answered, and how to search again."""

    question: Question
    planned: Planned
    space: SearchSpace
    narrow: Narrow
    programs: ModelPrograms
    progress: Progress


def explanation(
    question: Question,
    planned: Planned,
    space: SearchSpace,
    narrow: Narrow,
    progress: Progress = quiet,
) -> Explanation:
    """Why a plan is what it is.

    `question`: that the plan answers. `space`: that was searched; `narrow`: what the user narrowed,
    which holds for every space of the ladder too. Some ten searches of the fastest plan.
    """
    again = _Again(
        question=question,
        planned=planned,
        space=space,
        narrow=narrow,
        programs=compiled(question),
        progress=progress,
    )
    job = job_of(question, again.programs)
    limits = planned.limits
    return Explanation(
        bindings=tuple(bindings_of(planned.plan, limits, planned.host)),
        now=_fastest(again, "now", job, space, limits),
        marginals=tuple(_marginals(again, job, limits)),
        ladder=tuple(
            _fastest(again, name, job, narrow(rung), limits) for name, rung in LADDER.items()
        ),
    )


def _marginals(again: _Again, job: Job, limits: Limits) -> Iterator[SearchedAgain]:
    """The search with one more GiB, a tenth more bandwidth of each kind, and one more node."""
    more = replace(limits, device_bytes=limits.device_bytes + GIB)
    yield _fastest(again, "1 GiB more memory per GPU", job, again.space, more)
    for where, faster in faster_jobs(job, MORE).items():
        yield _fastest(again, f"10 % more bandwidth {where}", faster, again.space, limits)
    num_gpus = job.platform.num_gpus + job.platform.gpus_per_node
    name = f"one more node ({num_gpus} GPUs)"
    try:
        larger = job_of(replace(again.question, num_gpus=num_gpus), again.programs)
    except InputError as refusal:
        yield SearchedAgain(name=name, step_s=None, tokens_per_s=0.0, words=_sentence(refusal))
        return
    yield _fastest(again, name, larger, again.space, limits_of(larger, again.question))


def _fastest(
    again: _Again, name: str, job: Job, space: SearchSpace, limits: Limits
) -> SearchedAgain:
    """The fastest layout that fits, if any does."""
    again.progress(f"explain: {name}")
    try:
        best = tune(
            job, priced(space, job), limits=limits, num_alternatives=0, progress=quiet, method="dp"
        ).best
    except (Infeasible, InputError) as refusal:
        words = "nothing fits" if isinstance(refusal, Infeasible) else _sentence(refusal)
        return SearchedAgain(name=name, step_s=None, tokens_per_s=0.0, words=words)
    return SearchedAgain(
        name=name,
        step_s=best.step_s,
        tokens_per_s=job.workload.tokens_per_step / best.step_s,
        words=short_layout(layout_words(plain_layout(job, best))),
    )


def _sentence(refusal: Exception) -> str:
    """The first sentence of a refusal."""
    return str(refusal).partition(". ")[0]
