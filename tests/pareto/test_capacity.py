"""What positions can take, against the stages of every pipeline that the table of mixes allows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest

from mist.pareto.bounds import fastest_layers, lower_bound_s
from mist.pareto.candidates import GroupModel
from mist.pareto.capacity import Capacity, capacity
from mist.pareto.frontier_points import StageMixes
from mist.pareto.layer_ranges import Ranges, layer_ranges, placed
from mist.pareto.offload_ratios import offloading
from mist.pareto.strategies import Floats, Ints, groups
from mist.plans.plan import Limits
from mist.plans.schedules import fill_time, spare_time, step_time
from mist.plans.search_space import SearchSpace
from mist.symbolic.job import make_job
from tests.fast_cases import first_fast
from tests.toys import toy_graph, toy_job

HOST = 64e9


def models(counts: tuple[int, ...]) -> list[GroupModel]:
    """Groups of several schedules, with some of the ways to offload."""
    job = toy_job(toy_graph(counts), 4, global_batch=16)
    space, found = SearchSpace(), []
    for seed, group in enumerate(list(groups(job, space))[::2]):
        away = offloading(job, group, space, np.arange(len(group.strategies)))
        rows = np.random.default_rng(seed).random(len(away)) < 0.05
        strategies = group.strategies.joined(away.take(rows))
        found.append(GroupModel(job, group, strategies, space))
    return found


def tables_of(model: GroupModel, ranges: Ranges, limits: Limits) -> list[StageMixes]:
    """The mixes of each stage; what does not fit or cannot stand there has no `fits`."""
    job, group, found = model.job, model.group, {}
    for stages, mixes in model.by_place(ranges, limits):
        table = StageMixes.of(mixes, model.weight_s(int(stages[0]), ranges))
        for stage in stages.tolist():
            allowed = placed(ranges, job.num_layers, group.num_stages, stage)
            found[stage] = replace(table, fits=table.fits & allowed)
    return [found[stage] for stage in range(group.num_stages)]


def partitions(model: GroupModel, ranges: Ranges) -> Iterator[tuple[int, ...]]:
    """Every way to deal all layers out to the stages, as columns of ranges."""
    num_layers, num_stages = model.job.num_layers, model.group.num_stages
    for columns in product(range(len(ranges)), repeat=num_stages):
        count = ranges.count[list(columns)]
        starts = np.cumsum(count) - count
        in_place = ranges.alike or (starts == ranges.first[list(columns)]).all()
        if count.sum() == num_layers and in_place:
            yield columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """N pipelines with the same layers: columns of ranges [S], strategies [N, S], seconds [N]."""

    columns: tuple[int, ...]
    strategies: Ints
    step_s: Floats


def pipelines(
    model: GroupModel, ranges: Ranges, limits: Limits, rng: np.random.Generator
) -> Iterator[Sampled]:
    """Pipelines that fit: of one or two stages all, of more some, the fastest stages among them."""
    group, tables = model.group, tables_of(model, ranges, limits)
    for columns in partitions(model, ranges):
        rows = [np.flatnonzero(t.fits[:, c]) for t, c in zip(tables, columns, strict=True)]
        if not all(len(own) for own in rows):
            continue
        if len(rows) <= 2:
            picks = np.stack([axis.ravel() for axis in np.meshgrid(*rows)], axis=-1)
        else:
            fast = [
                own[np.argsort(t.stable_s[own, c] + t.lone_s[own, c])[:8]]
                for own, t, c in zip(rows, tables, columns, strict=True)
            ]
            picks = np.stack([rng.choice(own, 500) for own in fast], axis=-1)
        stage = list(zip(picks.T, tables, columns, strict=True))
        stable_s, lone_s = (
            np.stack([getattr(table, name)[own, c] for own, table, c in stage], axis=-1)
            for name in ("stable_s", "lone_s")
        )
        weight_s = np.array([table.weight_s[c] for _, table, c in stage])
        spare_s = spare_time(group.schedule.kind, weight_s)
        fill_s = fill_time(stable_s, spare_s, chunks=group.schedule.vpp)
        yield Sampled(
            columns=columns,
            strategies=np.stack([table.row[own] for own, table, _ in stage], axis=-1),
            step_s=step_time(group.num_micro_batches, stable_s, lone_s, fill_s),
        )


@pytest.mark.slow
@pytest.mark.parametrize("counts", first_fast([(2, 3), (6,)]))
def test_no_stage_of_a_plan_that_fits_and_is_fast_enough_takes_more(
    counts: tuple[int, ...],
) -> None:
    """Of pipelines of one and two stages every one is looked at."""
    num_short = num_reached = num_plans = 0
    for seed, model in enumerate(models(counts)):
        least = model.group.schedule.vpp
        ranges = layer_ranges(model.job, model.group.num_stages, least=least)
        for device_bytes in (0.4e9, 0.9e9, math.inf):
            limits = Limits(device_bytes=device_bytes, host_bytes=HOST)
            found = list(pipelines(model, ranges, limits, np.random.default_rng(seed)))
            fastest_s = min((each.step_s.min() for each in found), default=1.0)
            assert lower_bound_s(model.job, model.group, model.space.levels) <= fastest_s
            for step_s in (0.7 * fastest_s, fastest_s, 1.1 * fastest_s):
                fine, coarse = (
                    capacity(model, ranges, limits, step_s, coarse=each) for each in (False, True)
                )
                assert (fine.most <= coarse.most).all()
                num_short += int(fine.most.max() > 0 and not fine.suffices)
                for each in found:
                    rows = each.strategies[each.step_s <= step_s]
                    num_plans += len(rows)
                    for stage, column in enumerate(each.columns if len(rows) else ()):
                        load, most = fine.load[column], fine.most[stage, rows[:, stage]]
                        assert (load <= most).all()
                        assert fine.suffices
                        assert fine.useful[rows[:, stage]].all()
                        assert fine.placeable[stage, column]
                        num_reached += int(np.isclose(load, most).any())
    assert num_plans > 1000
    assert num_short > 0
    assert num_reached > 0 or len(counts) > 1  # the bound is not idle


def test_capacities_leave_to_each_position_what_the_others_cannot_take() -> None:
    room = Capacity(
        most=np.array([[2.0, 4.0], [3.0, 1.0], [-np.inf, 1.0]]),
        total=7.0,
        load=np.array([1.0, 2.0, 3.0, 4.0]),
    )
    assert room.suffices
    assert room.least.tolist() == [3.0, 2.0, 0.0]
    assert room.useful.tolist() == [True, True]
    assert room.alone.tolist() == [False, False]
    assert room.placeable.tolist() == [
        [False, False, True, True], [False, True, True, False], [True, False, False, False],
    ]  # fmt: skip
    assert not Capacity(most=room.most, total=9.0, load=room.load).suffices
    assert not Capacity(most=room.most[:, :0], total=0.0, load=room.load).suffices


def test_a_layer_that_keeps_less_may_be_the_fastest_where_activations_leave() -> None:
    job = toy_job(toy_graph((3, 3)), 4, global_batch=8)
    device, links = job.platform.device, {}
    for name in ("host_to_device_bytes_per_s", "device_to_host_bytes_per_s"):
        links[name] = getattr(device, name).times(0.02)
    platform = replace(job.platform, device=replace(device, **links))
    job, space = make_job(job.programs, platform, job.workload), SearchSpace()
    group = next(iter(groups(job, space)))
    away = offloading(job, group, space, np.arange(len(group.strategies)))
    model = GroupModel(job, group, away.take(away.offload["activations"] == 1.0), space)
    terms = model.strategies.terms
    for kind, fastest_s in enumerate(fastest_layers(model)):
        none_s, full_s = (terms[f"term_{kind}_{level}_stable_s"] for level in ("none", "full"))
        assert fastest_s <= full_s.min() < none_s.min()
