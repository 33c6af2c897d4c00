"""The plan that stays good when a number is wrong: least mean regret over draws of the platform.

A search finds what is fastest if every figure is right. Where a figure is a guess, that layout may
be bound to it: copies to host memory that just hide behind compute are exposed whole on a slower
link. So among the layouts within a tolerance of the fastest the one is chosen whose

    regret(draw) = step(layout, draw) / min over the pool of step(other, draw) - 1

is least on the average over fixed draws (`mist.platform.uncertain_figures`). Of layouts whose mean
regrets are equal within a tenth of a per cent, the simplest is chosen (`complexity`).

The pool: the best layouts of each kind from the search with the figures as they stand, from one
with each figure at its worse end, and from one without offloading.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.pareto.layouts import PricedLayout, plain_layout
from mist.plans.plan import Layout
from mist.plans.search_space import OFFLOADED
from mist.platform.uncertain_figures import (
    drawn_profiles,
    pessimistic_profiles,
    varied_profiles,
)
from mist.symbolic.job import Job, on_profiles
from mist.symbolic.pipeline_costs import pipeline_inputs, pipeline_outputs, pipeline_step_s

DEFAULT_TOLERANCE_RATIO: Final = 0.03
TIE_RATIO: Final = 0.001  # of regret: less says nothing of a prediction

TURN_RATIO: Final = 0.01  # of the step: what another figure must gain to be worth a word

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnLayout:
    """A layout of the pool under the draws.

    `steps_s` [D]: its step in each draw. `regrets` [D]: how much slower it is there than the pool's
    best, as a ratio.
    """

    layout: PricedLayout
    steps_s: Floats
    regrets: Floats

    @property
    def mean_regret(self) -> float:
        """On the average over the draws."""
        return float(self.regrets.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a figure decides: once it is `value`, a layout is faster than the one chosen.

    By a share `gain_ratio` of the chosen one's step; negative where it is slower.
    """

    name: str
    path: str
    value: float
    known: float
    layout: PricedLayout
    gain_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustChoice:
    """The layout chosen, the fastest one, and others to set beside them.

    `without_offload` and `one_stage`: the fastest of their kind in the pool, if it has any.
    `turns`: what would make another layout the better choice, most telling first.
    """

    chosen: DrawnLayout
    nominal: DrawnLayout
    without_offload: PricedLayout | None
    one_stage: PricedLayout | None
    turns: tuple[Turn, ...]


def drawn_jobs(job: Job) -> list[Job]:
    """The job on platforms drawn from what its own may be."""
    return [on_profiles(job, profiles) for profiles in drawn_profiles(job.platform.profiles)]


def pessimistic_job(job: Job, share: float = 1.0) -> Job:
    """The job where every uncertain figure is `share` of the way to its worse end."""
    return on_profiles(job, pessimistic_profiles(job.platform.profiles, share))


def robust_choice(
    job: Job, pool: Sequence[PricedLayout], tolerance_ratio: float = DEFAULT_TOLERANCE_RATIO
) -> RobustChoice:
    """Choose among the layouts of a pool, which may hold one twice; it must hold one."""
    judged = _judged(job, pool)
    pool = [each.layout for each in judged]
    chosen, nominal = _least_regret(judged, tolerance_ratio), _nominal(judged)
    return RobustChoice(
        chosen=chosen,
        nominal=nominal,
        without_offload=_fastest(layout for layout in pool if not offloads(layout)),
        one_stage=_fastest(layout for layout in pool if len(layout.stages) == 1),
        turns=_turns(job, pool, chosen.layout, nominal.layout),
    )


def least_regret(job: Job, pool: Sequence[PricedLayout], tolerance_ratio: float) -> PricedLayout:
    """The layout that would be chosen of a pool, and nothing else of the choice."""
    return _least_regret(_judged(job, pool), tolerance_ratio).layout


