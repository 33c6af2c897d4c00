"""The pool of a robust choice, and what a plan says of it (`mist.search.robust_choice`)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from mist.errors import Infeasible, InputError
from mist.pareto.layouts import PricedLayout, plain_layout
from mist.pareto.strategies import Group
from mist.plans.breakdown import layout_words
from mist.plans.plan import Limits, Regret, Robustness
from mist.plans.search_space import NO_RATIOS, SearchSpace
from mist.platform.quantity import figure_words
from mist.search.robust_choice import (
    DEFAULT_TOLERANCE_RATIO,
    DrawnLayout,
    RobustChoice,
    Turn,
    least_regret,
    offloads,
    pessimistic_job,
    robust_choice,
    steps_on,
)
from mist.search.tune import Tuned, groups_within, tune
from mist.search.visits import Visit, priced_anew
from mist.symbolic.job import Job
from mist.symbolic.load_programs import Progress
from mist.units import six_digits

# How far towards their worse ends figures are taken, until a layout is within the tolerance.
PESSIMISTIC: Final = ((1.0, "each figure at its worse end"), (0.75, "each near it"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Robust:
    """How the searches behind a robust choice go about it.

    `can_load`: whether a layout can be loaded in host memory. `is_late`: no further search then.
    """

    progress: Progress
    can_load: Callable[[PricedLayout], bool]
    is_late: Callable[[], bool]
    tolerance_ratio: float = DEFAULT_TOLERANCE_RATIO


def chosen_robustly(
    job: Job, space: SearchSpace, limits: Limits, tuned: Tuned, how: Robust
) -> RobustChoice:
    """Choose among what the search found, and three to five further searches find.

    One with each uncertain figure at its worse end, of the groups that may have a layout within the
    tolerance of the fastest; if none of its layouts is, one with each three quarters of the way
    there. One without offloading; one of a single stage where no search met one. Then one more at
    the worse ends, of the group of the layout that would be chosen: its ratios were found where
    figures are better.
    """
    most_s = tuned.best.step_s * (1 + how.tolerance_ratio)
    # As the profiles say: what is too slow there is not chosen, however it is elsewhere.
    near = list(groups_within(job, space, tuned.listed, most_s))
    pool = [tuned.best, *tuned.pool]
    search = partial(tune, limits=limits)

    def worse(
        share: float, visits: Sequence[Visit], which: str, within_s: float = math.inf
    ) -> tuple[PricedLayout, ...]:
        there = pessimistic_job(job, share)
        listed = list(priced_anew(there, space, visits))
        faster = partial(search, there, space, listed=listed, within_s=within_s)
        return _found(faster, how, which) if listed else ()

    pool += _worse(job, lambda share, which: worse(share, near, which), most_s)
    if any(offloads(layout) for layout in pool):
        resident = replace(space, offload=NO_RATIOS, refines=False)
        resident_s = _least_resident_s(tuned.pool)
        faster = partial(search, job, resident, listed=tuned.listed, within_s=resident_s)
        pool += _found(faster, how, "no offloading")
    if not any(len(layout.stages) == 1 for layout in pool) and space.pp is None:
        pool += _found(partial(search, job, replace(space, pp=(1,))), how, "one stage")
    best = least_regret(job, pool, how.tolerance_ratio)
    own = [visit for visit in tuned.listed if _is_of(best, visit.group)]
    # Only what beats there those that may be chosen already.
    known_s, worse_s = steps_on([job, pessimistic_job(job)], pool)
    able_s = float(worse_s[known_s <= most_s].min(initial=math.inf))
    pool += worse(1.0, own, "layouts alike, each figure at its worse end", able_s)
    while True:
        choice = robust_choice(job, pool, how.tolerance_ratio)
        layout = choice.chosen.layout
        if layout.stages == tuned.best.stages or how.can_load(layout):
            return choice
        pool = [other for other in pool if other.stages != layout.stages]


def _least_resident_s(layouts: Sequence[PricedLayout]) -> float:
    return min((each.step_s for each in layouts if not offloads(each)), default=math.inf)


def _worse(
    job: Job, search: Callable[[float, str], tuple[PricedLayout, ...]], most_s: float
) -> tuple[PricedLayout, ...]:
    """What searches meet where figures are worse, until a step of `job` takes at most `most_s`."""
    found: tuple[PricedLayout, ...] = ()
    for share, which in PESSIMISTIC:
        more = search(share, which)
        found += more
        if not more or steps_on([job], more).min() <= most_s:
            break
    return found


def _is_of(layout: PricedLayout, group: Group) -> bool:
    """Whether a layout is of a group."""
    stages = layout.stages
    return (
        (len(stages), layout.num_micro_batches, layout.schedule)
        == (group.num_stages, group.num_micro_batches, group.schedule)
        and {stage.num_devices for stage in stages} == {*group.sizes}
        and {stage.knobs["tp"] for stage in stages} <= {*group.strategies["tp"].tolist()}
    )


def _found(search: Callable[..., Tuned], how: Robust, which: str) -> tuple[PricedLayout, ...]:
    """The best of every kind that a search meets; none where it finds none, or it is late.

    `which`: what is searched, for the lines of progress.
    """
    if how.is_late():
        return ()
    try:
        return search(
            num_alternatives=0,
            progress=lambda words: how.progress(f"{which}: {words}"),
            is_late=how.is_late,
            is_over=how.is_late,
            method="dp",
        ).pool
    except (Infeasible, InputError):  # nothing fits, or no group is left
        return ()


def robustness_of(job: Job, choice: RobustChoice, tolerance_ratio: float) -> Robustness:
    """What a plan file says of the choice."""
    chosen, nominal = choice.chosen, choice.nominal
    return Robustness(
        num_draws=len(chosen.steps_s),
        tolerance_ratio=tolerance_ratio,
        median_step_s=six_digits(float(np.median(chosen.steps_s))),
        worst_step_s=six_digits(float(chosen.steps_s.max())),
        regret=_regret(chosen),
        nominal_layout=layout_words(plain_layout(job, nominal.layout)),
        nominal_step_s=six_digits(nominal.layout.step_s),
        nominal_regret=_regret(nominal),
        turns=tuple(_turn_words(job, turn) for turn in choice.turns),
    )


def _regret(judged: DrawnLayout) -> Regret:
    return Regret(
        mean_ratio=round(judged.mean_regret, 4), worst_ratio=round(float(judged.regrets.max()), 4)
    )


def _turn_words(job: Job, turn: Turn) -> str:
    """A sentence: with which figure a layout wins or loses, and by how much."""
    how = "faster" if turn.gain_ratio > 0 else "slower"
    value, known = (
        figure_words(turn.path, each, num_digits=2) for each in (turn.value, turn.known)
    )
    return (
        f"if the {turn.name} were {value} (the profile says {known}), "
        f"{layout_words(plain_layout(job, turn.layout))} "
        f"would be {abs(turn.gain_ratio):.1%} {how}"
    )
