"""The search against every layout there is, each judged by `estimate`."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from mist.errors import Infeasible, InputError
from mist.pareto.bounds import lower_bound_s
from mist.pareto.candidates import GroupModel
from mist.pareto.layer_ranges import layer_ranges
from mist.pareto.layouts import PricedLayout, stage_plans
from mist.pareto.offload_ratios import offloading
from mist.pareto.strategies import divisors, groups
from mist.plans.memory_levels import CONVERTS
from mist.plans.plan import Layout, Limits, Offload, Schedule, StagePlan
from mist.plans.search_space import NO_RATIOS, SPACES, SearchSpace, narrowed
from mist.plans.workload import HeadMode, MemoryLevel, ScheduleKind
from mist.search.tune import Tuned, landscape, smallest_peak, tune
from mist.symbolic.estimate import estimate
from mist.symbolic.job import Job
from tests.fast_cases import first_fast
from tests.judging import judged
from tests.pareto.boundless import boundless
from tests.toys import toy_graph, toy_job

HOST = 0.5e9
RATIOS = {
    "weights": (0.0, 1.0),
    "grads": (0.0, 1.0),
    "optimizer": (0.0, 1.0),
    "activations": (0.0, 0.5),
}
SCHEDULES = {
    1: [Schedule(kind=ScheduleKind.ONE_F_ONE_B, vpp=1)],
    2: [
        Schedule(kind=ScheduleKind.ONE_F_ONE_B, vpp=1),
        Schedule(kind=ScheduleKind.ZERO_BUBBLE, vpp=1),
        Schedule(kind=ScheduleKind.GPIPE, vpp=1),
        Schedule(kind=ScheduleKind.INTERLEAVED, vpp=2),
    ],
}


def tuned(
    job: Job, space: SearchSpace, device_bytes: float, alternatives: int = 3, **options: object
) -> Tuned:
    return tune(
        job,
        space,
        limits=Limits(device_bytes=device_bytes, host_bytes=HOST),
        num_alternatives=alternatives,
        progress=lambda _: None,
        **options,  # type: ignore[arg-type]
    )


def options_of(
    job: Job, space: SearchSpace, schedule: Schedule, pp: int, g: int, devices: tuple[int, int],
    run: range,
) -> list[StagePlan]:  # fmt: skip
    """All that one stage may do: tp, ZeRO level, memory levels, offload ratios."""
    per_stage, count, found = devices[1], len(run), []
    mixes = [
        mix
        for mix in itertools.product(range(count + 1), repeat=len(job.levels))
        if sum(mix) == count and sum(n > 0 for n in mix) <= 2
    ]
    if schedule.kind is ScheduleKind.ZERO_BUBBLE:  # its split backward pass recomputes nothing
        mixes = [mix for mix in mixes if mix[0] == count]
    ratios = itertools.product(*(space.offload[name] for name in NO_RATIOS))
    num_nodes = per_stage // job.platform.gpus_per_node
    replicas = space.dp_replicate or ((1, num_nodes) if num_nodes > 1 else (1,))
    is_last = devices[0] + per_stage == job.platform.num_gpus
    heads = space.head if is_last else (HeadMode.NONE,)
    knobs = (divisors(per_stage), range(4), replicas, heads, ratios)
    for tp, zero, copies, head, away in itertools.product(*knobs):
        dp = per_stage // tp
        micro_batch = job.workload.global_batch // (g * dp)
        if not micro_batch:
            continue
        offload = Offload(**dict(zip(NO_RATIOS, away, strict=True)))
        columns = {
            "tp": tp, "dp": dp, "micro_batch": micro_batch, "zero": zero, "num_stages": pp,
            "dp_replicate": copies, "head": tuple(HeadMode).index(head),
            "num_micro_batches": g, "schedule": schedule.kind.value, "chunks": schedule.vpp,
            **dict(zip(NO_RATIOS, away, strict=True)),
        }  # fmt: skip
        if dp == 1 and zero and not any(away):
            continue  # nothing to shard over, nothing that streams
        if not all(rule.mask(columns).all() for rule in job.rules):
            continue
        found += [
            StagePlan(
                layers=runs_of(run, schedule.vpp),
                devices=devices, dp=dp, tp=tp, sp=tp > 1, cp=1, ep=1,
                micro_batch=micro_batch, zero=zero, head=head,  # type: ignore[arg-type]
                memory=dict(zip(job.levels, mix, strict=True)), offload=offload,
                dp_replicate=copies,
            )
            for mix in mixes
            # Converted layers: no tensor parallelism, and what they keep stays on the device.
            if (tp == 1 and not offload.activations)
            or not any(n for level, n in zip(job.levels, mix, strict=True) if level in CONVERTS)
        ]  # fmt: skip
    return found


def runs_of(run: range, chunks: int) -> tuple[tuple[int, int], ...]:
    """Any runs with this many layers: where all layers are alike their place says nothing."""
    if chunks == 1:
        return ((run.start, len(run)),)
    share = [len(run) // chunks + (c < len(run) % chunks) for c in range(chunks)]
    return tuple((0, count) for count in share)


def fastest(job: Job, space: SearchSpace, limit: float) -> float:
    """Step time of the best layout that fits, by trying all of them."""
    best = math.inf
    for pp, g in itertools.product((1, 2), divisors(job.workload.global_batch)):
        for schedule in SCHEDULES[pp]:
            if schedule.vpp > 1 and job.facts.num_kinds > 1:
                continue
            if schedule.vpp not in space.chunks:
                continue
            best = min(best, fastest_pipeline(job, space, schedule, pp, g, limit))
    return best


def fastest_pipeline(
    job: Job, space: SearchSpace, schedule: Schedule, pp: int, g: int, limit: float
) -> float:
    """Stages do not share memory: only those that fit are combined, all of them."""
    best = math.inf
    alike = schedule.kind in (ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE)
    for cut in range(1, job.num_layers) if pp == 2 else (job.num_layers,):
        cuts = [range(cut), range(cut, job.num_layers)][:pp]
        if min(map(len, cuts)) < schedule.vpp:
            continue
        fitting = []
        for position, run in enumerate(cuts):
            size = job.platform.num_gpus // pp
            peaks = peaks_of(job, space, schedule, pp, g, (position * size, size), run)
            fitting.append([o for o, peak in peaks if peak <= limit])
        for stages in itertools.product(*fitting):
            if alike and len({stage.tp for stage in stages}) > 1:
                continue
            if job.facts.tied and not shares_ends(stages):
                continue
            best = min(
                best,
                judged(job, Layout(stages=stages, num_micro_batches=g, schedule=schedule)).step_s,
            )
    return best


def shares_ends(stages: Sequence[StagePlan]) -> bool:
    """Whether each rank of the first stage has the part of the embedding that its like in the last
    has of the head, where they are one matrix."""
    first, last = stages[0], stages[-1]
    return (first.dp, first.tp, first.zero > 0) == (last.dp, last.tp, last.zero > 0)


Peaks = list[tuple[StagePlan, float]]
_PEAKS: dict[tuple[object, ...], tuple[Job, Peaks]] = {}  # with its job, whose identity is the key


def peaks_of(
    job: Job, space: SearchSpace, schedule: Schedule, pp: int, g: int, devices: tuple[int, int],
    run: range,
) -> Peaks:  # fmt: skip
    """What one stage may do with what the host holds, and its peak: the same under every limit."""
    key = (id(job), repr(space), schedule, pp, g, devices, run)
    if key not in _PEAKS:
        options = options_of(job, space, schedule, pp, g, devices, run)
        judged = [(option, *peak_and_host(job, option, schedule, pp, g)) for option in options]
        _PEAKS[key] = job, [(option, peak) for option, peak, host in judged if host <= HOST]
    return _PEAKS[key][1]


def peak_and_host(
    job: Job, stage: StagePlan, schedule: Schedule, pp: int, g: int
) -> tuple[float, float]:
    position = stage.devices[0] // stage.devices[1]
    other = replace(stage, devices=((1 - position) * stage.devices[1], stage.devices[1]))
    pipeline = (stage, other) if position == 0 else (other, stage)
    layout = Layout(stages=pipeline[:pp], num_micro_batches=g, schedule=schedule)
    own = judged(job, layout).stages[position]
    return own.peak_bytes, own.host_bytes


@cache
def job_of(
    counts: tuple[int, ...], num_gpus: int, global_batch: int, *, converts: bool = False
) -> Job:
    """Of a toy with a large vocabulary: the same one under every limit."""
    graph = toy_graph(counts, vocab=8192)
    # Of short sequences the host decides: then no converted layer is faster.
    longer = {"seq_len": 16384} if converts else {}
    return toy_job(graph, num_gpus, converts=converts, global_batch=global_batch, **longer)


def confirm(job: Job, found: Tuned, limit: float) -> None:
    """The winner is what its estimate says, and its proof holds."""
    best = found.best
    own = estimate(
        job,
        Layout(
            stages=stage_plans(job, best),
            num_micro_batches=best.num_micro_batches,
            schedule=best.schedule,
        ),
    )
    assert own.step_s == pytest.approx(best.step_s, rel=1e-5)
    assert max(stage.peak_bytes for stage in own.stages) <= limit * (1 + 1e-9)
    assert found.lower_bound_s <= best.step_s <= found.lower_bound_s * (1 + 1e-6)
    assert [o.step_s for o in found.others] == sorted(o.step_s for o in found.others)
    assert all(o.step_s >= best.step_s and o.kind != best.kind for o in found.others)


@pytest.mark.parametrize("offload", first_fast([RATIOS, NO_RATIOS]), ids=["offloaded", "kept"])
@pytest.mark.parametrize("counts", first_fast([(1, 2), (3,)]))
@pytest.mark.parametrize(
    "limit",
    [0.55e9, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (0.75e9, 1.1e9, 8e9))],
)
def test_equals_exhaustive_search(
    counts: tuple[int, ...], limit: float, offload: dict[str, tuple[float, ...]]
) -> None:
    num_gpus, batch = (2, 4) if offload is NO_RATIOS else (1, 2)
    job = job_of(counts, num_gpus, batch)
    space = SearchSpace(offload=offload, schedules=tuple(ScheduleKind))
    want = fastest(job, space, limit)
    try:
        found = tuned(job, space, limit)
    except Infeasible:
        assert math.isinf(want)
        return
    assert found.best.step_s == pytest.approx(want, rel=6e-6)  # estimates keep six digits
    confirm(job, found, limit)


@pytest.mark.parametrize(
    ("counts", "limit"),
    [
        ((1, 2), 4e9),
        # Hundreds of thousands of pipelines are tried one by one.
        pytest.param((1, 2), 2.5e9, marks=pytest.mark.slow),
        pytest.param((3,), 2.5e9, marks=pytest.mark.slow),
        pytest.param((3,), 8e9, marks=pytest.mark.slow),
    ],
)
def test_equals_exhaustive_search_with_converted_layers(
    counts: tuple[int, ...], limit: float
) -> None:
    """They may be faster than layers that keep everything: no bound may cut them off."""
    job = job_of(counts, 2, 4, converts=True)
    assert set(CONVERTS) & set(job.levels)
    space = SearchSpace(levels=tuple(MemoryLevel), offload=NO_RATIOS, schedules=tuple(ScheduleKind))
    found = tuned(job, space, limit)
    assert found.best.step_s == pytest.approx(fastest(job, space, limit), rel=6e-6)
    confirm(job, found, limit)
    assert any(level in CONVERTS for s in stage_plans(job, found.best) for level in s.levels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "heads"),
    [
        (0.7e9, [HeadMode.IN_FORWARD]),
        # As a stage of two, whose other one has no head.
        (0.6e9, [HeadMode.NONE, HeadMode.IN_FORWARD]),
        (8e9, [HeadMode.NONE]),
    ],
)
def test_equals_exhaustive_search_with_heads(limit: float, heads: list[HeadMode]) -> None:
    graph = toy_graph((3,), vocab=8192)
    job = toy_job(graph, 2, heads=True, global_batch=4)
    space = SearchSpace(head=tuple(HeadMode), offload=NO_RATIOS)
    found = tuned(job, space, limit)
    assert found.best.step_s == pytest.approx(fastest(job, space, limit), rel=6e-6)
    confirm(job, found, limit)
    assert [stage.head for stage in stage_plans(job, found.best)] == heads


@pytest.mark.slow
def test_bounds_know_that_converted_layers_may_be_faster() -> None:
    job = job_of((3,), 2, 4, converts=True)
    space = SearchSpace(levels=tuple(MemoryLevel), offload=NO_RATIOS)
    plain, best = (tuned(job, each, math.inf).best for each in (SearchSpace(), space))
    assert best.step_s < plain.step_s
    bounds = [
        lower_bound_s(job, group, space.levels)
        for group in groups(job, space)
        if (group.num_stages, group.num_micro_batches) == (1, best.num_micro_batches)
    ]
    assert len(best.stages) == 1
    assert bounds
    assert min(bounds) <= best.step_s


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "vocab", "batch", "limit", "dearer"),
    [
        ((1, 1), 1024, 4, 0.335e9, True),  # an untied model has unlike ends here, 24 % faster
        ((1, 1), 1024, 4, 0.6e9, False),
        ((2,), 8192, 8, 0.46e9, True),
        ((1, 1), 1024, 8, 0.335e9, True),
    ],
)
def test_tied_models_equal_exhaustive_search(
    counts: tuple[int, ...], vocab: int, batch: int, limit: float, dearer: bool
) -> None:
    """Two stages of two GPUs: both ends divide the matrix that they share in the same way."""
    job = toy_job(toy_graph(counts, vocab=vocab, tied=True), 4, global_batch=batch)
    space = SearchSpace(pp=(2,), offload=NO_RATIOS, schedules=tuple(ScheduleKind))
    want = fastest_of_two(job, space, limit)
    found = tuned(job, space, limit)
    assert found.best.step_s == pytest.approx(want, rel=6e-6)  # estimates keep six digits
    confirm(job, found, limit)
    assert shares_ends(stage_plans(job, found.best))
    free = replace(job, facts=replace(job.facts, tied=False))  # the same costs
    assert (step_of(free, space, limit) < want * (1 - 1e-4)) is dearer
    for step_s in (want * (1 - 1e-4), want * (1 + 1e-4)):
        layouts = list(landscape(job, space, limits=limits_of(limit), within_s=step_s))
        assert all(shares_ends(stage_plans(job, layout)) for layout in layouts)


def limits_of(device_bytes: float) -> Limits:
    return Limits(device_bytes=device_bytes, host_bytes=HOST)


def fastest_of_two(job: Job, space: SearchSpace, limit: float) -> float:
    """Of two stages, under every schedule."""
    return min(
        fastest_pipeline(job, space, schedule, 2, g, limit)
        for g in divisors(job.workload.global_batch)
        for schedule in SCHEDULES[2]
    )


@pytest.mark.slow
def test_ends_of_unequal_sizes_share_no_matrix() -> None:
    """Three stages on four GPUs have 2 + 1 + 1 or 1 + 1 + 2 of them: never like ends."""
    levels = (MemoryLevel.NONE, MemoryLevel.FULL)
    space = SearchSpace(
        pp=(3,), offload=NO_RATIOS, levels=levels, zero=(0, 2),
        schedules=(ScheduleKind.ONE_F_ONE_B,), unequal_meshes=True,
    )  # fmt: skip
    for tied in (False, True):
        job = toy_job(toy_graph((4,), vocab=8192, tied=tied), 4, global_batch=8)
        assert math.isinf(step_of(job, space, 8e9)) is tied


@pytest.mark.parametrize(
    ("how", "word", "num_gpus", "num_layers"),
    [
        ("fixed", "vpp=2", 2, 4),
        ("fixed", "dp-replicate=2", 4, 3),
        ("most", "optimizer=0.6", 1, 2),
    ],
)
def test_a_narrowed_search_equals_the_enumeration_of_what_is_left(
    how: str, word: str, num_gpus: int, num_layers: int
) -> None:
    """At the least memory that is possible, and with more."""
    away = word.startswith("optimizer")
    ratios = {**NO_RATIOS, "optimizer": (0.0, 0.3, 1.0)}
    space = SearchSpace(offload=ratios if away else NO_RATIOS)
    words = {"fixed": [], "most": [], "forbid": [], how: [word]}
    space = narrowed(replace(space, refines=False), **words)
    graph = toy_graph((num_layers,), hidden=1920, vocab=1024)
    job = toy_job(graph, num_gpus, global_batch=num_gpus)
    least = smallest_peak(job, space, host_bytes=HOST).peak_bytes
    used = set()
    for room in (1.0 + 1e-6, 2.0):
        found = tuned(job, space, room * least)
        assert found.best.step_s == pytest.approx(fastest(job, space, room * least), rel=6e-6)
        confirm(job, found, room * least)
        stages = stage_plans(job, found.best)
        assert {len(stage.layers) for stage in stages} == {2 if word == "vpp=2" else 1}
        assert {stage.dp_replicate for stage in stages} == {2 if "replicate" in word else 1}
        used |= {stage.offload.optimizer for stage in stages}
    assert max(used) == (0.6 if away else 0.0)


def fastest_unequal(job: Job, space: SearchSpace, limit: float) -> float:
    """The best of three stages of which one has two of four devices, by trying all of them."""
    best, schedule = math.inf, SCHEDULES[1][0]
    for g, sizes in itertools.product((4, 8), [(2, 1, 1), (1, 1, 2)]):  # aligned to their size
        begins = [sum(sizes[:i]) for i in range(3)]
        for cuts in [(1, 2), (1, 3), (2, 3)]:
            runs = [range(cuts[0]), range(*cuts), range(cuts[1], job.num_layers)]
            options = [
                options_of(job, space, schedule, 3, g, (begin, size), run)
                for begin, size, run in zip(begins, sizes, runs, strict=True)
            ]
            fitting = []
            for position, own in enumerate(options):
                others = [own_[0] for own_ in options if own_]
                fitting.append([
                    o for o in own
                    if len(others) == 3 and peak_of(job, others, position, o, g) <= limit
                ])  # fmt: skip
            for stages in itertools.product(*fitting):
                best = min(best, judged(job, Layout(stages=stages, num_micro_batches=g)).step_s)
    return best


def peak_of(job: Job, others: list[StagePlan], position: int, stage: StagePlan, g: int) -> float:
    stages = [stage if i == position else other for i, other in enumerate(others)]
    return judged(job, Layout(stages=stages, num_micro_batches=g)).stages[position].peak_bytes


@pytest.mark.parametrize(
    "limit", [0.45e9, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (0.6e9, 8e9))]
)
def test_unequal_meshes_equal_exhaustive_search(limit: float) -> None:
    job = toy_job(toy_graph((4,), vocab=8192), 4, global_batch=8)
    levels = (MemoryLevel.NONE, MemoryLevel.FULL)
    space = SearchSpace(
        pp=(3,), offload=NO_RATIOS, levels=levels, some_layers=False, zero=(0, 2),
        schedules=(ScheduleKind.ONE_F_ONE_B,), unequal_meshes=True,
    )  # fmt: skip
    want = fastest_unequal(job, space, limit)
    if math.isinf(want):
        with pytest.raises(Infeasible):
            tuned(job, space, limit)
        return
    found = tuned(job, space, limit)
    stages = stage_plans(job, found.best)
    assert sorted(stage.devices[1] for stage in stages) == [1, 1, 2]
    own = estimate(job, Layout(stages=stages, num_micro_batches=found.best.num_micro_batches))
    assert own.step_s == pytest.approx(found.best.step_s, rel=1e-5)
    assert found.lower_bound_s <= want * (1 + 1e-5)
    assert own.step_s == pytest.approx(want, rel=1e-3)  # transfers of unlike stages, in the gap


def step_of(job: Job, space: SearchSpace, limit: float) -> float:
    try:
        return tuned(job, space, limit).best.step_s
    except Infeasible:
        return math.inf


@pytest.mark.slow
def test_more_memory_is_never_slower() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    steps = [step_of(job, SearchSpace(), limit) for limit in (0.2e9, 1e9, 1.5e9, 2e9, 6e9, 80e9)]
    assert steps == sorted(steps, reverse=True)
    assert math.isfinite(steps[-1])


def test_a_search_for_less_than_is_known_finds_the_best_or_nothing() -> None:
    job = job_of((3,), 2, 4)
    space = SearchSpace(offload=NO_RATIOS, schedules=(ScheduleKind.ONE_F_ONE_B,))
    best_s = tuned(job, space, 2e9).best.step_s
    assert tuned(job, space, 2e9, 0, within_s=best_s * 1.001).best.step_s == best_s
    with pytest.raises(Infeasible):
        tuned(job, space, 2e9, 0, within_s=best_s)


@pytest.mark.slow
def test_a_larger_space_is_never_slower() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    spaces = [
        SearchSpace(tp=(1,), pp=(2,), zero=(0,), levels=(MemoryLevel.NONE,), offload=NO_RATIOS),
        SearchSpace(tp=(1,), pp=(2,), zero=(0,), offload=NO_RATIOS),
        SearchSpace(tp=(1,), pp=(2,), offload=NO_RATIOS),
        SearchSpace(pp=(2,), offload=NO_RATIOS),
        SearchSpace(pp=(2,)),
        SearchSpace(),
    ]
    steps = [step_of(job, space, 2e9) for space in spaces]
    assert steps == sorted(steps, reverse=True)


SUBSETS = [
    ("3d", "megatron"), ("3d", "aceso"), ("3d", "plain"), ("megatron", "plain"),
    ("deepspeed", "plain"), ("fsdp", "plain"), ("aceso", "plain"), ("paper", "plain"),
    ("deepspeed", "paper"), ("fsdp", "paper"), ("plain", "whole"),
    ("paper", "paper+tempo"), ("paper+tempo", "mist"), ("plain", "mist"),
]  # fmt: skip


@pytest.mark.parametrize("seed", first_fast(range(100), 0))
def test_a_space_never_beats_one_that_holds_it(seed: int) -> None:
    """Pairs of spaces on a hundred random jobs: sizes, memory and machines of all kinds."""
    rng = np.random.default_rng(seed)
    counts = tuple(int(n) for n in rng.integers(1, 5, rng.integers(1, 3)))
    hidden = int(rng.choice([256, 1024, 4096]))
    graph = toy_graph(counts, hidden=hidden, vocab=int(rng.choice([1024, 8192])))
    gpu = str(rng.choice(["h100-sxm", "l4", "a100-sxm-40"]))
    num_gpus, batch = int(rng.choice([1, 2, 4])), int(rng.choice([4, 8]))
    job = toy_job(graph, num_gpus, gpu=gpu, converts=True, global_batch=batch)
    least = smallest_peak(job, SearchSpace(), host_bytes=HOST).peak_bytes
    limit = least * float(rng.choice([1.2, 1.6, 2.5, 10.0]))
    steps = {name: step_of(job, space, limit) for name, space in SPACES.items()}
    for small, large in SUBSETS:
        assert steps[large] <= steps[small] * (1 + 1e-9), (small, large, steps)
    assert math.isfinite(steps["mist"]) or limit < 1.5 * least  # what offloads needs a host


@pytest.mark.slow
def test_smallest_peak_is_what_no_layout_undercuts() -> None:
    job = toy_job(toy_graph((3,), vocab=8192), 2, global_batch=4)
    space = SearchSpace(offload=RATIOS, schedules=(ScheduleKind.ONE_F_ONE_B,))
    found = smallest_peak(job, space)
    rng = np.random.default_rng(0)
    for pp, g in itertools.product((1, 2), divisors(4)):
        cuts = [range(3)] if pp == 1 else [range(1), range(1, 3)]
        schedule = SCHEDULES[1][0]
        options = [
            options_of(job, space, schedule, pp, g, (i * 2 // pp, 2 // pp), run)
            for i, run in enumerate(cuts)
        ]
        for _ in range(60 if all(options) else 0):
            stages = tuple(own[rng.integers(len(own))] for own in options)
            own = judged(job, Layout(stages=stages, num_micro_batches=g))
            assert max(s.peak_bytes for s in own.stages) >= found.peak_bytes * (1 - 1e-9)


@pytest.mark.slow
def test_bounds_do_not_change_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    num_pruned = 0
    for limit in (0.9e9, 1.3e9, 4e9):
        with_bounds = tuned(job, SearchSpace(), limit, alternatives=0)
        with monkeypatch.context() as patch:
            patch.setattr("mist.search.visits.lower_bound_s", lambda *_: 0.0)
            patch.setattr(
                "mist.search.stage_frontiers.window",
                lambda m, ranges, step_s, **_: ranges.count > 0,
            )
            patch.setattr(
                "mist.search.stage_frontiers.least_step_s",
                lambda m, r, stable_s, lone_s: 0 * lone_s,
            )
            patch.setattr("mist.search.stage_frontiers.capacity", boundless)
            patch.setattr("mist.pareto.uniform_layouts.capacity", boundless)
            patch.setattr("mist.search.tune.capacity", boundless)
            without = tuned(job, SearchSpace(), limit, alternatives=0)
        assert stage_plans(job, with_bounds.best) == stage_plans(job, without.best)
        assert with_bounds.best.step_s == without.best.step_s
        assert without.statistics["groups_pruned"] == 0
        num_pruned += with_bounds.statistics["groups_pruned"]
    assert num_pruned > 0


def test_a_search_that_is_cut_short_says_how_good_it_is() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    whole = tuned(job, SearchSpace(), 1.3e9)
    cut = tuned(job, SearchSpace(), 1.3e9, is_late=lambda: True)
    assert cut.statistics["groups_left"] > 0 == whole.statistics["groups_left"]
    assert cut.lower_bound_s <= whole.best.step_s <= cut.best.step_s
    assert isinstance(cut.best, PricedLayout)


def test_ctrl_c_gives_the_best_so_far() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    seen: list[str] = []

    def stop(message: str) -> None:
        seen.append(message)
        if len(seen) == 3:
            raise KeyboardInterrupt

    limits = Limits(device_bytes=80e9, host_bytes=HOST)
    found = tune(job, SearchSpace(), limits=limits, num_alternatives=0, progress=stop)
    assert found.statistics["groups_left"] > 0
    assert found.lower_bound_s <= found.best.step_s
    with pytest.raises(KeyboardInterrupt):
        tune(
            job, SearchSpace(), limits=Limits(device_bytes=0.4e9, host_bytes=1.0),
            num_alternatives=0, progress=lambda _: (_ for _ in ()).throw(KeyboardInterrupt),
        )  # fmt: skip


def test_whole_layers_are_offloaded() -> None:
    """Torch offloads layers whole: a share is rounded up, and the estimate is of what is left."""
    job = toy_job(toy_graph((5,), vocab=1024), 1, global_batch=4)
    space = SearchSpace(offload={**NO_RATIOS, "weights": (0.25,), "grads": (0.25,)}, zero=(3,))
    found = tuned(job, space, 80e9)
    plans = stage_plans(job, found.best)
    assert {plan.offload.weights for plan in plans} <= {0.0, 0.4}


def test_landscape_reaches_both_sides_of_the_limit() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    limits = Limits(device_bytes=1.5e9, host_bytes=HOST)
    points = list(landscape(job, SearchSpace(), limits=limits, within_s=math.inf))
    assert min(point.peak_bytes for point in points) < 1.5e9 < max(p.peak_bytes for p in points)


def test_whole_layers_stay_within_a_limit() -> None:
    """Of five layers 30 % are two, which are 40 %."""
    job = toy_job(toy_graph((5,), vocab=1024), 1, global_batch=4)
    anything = Limits(device_bytes=math.inf, host_bytes=math.inf)
    ratios = {**NO_RATIOS, "weights": (0.0, 0.3), "grads": (0.0, 0.3)}
    for most, offloads in ((0.3, False), (0.39, False), (0.4, True)):
        space = SearchSpace(offload=ratios, most={"weights": most, "grads": most}, zero=(3,))
        group = next(groups(job, space))
        away = offloading(job, group, space, np.arange(len(group.strategies)))
        assert {*away["weights"]} == {0.3}
        model = GroupModel(job, group, away, space)
        ranges = layer_ranges(job, 1)
        ((_, mixes),) = model.by_place(ranges.take(ranges.count == 5), anything)
        assert mixes.fits.any() == offloads


def test_the_cloud_of_pipelines_is_of_the_schedules_that_are_searched() -> None:
    """Four stages of one layer or more: 1F1B keeps 4, 3, 2, 1 micro-batches, GPipe all 16."""
    job = toy_job(toy_graph((8,)), 4, global_batch=16)
    space = SearchSpace(pp=(4,), micro_batch=(1,))
    points = list(landscape(job, space, limits=Limits(device_bytes=1.5e9, host_bytes=HOST),
                            within_s=math.inf))  # fmt: skip
    kinds = {ScheduleKind.ONE_F_ONE_B, ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE}
    assert {point.schedule.kind for point in points} == kinds
    for point in points:
        own = estimate(
            job,
            Layout(
                stages=stage_plans(job, point),
                num_micro_batches=point.num_micro_batches,
                schedule=point.schedule,
            ),
        )
        assert max(s.peak_bytes for s in own.stages) == pytest.approx(point.peak_bytes, rel=1e-8)
    eager = [
        point for point in points
        if point.schedule.kind is ScheduleKind.ONE_F_ONE_B and
        all(stage.upper is stage.lower is MemoryLevel.NONE for stage in point.stages)
    ]  # fmt: skip
    (plain,) = eager[:1]
    gpipe = estimate(
        job, Layout(stages=stage_plans(job, plain), num_micro_batches=16, schedule=SCHEDULES[2][2])
    )
    assert plain.peak_bytes < 0.5 * max(stage.peak_bytes for stage in gpipe.stages)


def test_the_cloud_of_another_runtime_is_what_it_can_run() -> None:
    """Megatron has stages alike: eight layers on four stages are two each, never 3, 2, 2, 1."""
    job = toy_job(toy_graph((8,)), 4, runtime="megatron", global_batch=16)
    limits = Limits(device_bytes=1.5e9, host_bytes=HOST)
    points = list(landscape(job, SearchSpace(pp=(4,)), limits=limits, within_s=math.inf))
    assert {point.schedule.kind.value for point in points} == {"1f1b", "interleaved"}
    assert {stage.count for point in points for stage in point.stages} == {2}
    least = smallest_peak(job, SearchSpace(pp=(4,)))
    assert {stage.count for stage in least.stages} == {2}
    assert least.peak_bytes <= min(point.peak_bytes for point in points)


def test_a_batch_that_does_not_factorise() -> None:
    job = toy_job(toy_graph((3,)), 8, global_batch=5)
    with pytest.raises(InputError) as error:
        tuned(job, SearchSpace(pp=(1,), tp=(1,), restrictions=("pp=1", "tp=1")), 80e9)
    assert str(error.value) == (
        "--global-batch 5: no (dp, micro-batch, micro-batches) factorises it on 8 GPUs "
        "with pp=1, tp=1. Try --global-batch 8."
    )


@pytest.mark.parametrize(
    ("fixed", "counts", "message"),
    [
        (
            "dp-replicate=2 zero=0",
            (3,),
            "Nothing can run with dp-replicate=2, zero=0: dp_replicate 2 of dp 4 at ZeRO-0: states "
            "that have copies are also divided; use ZeRO-1 or more, and less than dp.",
        ),
        (
            "checkpoint=drop-norm tp=2",
            (3,),
            "Nothing can run with checkpoint=drop-norm, tp=2: tp 2: drop-norm layers keep all when "
            "tensor parallelism divides them; use tp 1, or checkpoint none or selective or "
            "sac-half or sdpa-only or full.",
        ),
        (
            "vpp=2",
            (2, 2),
            "Nothing can run with vpp=2: chunks take schedule interleaved, 2 or more stages, "
            "layers that are all alike, and a layer for each chunk of each stage.",
        ),
        (
            "schedule=zero-bubble pp=2 zero=3",
            (3,),
            "Nothing can run with schedule=zero-bubble, pp=2, zero=3: schedule zero-bubble with "
            "ZeRO-3 computes wrong gradients without an error (parameters are gone when the weight "
            "gradients run). Use ZeRO-2, or 1f1b.",
        ),
    ],
)
def test_a_space_in_which_every_layout_breaks_a_rule(
    fixed: str, counts: tuple[int, ...], message: str
) -> None:
    job = toy_job(toy_graph(counts), 4, global_batch=8, converts=True)
    space = narrowed(SPACES["mist"], fixed=fixed.split(), most=[], forbid=[])
    for search in (lambda: tuned(job, space, 80e9), lambda: smallest_peak(job, space)):
        with pytest.raises(InputError) as error:
            search()
        assert str(error.value) == message


def test_a_tp_that_breaks_a_rule() -> None:
    job = toy_job(toy_graph((3,)), 8, global_batch=24)
    with pytest.raises(InputError) as error:
        tuned(job, SearchSpace(tp=(3,)), 80e9)
    assert str(error.value) == (
        "tp 3 does not divide the sequence of 2048 tokens, which runtime torch shards with it. "
        "tp 3 does not divide the 4096 MLP width of toy. "
        "tp 3 does not divide the 8 GPUs per node of dgx-h100."
    )


def test_copies_in_each_node_are_found_where_they_are_faster() -> None:
    """Two nodes under ZeRO-3: many micro-batches of few tokens gather parameters across nodes."""
    job = toy_job(toy_graph((8,), hidden=8192), 16, global_batch=128, seq_len=256)
    space = SearchSpace(pp=(1,), tp=(1,), zero=(3,), micro_batch=(1,), offload=NO_RATIOS)
    free, one = (
        tuned(job, replace(space, dp_replicate=copies), 200e9, alternatives=0).best
        for copies in (None, (1,))
    )
    assert [stage.dp_replicate for stage in stage_plans(job, free)] == [2]
    assert free.step_s < one.step_s


def test_the_time_limit_holds_while_groups_are_listed() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    limits = Limits(device_bytes=80e9, host_bytes=HOST)
    asked = {"limits": limits, "num_alternatives": 0, "progress": lambda _: None}

    def over_after(number: int) -> Callable[[], bool]:
        calls = itertools.count(1)
        return lambda: number <= next(calls) <= number + 1

    with pytest.raises(InputError) as refused:
        tune(job, SearchSpace(), **asked, is_over=over_after(3))
    assert str(refused.value) == (
        f"--time-limit: no layout of {job.facts.name} that fits was found in time, in 0 of 3 "
        "groups of layouts or more. Allow more time, or restrict more."
    )
    whole = tune(job, SearchSpace(), **asked)
    # Over while it lists only: what is listed is searched, and nothing is known of the others.
    over = iter([False, False, True])
    cut = tune(job, SearchSpace(), **asked, is_over=lambda: next(over, False))
    assert cut.statistics["groups"] == 3 < whole.statistics["groups"]
    assert cut.lower_bound_s == 0.0 < whole.lower_bound_s