def _judged(job: Job, pool: Sequence[PricedLayout]) -> list[DrawnLayout]:
    """Each layout once, with its step on the job's own platform and in each draw."""
    known_s, *steps = steps_on([job, *drawn_jobs(job)], pool)
    priced = [replace(one, step_s=float(s)) for one, s in zip(pool, known_s, strict=True)]
    # Searches of other platforms met some of them too: only now are these equal.
    once = [i for i, one in enumerate(priced) if one not in priced[:i]]
    steps_s = np.array(steps)[:, once]
    regrets = steps_s / steps_s.min(axis=1, keepdims=True) - 1.0
    return [
        DrawnLayout(layout=priced[i], steps_s=steps_s[:, k], regrets=regrets[:, k])
        for k, i in enumerate(once)
    ]


def _nominal(judged: Sequence[DrawnLayout]) -> DrawnLayout:
    return min(judged, key=lambda each: each.layout.step_s)


def _least_regret(judged: Sequence[DrawnLayout], tolerance_ratio: float) -> DrawnLayout:
    most_s = _nominal(judged).layout.step_s * (1 + tolerance_ratio)
    able = [each for each in judged if each.layout.step_s <= most_s]
    least = min(each.mean_regret for each in able)
    ties = [each for each in able if each.mean_regret <= least + TIE_RATIO]
    return min(ties, key=lambda each: (complexity(each.layout), each.mean_regret))


def _turns(
    job: Job, pool: Sequence[PricedLayout], chosen: PricedLayout, nominal: PricedLayout
) -> tuple[Turn, ...]:
    """For each figure the end that speaks most for another layout, or most against the fastest."""
    varied = list(varied_profiles(job.platform.profiles))
    steps_s = steps_on([on_profiles(job, each.profiles) for each in varied], pool)
    own, fastest = pool.index(chosen), pool.index(nominal)
    known_gain = 1.0 - nominal.step_s / chosen.step_s
    turns: dict[str, Turn] = {}
    for each, own_s in zip(varied, steps_s, strict=True):
        winner = int(own_s.argmin())
        gain, loss = 1.0 - own_s[[winner, fastest]] / own_s[own]
        # That the fastest layout is faster where a figure is as good as it may be, is no news.
        other = gain >= TURN_RATIO + (known_gain if winner == fastest else 0.0)
        ratio, index = (gain, winner) if other else (loss, fastest)
        known = turns.get(each.name)
        if abs(ratio) < TURN_RATIO or (ratio > 0 and not other):
            continue
        if known is None or abs(ratio) > abs(known.gain_ratio):
            turns[each.name] = Turn(
                name=each.name,
                path=each.path,
                value=each.value,
                known=each.known,
                layout=pool[index],
                gain_ratio=float(ratio),
            )
    return tuple(sorted(turns.values(), key=lambda turn: -abs(turn.gain_ratio)))


def offloads(layout: PricedLayout) -> bool:
    """Whether anything of a layout is in host memory."""
    return complexity(layout)[0] > 0


def complexity(layout: PricedLayout) -> tuple[int, ...]:
    """How much there is to a layout, least first.

    States and activations that are offloaded; kinds of stages; memory levels that a stage mixes;
    stages; whether chunks take turns.
    """
    stages = layout.stages
    away = {name for stage in stages for name in OFFLOADED if getattr(stage.offload, name) > 0}
    kinds = {(*sorted(stage.knobs.items()), stage.offload) for stage in stages}
    levels = max(sum(count > 0 for count in stage.memory.values()) for stage in stages)
    return (len(away), len(kinds), levels, len(stages), layout.schedule.vpp)


def _fastest(layouts: Iterable[PricedLayout]) -> PricedLayout | None:
    return min(layouts, key=lambda layout: layout.step_s, default=None)


def steps_on(jobs: Sequence[Job], layouts: Sequence[PricedLayout]) -> Floats:
    """Seconds of a step of each layout on each platform, [D, P]; `jobs`: one job on all of them."""
    return plain_steps_on(jobs, [plain_layout(jobs[0], layout) for layout in layouts])


def plain_steps_on(jobs: Sequence[Job], layouts: Sequence[Layout]) -> Floats:
    """The same of layouts as plans have them."""
    inputs = pipeline_inputs(jobs[0], layouts)
    outputs = (pipeline_outputs(job.cost, inputs) for job in jobs)
    return np.array(
        [[pipeline_step_s(*pair) for pair in zip(layouts, each, strict=True)] for each in outputs]
    )
