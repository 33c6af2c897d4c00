"""Finer offload ratios: against every one of them, and against the grid."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mist.pareto.layouts import PricedLayout, plain_layout, stage_plans
from mist.plans.plan import Layout, Limits, fullest_host_bytes
from mist.plans.schedules import step_time
from mist.plans.search_space import NO_RATIOS, PAPER_RATIOS, SearchSpace
from mist.plans.workload import ScheduleKind
from mist.search.tune import Tuned, smallest_peak, tune
from mist.symbolic.estimate import estimate
from mist.symbolic.job import Job
from tests.fast_cases import first_fast
from tests.judging import outputs
from tests.toys import toy_graph, toy_job

LIMITS = Limits(device_bytes=0.6e9, host_bytes=0.5e9)


def tuned(job: Job, space: SearchSpace, limits: Limits = LIMITS) -> Tuned:
    return tune(job, space, limits=limits, num_alternatives=0, progress=lambda _: None)


def fastest(job: Job, layout: PricedLayout, limits: Limits) -> float:
    """Of one stage, with every 64th of the optimizer states and every mix of levels."""
    (plan,), (stage,) = stage_plans(job, layout), layout.stages
    best = np.inf
    mixes = [
        mix
        for mix in itertools.product(range(stage.count + 1), repeat=len(job.levels))
        if sum(mix) == stage.count and sum(n > 0 for n in mix) <= 2
    ]
    for sixty_fourths, mix in itertools.product(range(65), mixes):
        own = replace(
            plan,
            memory=dict(zip(job.levels, mix, strict=True)),
            offload=replace(plan.offload, optimizer=sixty_fourths / 64),
        )
        found = outputs(
            job,
            Layout(
                stages=(own,), num_micro_batches=layout.num_micro_batches, schedule=layout.schedule
            ),
        )
        fits = found["peak_bytes"][0] <= limits.device_bytes
        if fits and found["host_bytes"][0] <= limits.host_bytes:
            step_s = step_time(layout.num_micro_batches, found["stable_s"], found["lone_s"])
            best = min(best, float(step_s))
    return best


@pytest.mark.parametrize("device_bytes", first_fast([0.85e9, 0.7e9]))
def test_equals_every_finer_ratio(device_bytes: float) -> None:
    job = toy_job(toy_graph((3,), vocab=4096, hidden=1024), 1, gpu="l4", global_batch=4)
    space = SearchSpace(
        offload={**NO_RATIOS, "optimizer": (0.0, 0.5, 1.0)}, micro_batch=(1,),
        schedules=(ScheduleKind.ONE_F_ONE_B,),
    )  # fmt: skip
    limits = replace(LIMITS, device_bytes=device_bytes)
    coarse, fine = tuned(job, replace(space, refines=False), limits), tuned(job, space, limits)
    assert fine.best.step_s == pytest.approx(fastest(job, coarse.best, limits), rel=1e-9)
    assert fine.best.step_s < coarse.best.step_s == fine.grid_step_s
    assert fine.lower_bound_s <= fine.best.step_s


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_is_never_slower_and_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = tuple(int(n) for n in rng.integers(1, 4, rng.integers(1, 3)))
    gpu = str(rng.choice(["h100-sxm", "l4", "a100-sxm-40"]))
    job = toy_job(toy_graph(counts, hidden=1024, vocab=1024), int(rng.choice([1, 2, 4])), gpu=gpu,
                  global_batch=8)  # fmt: skip
    least_bytes = smallest_peak(job, SearchSpace(), host_bytes=1e9).peak_bytes
    limits = Limits(device_bytes=least_bytes * float(rng.uniform(1.1, 2.0)), host_bytes=1e9)
    space = SearchSpace(unequal_meshes=bool(rng.integers(2)), micro_batch=(1, 2))
    coarse, fine = (tuned(job, replace(space, refines=r), limits) for r in (False, True))
    steps = []
    for best in (coarse.best, fine.best):
        plans, per_node = stage_plans(job, best), job.platform.gpus_per_node
        judged = estimate(
            job,
            replace(plain_layout(job, best), stages=plans),
        )
        held_bytes = [stage.host_bytes for stage in judged.stages]
        assert fullest_host_bytes(plans, held_bytes, per_node) <= 1e9 * per_node + 1
        assert all(stage.peak_bytes <= limits.device_bytes + 1 for stage in judged.stages)
        steps.append(judged.step_s)
    assert fine.best.step_s <= coarse.best.step_s
    assert steps[1] <= steps[0]
    assert fine.lower_bound_s <= coarse.lower_bound_s <= coarse.best.step_s
    assert fine.best == tuned(job, space, limits).best


def test_all_or_nothing_stays_so() -> None:
    job = toy_job(toy_graph((3,), vocab=4096, hidden=1024), 1, gpu="l4", global_batch=4)
    space = SearchSpace(
        offload={**PAPER_RATIOS, "weights": (0.0,), "grads": (0.0,), "optimizer": (0.0, 1.0)}
    )
    found = tuned(job, space, replace(LIMITS, device_bytes=0.65e9))
    assert {stage.offload.optimizer for stage in found.best.stages} <= {0.0, 1.0}
    assert {stage.offload.weights for stage in found.best.stages} == {0.0}
