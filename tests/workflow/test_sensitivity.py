"""What other layouts would need: the change that is named is made, and both take as long."""

import math

import numpy as np
import pytest

from mist.pareto.layouts import PricedLayout, plain_layout
from mist.plans.breakdown import PART_NAMES
from mist.plans.plan import Limits
from mist.plans.search_space import SearchSpace
from mist.plans.workload import ScheduleKind
from mist.search.tune import tune
from mist.symbolic.job import Job
from mist.workflow.sensitivity import (
    PipelineTimes,
    change_words,
    least_change,
    memory_words,
    pipeline_of,
)
from tests.fast_cases import first_fast
from tests.toys import toy_graph, toy_job

LIMITS = Limits(device_bytes=2.2e9, host_bytes=0.0)


def judged(job: Job, layout: PricedLayout) -> PipelineTimes:
    return pipeline_of(job, plain_layout(job, layout))


def changed_step(layout: PipelineTimes, part: str, share: float) -> float:
    """The step after the change, in the paper's form and with plain loops."""
    g, times = layout.num_micro_batches, layout.times
    num_stages = len(times.delta_s)

    def stage_s(i: int, *, kept: float) -> float:
        return sum(s[i] * (kept if name == part else 1.0) for name, s in times.parts_s.items())

    def total_s(kept: float) -> float:
        t = [stage_s(i, kept=kept) for i in range(num_stages)]
        d = [times.delta_s[i] * (kept if part == "delta" else 1.0) for i in range(num_stages)]
        w = [times.weight_s[i] * (kept if part == "compute" else 1.0) for i in range(num_stages)]
        zero_bubble = layout.schedule.kind is ScheduleKind.ZERO_BUBBLE
        fill = [max(t[i] - 2 * w[i] * zero_bubble, 0) / layout.schedule.vpp for i in range(len(t))]
        return (g - 1) * max(t) + max(t[i] + d[i] + sum(fill[i + 1 :]) for i in range(len(t)))

    if part == "bubble":
        t = [stage_s(i, kept=1.0) for i in range(num_stages)]
        slowest = t.index(max(t))
        return total_s(1.0) - share * (total_s(1.0) - g * t[slowest] - times.delta_s[slowest])
    return total_s(1.0 - share)


@pytest.mark.parametrize("global_batch", first_fast([16, 32]))
def test_the_change_that_is_named_makes_a_tie(global_batch: int) -> None:
    job = toy_job(toy_graph((7,), hidden=2048), 8, gpu="l4", global_batch=global_batch)
    found = tune(
        job, SearchSpace(), limits=LIMITS, num_alternatives=12, progress=lambda _: None, method="dp"
    )
    plan, parts = judged(job, found.best), set()
    for other in found.others:
        own = judged(job, other)
        # The times that are changed are those of the layout as it was searched.
        assert changed_step(own, "compute", 0.0) == pytest.approx(other.step_s, rel=1e-9)
        change = least_change(own, plan)
        if change is None:
            for part in PART_NAMES:
                shares = np.linspace(0, 1, 51)
                assert all(changed_step(own, part, x) > changed_step(plan, part, x) for x in shares)
            continue
        parts.add(change.part)
        tie = [changed_step(layout, change.part, change.share) for layout in (own, plan)]
        assert tie[0] == pytest.approx(tie[1], rel=1e-9)
        for part in PART_NAMES:  # no other part does with less
            for share in np.linspace(0, change.share * (1 - 1e-6), 20):
                assert changed_step(own, part, share) > changed_step(plan, part, share) * (1 - 1e-9)
    assert len(parts) >= 2


def by_hand(num_micro_batches: int, **parts_s: float) -> PipelineTimes:
    """One stage without a delta."""
    from mist.plans.plan import DEFAULT_SCHEDULE
    from mist.symbolic.pipeline_costs import StageTimes

    parts = {name: np.array([s]) for name, s in parts_s.items()}
    times = StageTimes(parts_s=parts, delta_s=np.zeros(1), weight_s=np.zeros(1))
    return PipelineTimes(
        num_micro_batches=num_micro_batches, schedule=DEFAULT_SCHEDULE, times=times
    )


def test_a_change_by_hand() -> None:
    # G = 4: 4 * 3 = 12 s against 4 * 2.5 = 10 s. dp is 1 s against 0.25 s, 0.75 s more in each of
    # four: the gap of 2 s is two thirds of 3 s. Compute is equal in both and decides nothing.
    plan, other = by_hand(4, compute=2.25, dp=0.25), by_hand(4, compute=2.0, dp=1.0)
    change = least_change(other, plan)
    assert change is not None
    assert change.part == "dp"
    assert change.share == pytest.approx(0.5 / 0.75, abs=1e-12)
    assert change_words(other, plan) == (
        "ties if exposed data-parallel collectives took 66.7 % less in both"
    )


def test_no_single_part_and_no_difference_by_hand() -> None:
    plan = by_hand(2, compute=1.0, tp=0.1, dp=0.1)
    assert change_words(by_hand(2, compute=1.0, tp=0.2, dp=0.2), plan) == "no single part decides"
    assert change_words(plan, plan) == "equal within rounding"


@pytest.mark.parametrize(
    ("over_bytes", "words"),
    [(1.0, "0.1"), (3.0 * 2**30, "3.0"), (3.01 * 2**30, "3.1"), (21.14 * 2**30, "21.2")],
)
def test_memory_is_rounded_up(over_bytes: float, words: str) -> None:
    assert memory_words(over_bytes) == f"wins with {words} GiB more memory per GPU"
    assert float(words) * 2**30 >= over_bytes or math.isclose(float(words) * 2**30, over_bytes)
