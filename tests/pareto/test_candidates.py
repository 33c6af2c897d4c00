"""What the tables say of every stage, against each stage tried by itself."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from mist.pareto.candidates import GroupModel
from mist.pareto.frontier_points import Points, StageMixes
from mist.pareto.layer_ranges import Ranges, layer_ranges, placed
from mist.pareto.offload_ratios import offloading
from mist.pareto.stage_mixes import Mixes
from mist.pareto.strategies import Group, divisors, groups
from mist.plans.memory_levels import USUAL
from mist.plans.plan import DEFAULT_SCHEDULE, Limits
from mist.plans.search_space import NO_RATIOS, SearchSpace
from mist.plans.workload import MemoryLevel, ScheduleKind
from mist.symbolic.columns import position_columns, strategy_columns
from mist.symbolic.compile import compile_model
from mist.symbolic.job import Job, make_job
from tests.fast_cases import first_fast
from tests.toys import adamw_setting, count_columns, toy_graph, toy_job, toy_platform, toy_workload

ALIKE, UNLIKE = (5,), (2, 3)
ANY = Limits(device_bytes=math.inf, host_bytes=math.inf)
RATIOS = {"weights": (0.0, 1.0), "grads": (0.0, 1.0), "optimizer": (0.0, 0.5, 1.0),
          "activations": (0.0, 0.25, 1.0)}  # fmt: skip
PLAIN = (ScheduleKind.ONE_F_ONE_B,)
ONE = SearchSpace(schedules=PLAIN, offload=NO_RATIOS)


def mixes_at(model: GroupModel, stage: int, ranges: Ranges, limits: Limits) -> Mixes:
    in_flight = np.array([model.in_flight(stage)])
    ((_, found),) = model.mixes(stage, in_flight, ranges, limits)
    return found


def stages_alone(
    model: GroupModel, i: int, first: int, counts: list[tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Stage i of every strategy with these layers per level, with every part: [K, mixes]."""
    job, group, own = model.job, model.group, model.strategies
    strategy = strategy_columns(
        job.placement, own.columns, num_stages=group.num_stages, schedule=group.schedule
    )
    terms = {name: term[:, None] for name, term in job.cost.terms(strategy).items()}
    size = group.sizes[0]
    devices = np.array([(i * size, size) for i in range(group.num_stages)])
    layers = sum(counts[0])
    position = position_columns(
        job.placement, devices, layers, group.num_micro_batches, group.schedule
    )
    columns = {name: np.asarray(column)[i] for name, column in position.items()}
    levels = count_columns(job, first, np.array(counts).T)
    return job.cost.stage({**terms, **columns, **levels})


def mixes_of(model: GroupModel, count: int) -> list[tuple[int, ...]]:
    """Layers at each level, at most two levels at once; zero bubble recomputes none."""
    if model.group.schedule.kind is ScheduleKind.ZERO_BUBBLE:
        return [(count, 0, 0)]
    every = itertools.product(range(count + 1), repeat=len(USUAL))
    return [mix for mix in every if sum(mix) == count and sum(n > 0 for n in mix) <= 2]


def best_points(stable_s: np.ndarray, lone_s: np.ndarray) -> list[tuple[float, float]]:
    """(stable, lone) that no other pair beats, by comparing all; twelve digits."""
    pairs = zip(stable_s.tolist(), lone_s.tolist(), strict=True)
    times = {(float(f"{t:.12g}"), float(f"{u:.12g}")) for t, u in pairs}
    return sorted(
        t for t in times if not any(o[0] <= t[0] and o[1] <= t[1] and o != t for o in times)
    )


def models(job: Job, space: SearchSpace) -> list[GroupModel]:
    found = []
    for group in groups(job, space):
        away = offloading(job, group, space, np.arange(len(group.strategies)))
        found.append(GroupModel(job, group, group.strategies.joined(away), space))
    return found


