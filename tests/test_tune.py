"""The search against every layout there is, each judged by `estimate`."""

import itertools
import math

import pytest

from mist.errors import Infeasible, InputError
from mist.estimate import Job, estimate
from mist.pareto.space import divisors
from mist.plans import MemoryLevel, Offload, StagePlan
from mist.spec import SearchSpace
from mist.tune import landscape, smallest_peak, stage_plans, tune
from tests.toys import toy_graph, toy_job


def every_layout(job: Job, pp: int, num_micro_batches: int) -> list[tuple[StagePlan, ...]]:
    """All mixes of stages with pp stages: layers, tp, ZeRO level, recomputed layers."""
    per_stage = job.platform.num_gpus // pp
    layouts = []
    for counts in itertools.product(range(1, job.num_layers + 1), repeat=pp):
        if sum(counts) != job.num_layers:
            continue
        choices = []
        for i, count in enumerate(counts):
            options = []
            for tp, zero, full in itertools.product(
                divisors(per_stage), range(4), range(count + 1)
            ):
                dp = per_stage // tp
                micro_batch = job.workload.global_batch // (num_micro_batches * dp)
                columns = {
                    "tp": tp,
                    "dp": dp,
                    "micro_batch": micro_batch,
                    "zero": zero,
                    "num_stages": pp,
                    "num_micro_batches": num_micro_batches,
                }
                if dp == 1 and zero:
                    continue  # nothing to shard over: the search does not ask for it
                if not all(rule.mask(columns).all() for rule in job.rules):
                    continue
                options.append(
                    StagePlan(
                        layers=((sum(counts[:i]), count),),
                        devices=(i * per_stage, per_stage),
                        dp=dp,
                        tp=tp,
                        sp=tp > 1,
                        cp=1,
                        ep=1,
                        micro_batch=micro_batch,
                        zero=zero,  # type: ignore[arg-type]
                        head="eager",
                        memory={MemoryLevel.EAGER: count - full, MemoryLevel.FULL: full},
                        offload=Offload(),
                    )
                )
            choices.append(options)
        layouts += list(itertools.product(*choices))
    return layouts


def fastest(job: Job, limit: float) -> float:
    """Step time of the best layout that fits, by trying all of them."""
    best = math.inf
    for pp, num_micro_batches in itertools.product((1, 2), divisors(job.workload.global_batch)):
        for stages in every_layout(job, pp, num_micro_batches):
            judged = estimate(job, stages, num_micro_batches)
            if max(stage.peak_bytes for stage in judged.stages) <= limit:
                best = min(best, judged.step_s)
    return best


@pytest.mark.parametrize("counts", [(3,), (1, 2)])
@pytest.mark.parametrize("limit", [0.75e9, 1.1e9, 8e9])
def test_equals_exhaustive_search(counts: tuple[int, ...], limit: float) -> None:
    job = toy_job(toy_graph(counts, vocab=8192), 2, global_batch=4)
    want = fastest(job, limit)
    try:
        tuned = tune(
            job, SearchSpace(), limit_bytes=limit, num_alternatives=3, progress=lambda _: None
        )
    except Infeasible:
        assert math.isinf(want)
        return
    stages = stage_plans(job, tuned.best)
    judged = estimate(job, stages, tuned.best.group.num_micro_batches)
    assert judged.step_s == pytest.approx(want, rel=2e-6)  # estimates keep six digits
    assert judged.step_s == pytest.approx(tuned.best.step_s, rel=1e-5)
    assert max(stage.peak_bytes for stage in judged.stages) <= limit
    assert tuned.gap <= 1e-6
    assert tuned.lower_bound_s <= tuned.best.step_s
    assert [o.step_s for o in tuned.others] == sorted(o.step_s for o in tuned.others)
    assert all(o.step_s >= tuned.best.step_s and o.kind != tuned.best.kind for o in tuned.others)


def test_more_memory_is_never_slower() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    steps = []
    for limit in (1.0e9, 1.5e9, 2e9, 3e9, 6e9, 80e9):
        try:
            tuned = tune(
                job, SearchSpace(), limit_bytes=limit, num_alternatives=0, progress=lambda _: None
            )
            steps.append(tuned.best.step_s)
        except Infeasible:
            steps.append(math.inf)
    assert steps == sorted(steps, reverse=True)
    assert math.isfinite(steps[-1])


def test_a_larger_space_is_never_slower() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    spaces = [
        SearchSpace(tp=(1,), pp=(2,), zero=(0,), checkpoint="none"),
        SearchSpace(tp=(1,), pp=(2,), zero=(0,)),
        SearchSpace(tp=(1,), pp=(2,)),
        SearchSpace(pp=(2,)),
        SearchSpace(),
    ]
    steps = [
        tune(job, space, limit_bytes=4e9, num_alternatives=0, progress=lambda _: None).best.step_s
        for space in spaces
    ]
    assert steps == sorted(steps, reverse=True)


def test_smallest_peak_is_what_no_layout_undercuts() -> None:
    job = toy_job(toy_graph((3,), vocab=8192), 2, global_batch=4)
    least = min(
        max(stage.peak_bytes for stage in estimate(job, stages, g).stages)
        for pp, g in itertools.product((1, 2), divisors(4))
        for stages in every_layout(job, pp, g)
        if len({(s.tp, s.zero) for s in stages}) == 1
        and all(s.num_full == s.num_layers for s in stages)
    )
    assert smallest_peak(job, SearchSpace()).peak_bytes == pytest.approx(least, rel=1e-9)


def test_landscape_reaches_both_sides_of_the_limit() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    points = list(landscape(job, SearchSpace(), limit_bytes=1.5e9, within_s=math.inf))
    assert min(point.peak_bytes for point in points) < 1.5e9 < max(p.peak_bytes for p in points)


def test_a_batch_that_does_not_factorise() -> None:
    job = toy_job(toy_graph((3,)), 8, global_batch=5)
    with pytest.raises(InputError) as error:
        tune(job, SearchSpace(pp=(1,), tp=(1,), restrictions=("pp=1", "tp=1")), limit_bytes=80e9,
             num_alternatives=0, progress=lambda _: None)  # fmt: skip
    assert str(error.value) == (
        "--global-batch 5: no (dp, micro-batch, micro-batches) factorises it on 8 GPUs "
        "with pp=1, tp=1. Try --global-batch 8."
    )


def test_a_tp_that_breaks_a_rule() -> None:
    job = toy_job(toy_graph((3,)), 8, global_batch=24)
    with pytest.raises(InputError) as error:
        tune(
            job, SearchSpace(tp=(3,)), limit_bytes=80e9, num_alternatives=0, progress=lambda _: None
        )
    assert str(error.value) == (
        "tp 3 does not divide the 8 GPUs per node of dgx-h100. "
        "tp 3 does not divide the 4096 MLP width of toy. "
        "tp 3 does not divide the sequence of 2048 tokens, which runtime torch shards with it."
    )
