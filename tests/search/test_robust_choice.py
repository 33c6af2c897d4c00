"""The choice under draws, against each layout judged by `estimate` on each drawn platform."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from mist.pareto.layouts import PricedLayout, plain_layout
from mist.plans.plan import Limits
from mist.plans.search_space import SearchSpace
from mist.platform.calibration import figure_at, with_values
from mist.platform.profiles import load_shipped
from mist.platform.uncertain_figures import (
    UncertainFigures,
    drawn_profiles,
    pessimistic_profiles,
)
from mist.search.robust_choice import (
    TIE_RATIO,
    complexity,
    offloads,
    pessimistic_job,
    robust_choice,
)
from mist.search.tune import tune
from mist.symbolic.estimate import estimate
from mist.symbolic.job import Job, make_job
from tests.toys import toy_graph, toy_job

TOLERANCE_RATIO = 0.3  # as wide as leaves layouts to choose among
LIMITS = Limits(device_bytes=0.45e9, host_bytes=64e9)


@cache
def job() -> Job:
    return toy_job(toy_graph((6,)), 16, global_batch=64)


@cache
def pool() -> tuple[PricedLayout, ...]:
    found = [
        tune(each, SearchSpace(), limits=LIMITS, num_alternatives=40, progress=lambda _: None)
        for each in (job(), pessimistic_job(job()))
    ]
    return tuple(layout for tuned in found for layout in (tuned.best, *tuned.others))


def judged_steps(layouts: list[PricedLayout]) -> np.ndarray:
    """Seconds [D, P] by another way: a job made anew of each drawn platform."""
    platform = job().platform
    steps = []
    for device, cluster, runtime in drawn_profiles(
        (platform.device, platform.cluster, platform.runtime)
    ):
        drawn = replace(platform, device=device, cluster=cluster, runtime=runtime)
        other = make_job(job().programs, drawn, job().workload)
        plain = [plain_layout(other, layout) for layout in layouts]
        steps.append([estimate(other, layout).step_s for layout in plain])
    return np.array(steps)


def test_the_choice_is_the_one_of_least_mean_regret_within_the_tolerance() -> None:
    layouts = [one for i, one in enumerate(pool()) if one not in pool()[:i]]
    steps_s = judged_steps(layouts)
    regrets = (steps_s / steps_s.min(axis=1, keepdims=True) - 1).mean(axis=0)
    nominal = np.array([estimate(job(), plain_layout(job(), one)).step_s for one in layouts])
    able = nominal <= nominal.min() * (1 + TOLERANCE_RATIO)
    found = robust_choice(job(), pool(), TOLERANCE_RATIO)
    assert found.nominal.layout.step_s == pytest.approx(nominal.min(), rel=1e-5)
    assert found.chosen.mean_regret <= regrets[able].min() + TIE_RATIO + 1e-5
    chosen = next(i for i, one in enumerate(layouts) if one.stages == found.chosen.layout.stages)
    assert able[chosen]
    assert found.chosen.mean_regret == pytest.approx(regrets[chosen], abs=1e-5)
    assert found.chosen.steps_s == pytest.approx(steps_s[:, chosen], rel=1e-5)
    assert regrets[able].max() > regrets[able].min() + TIE_RATIO  # there is something to choose


def test_without_tolerance_the_fastest_is_chosen() -> None:
    found = robust_choice(job(), pool(), tolerance_ratio=0.0)
    assert found.chosen.layout == found.nominal.layout


def test_of_layouts_that_do_as_well_the_simplest_is_chosen() -> None:
    found = robust_choice(job(), pool())
    plain = next(one for one in pool() if not offloads(one))
    twin = replace(plain, stages=tuple(replace(s, num_lower=0) for s in plain.stages))
    both = [twin, replace(twin, stages=tuple(replace(s, lower=s.upper) for s in twin.stages))]
    assert complexity(robust_choice(job(), both).chosen.layout) == min(map(complexity, both))
    assert found.without_offload is not None
    assert not offloads(found.without_offload)


def test_the_best_of_one_stage_is_named() -> None:
    one = robust_choice(job(), pool()).one_stage
    assert one is not None
    single = [layout.step_s for layout in pool() if len(layout.stages) == 1]
    assert one.step_s == pytest.approx(min(single))


@pytest.mark.slow
def test_every_figure_that_is_drawn_is_felt_by_some_layout() -> None:
    platform = job().platform
    profiles = platform.device, platform.cluster, platform.runtime
    rows = load_shipped("ranges.yaml", UncertainFigures).figures
    worst = pessimistic_profiles(profiles)
    plain = [plain_layout(job(), layout) for layout in pool()]
    before = [estimate(job(), layout).step_s for layout in plain]
    for path in {path for row in rows for path in row.paths}:
        device, cluster, runtime = with_values(profiles, {path: figure_at(worst, path)})
        other = replace(platform, device=device, cluster=cluster, runtime=runtime)
        moved = make_job(job().programs, other, job().workload)
        after = [estimate(moved, layout).step_s for layout in plain]
        assert any(a > b for a, b in zip(after, before, strict=True)), path