@pytest.mark.parametrize("gpu", ["h100-sxm", "l4"])
@pytest.mark.parametrize("counts", [ALIKE, UNLIKE])
@pytest.mark.parametrize("limit", first_fast([0.9e9, 0.5e9, 1.3e9, 8e9], 2))
def test_frontiers_are_those_of_every_stage_tried(
    counts: tuple[int, ...], limit: float, gpu: str
) -> None:
    job = toy_job(toy_graph(counts, vocab=4096), 2, global_batch=8, gpu=gpu)
    space = SearchSpace(pp=(2,), micro_batch=(2,), offload=RATIOS, schedules=tuple(ScheduleKind))
    assert compared(job, space, limit) >= 3 or limit < 0.6e9


@pytest.mark.parametrize("limit", [0.7e9, 8e9])
def test_frontiers_of_chunks_of_unequal_size(limit: float) -> None:
    job = toy_job(toy_graph((8,), vocab=4096), 2, global_batch=8, gpu="h100-sxm")
    interleaved = (ScheduleKind.INTERLEAVED,)
    space = SearchSpace(
        pp=(2,), micro_batch=(2,), chunks=(2,), schedules=interleaved, offload=RATIOS
    )
    assert compared(job, space, limit, stride=1) >= 3


@pytest.mark.parametrize("limit", [1.0e9, 1.5e9])
def test_frontiers_where_the_optimizers_step_is_the_peak(limit: float) -> None:
    """A step that makes 60 bytes a parameter: more than what activations hold."""
    platform, graph = toy_platform(2), toy_graph(ALIKE, vocab=4096)
    made = replace(platform.runtime.transients.optimizer_bytes_per_param, value=60.0)
    transients = replace(platform.runtime.transients, optimizer_bytes_per_param=made)
    platform = replace(platform, runtime=replace(platform.runtime, transients=transients))
    programs = compile_model(graph, adamw_setting(platform.runtime))
    job = make_job(programs, platform, toy_workload(global_batch=8))
    space = SearchSpace(pp=(1, 2), micro_batch=(2,), offload=NO_RATIOS, schedules=PLAIN)
    assert compared(job, space, limit) >= 3


def compared(job: Job, space: SearchSpace, limit: float, *, stride: int = 2) -> int:
    """How many points of the frontiers there are, all of which are those of stages alone."""
    limits = Limits(device_bytes=limit, host_bytes=0.6e9)
    checked = 0
    for model in models(job, space):
        ranges = layer_ranges(job, model.group.num_stages, least=model.group.schedule.vpp)
        for i in range(model.group.num_stages):
            allowed = placed(ranges, job.num_layers, model.group.num_stages, i)
            table = StageMixes.of(mixes_at(model, i, ranges, limits), model.weight_s(i, ranges))
            for r in np.flatnonzero(allowed)[::stride]:
                first, count = int(ranges.first[r]), int(ranges.count[r])
                alone = stages_alone(model, i, first, mixes_of(model, count))
                fits = (alone["peak_bytes"] <= limit) & (alone["host_bytes"] <= 0.6e9)
                want = best_points(alone["stable_s"][fits], alone["lone_s"][fits])
                got = table.frontier(int(r), table.fits[:, r])
                assert best_points(got.stable_s, got.lone_s) == want
                confirm(model, got, i, first, count)
                checked += len(want)
    return checked


def confirm(model: GroupModel, points: Points, i: int, first: int, count: int) -> None:
    """Every point is what its stage alone is."""
    for p in range(len(points)):
        layers = dict.fromkeys(model.job.levels, 0)
        layers[points.upper[p]] += count - int(points.num_lower[p])
        layers[points.lower[p]] += int(points.num_lower[p])
        alone = stages_alone(model, i, first, [tuple(layers.values())])
        for name in ("stable_s", "lone_s", "peak_bytes", "host_bytes"):
            want = float(alone[name][points.row[p], 0])
            assert float(getattr(points, name)[p]) == pytest.approx(want, rel=1e-9, abs=1e-3)
        if model.group.schedule.kind is ScheduleKind.ZERO_BUBBLE:
            assert points.weight_s[p] == pytest.approx(alone["weight_s"][points.row[p], 0])


@pytest.mark.parametrize("level", [MemoryLevel.NONE, MemoryLevel.FULL])
def test_a_space_of_one_level(level: MemoryLevel) -> None:
    job = toy_job(toy_graph(ALIKE), 4, global_batch=16)
    space = SearchSpace(levels=(level,), schedules=tuple(ScheduleKind))
    for group in groups(job, space):
        assert level is MemoryLevel.NONE or group.schedule.kind is not ScheduleKind.ZERO_BUBBLE
        model = GroupModel(job, group, group.strategies, space)
        ranges = layer_ranges(job, group.num_stages, least=group.schedule.vpp)
        found = mixes_at(model, 0, ranges, ANY)
        assert set(zip(found.upper, found.lower, strict=True)) == {(level, level)}
        assert not found.num_lower.any()


@pytest.mark.slow
def test_ranges_of_unlike_layers_leave_enough_for_the_others() -> None:
    job = toy_job(toy_graph(UNLIKE), 4, global_batch=16)
    ranges = layer_ranges(job, 4)
    for i in range(4):
        rows = placed(ranges, 5, 4, i)
        got = set(zip(ranges.first[rows].tolist(), ranges.count[rows].tolist(), strict=True))
        want = {
            (f, c)
            for f in range(5)
            for c in range(1, 6 - f)
            if (f == 0 if i == 0 else f >= i) and (f + c == 5 if i == 3 else 5 - f - c >= 3 - i)
        }
        assert got >= want
        assert {c for c in got if c not in want} == {(f, c) for f, c in got if c > 2} - want


def test_distinct_ranges_are_one_of_each_sequence_of_kinds() -> None:
    job = toy_job(toy_graph(UNLIKE), 4, global_batch=16)
    ranges = layer_ranges(job, 1)
    kinds = [int(column.argmax()) for column in np.diff(job.kind_prefix, axis=1).T]

    def sequences(of: Ranges) -> list[tuple[int, ...]]:
        pairs = zip(of.first.tolist(), of.count.tolist(), strict=True)
        return [tuple(kinds[first : first + count]) for first, count in pairs]

    distinct, like = ranges.distinct(job)
    assert len(set(sequences(distinct))) == len(distinct) < len(ranges)
    assert [sequences(distinct)[index] for index in like.tolist()] == sequences(ranges)


def rows_of(found: list[Group]) -> set[tuple[int, ...]]:
    return {
        (g.num_stages, g.num_micro_batches, *map(int, row))
        for g in found
        for s in [g.strategies]
        for row in zip(*(s[name] for name in ("tp", "dp", "micro_batch", "zero")), strict=True)
    }


def test_groups_hold_every_legal_strategy_and_no_other() -> None:
    job = toy_job(toy_graph(ALIKE), 8, global_batch=24)
    want = {
        (pp, g, tp, 8 // pp // tp, 24 // g // (8 // pp // tp), z)
        for pp in (1, 2, 4)
        for g in divisors(24)
        for tp in divisors(8 // pp)
        for z in range(4)
        if 24 % (g * (8 // pp // tp)) == 0
        and g >= pp
        and 4096 % tp == 0
        and (z == 0 or 8 // pp // tp > 1)
    }
    assert rows_of(list(groups(job, ONE))) == want


def test_schedules_that_need_stages_alike_have_one_tp() -> None:
    job = toy_job(toy_graph((8,)), 8, global_batch=32)
    space = SearchSpace(schedules=tuple(ScheduleKind))
    found = [g for g in groups(job, space) if g.num_stages == 2]
    kinds = {g.schedule.kind for g in found}
    assert kinds == {
        ScheduleKind.ONE_F_ONE_B,
        ScheduleKind.INTERLEAVED,
        ScheduleKind.ZERO_BUBBLE,
    }  # GPipe is never better
    for group in found:
        if group.schedule != DEFAULT_SCHEDULE:
            assert len(set(group.strategies["tp"])) == 1
        if group.schedule.kind is ScheduleKind.ZERO_BUBBLE:
            assert group.strategies["zero"].max() < 3
        assert group.schedule.vpp * 2 <= 8


def test_gpipe_stands_in_where_1f1b_is_not_allowed() -> None:
    job = toy_job(toy_graph((8,)), 2, global_batch=4)
    space = SearchSpace(schedules=(ScheduleKind.GPIPE,), pp=(2,))
    assert {g.schedule.kind for g in groups(job, space)} == {ScheduleKind.GPIPE}


def test_restrictions_are_kept() -> None:
    job = toy_job(toy_graph(ALIKE), 8, global_batch=32)
    space = SearchSpace(
        tp=(2,), pp=(1, 2), dp=(2, 4), micro_batch=(2,), zero=(1, 2), most={"dp": 2}
    )
    found = list(groups(job, space))
    assert found
    for group in found:
        own = group.strategies
        assert group.num_stages in (1, 2)
        assert tuple(set(own[name]) for name in ("tp", "dp", "micro_batch")) == ({2}, {2}, {2})
        assert set(own["zero"]) <= {1, 2}


def test_offloading_follows_the_runtime() -> None:
    """Torch: weights and gradients together, from ZeRO-2 on; the optimizer at any level."""
    job = toy_job(toy_graph(ALIKE), 4, global_batch=16)
    group = next(g for g in groups(job, SearchSpace(pp=(1,), micro_batch=(4,))) if g)
    away = offloading(job, group, SearchSpace(), np.arange(len(group.strategies)))
    weights, zero = away["weights"], away["zero"]
    assert (weights == away["grads"]).all()
    assert zero[weights > 0].min() == 2
    assert set(zero[weights == 0]) == {0, 1, 2, 3}
    tuples = 8 * 8 - 1  # optimizer x activations, without nothing at all
    base = len(group.strategies)
    high = int((group.strategies["zero"] >= 2).sum())
    alone = group.strategies["dp"] == 1
    more = int(alone.sum()) * 3  # one rank: the other levels stream
    more_high = int(alone.sum()) * 2
    assert len(away) == (base + more) * tuples + (high + more_high) * 5 * 64


def test_ranges_keep_their_rows() -> None:
    ranges = Ranges(first=np.array([0, 1]), count=np.array([2, 3]), alike=False)
    kept = ranges.take(np.array([False, True]))
    assert (kept.first.tolist(), kept.count.tolist(), len(kept)) == ([1], [3], 1)


def test_layers_that_keep_by_checkpointing_offload_no_activations() -> None:
    """A mix with selective layers fits under no strategy with offloaded activations."""
    job = toy_job(num_gpus=2)
    space = SearchSpace(schedules=(ScheduleKind.ONE_F_ONE_B,))
    group = next(iter(groups(job, space)))
    away = offloading(job, group, space, np.arange(len(group.strategies)))
    model = GroupModel(job, group, group.strategies.joined(away), space)
    ranges = layer_ranges(job, group.num_stages)
    limits = Limits(device_bytes=np.inf, host_bytes=np.inf)
    mixes = mixes_at(model, 0, ranges, limits)
    offloads = (model.strategies["activations"][mixes.row] > 0) & mixes.fits.any(axis=1)
    levels = np.array([*zip(mixes.upper, mixes.lower, strict=True)])
    for pair in {*map(tuple, levels.tolist())}:
        offloading_some = offloads[(levels == pair).all(axis=1)].any()
        assert offloading_some == (MemoryLevel.SELECTIVE not in pair)
