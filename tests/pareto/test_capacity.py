"""What positions can take, against every stage that the table of mixes lists."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mist.pareto.bounds import fastest_layers, least_step_s
from mist.pareto.candidates import GroupModel
from mist.pareto.capacity import Capacity, capacity
from mist.pareto.frontier_points import stacked
from mist.pareto.layer_ranges import Ranges, layer_ranges, placed
from mist.pareto.strategies import Floats, groups, offloading
from mist.plans.plan import Limits
from mist.plans.search_space import SearchSpace
from mist.symbolic.job import make_job
from tests.toys import toy_graph, toy_job

HOST = 64e9
STEPS_S = (0.02, 0.05, 0.2)


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


def most_taken(
    model: GroupModel, ranges: Ranges, load: Floats, limits: Limits
) -> dict[float, Floats]:
    """For each step the most that a stage [S] takes under a strategy [K], of all its mixes."""
    job, group = model.job, model.group
    shape = (group.num_stages, len(model.strategies))
    found = {step_s: np.full(shape, -np.inf) for step_s in STEPS_S}
    for stages, mixes in model.by_place(ranges, limits):
        table = stacked(mixes, model.weight_s(int(stages[0]), ranges))
        least_s = least_step_s(model, ranges, table.stable_s, table.lone_s)
        for stage in stages.tolist():
            fits = table.fits & placed(ranges, job.num_layers, group.num_stages, stage)
            for step_s, most in found.items():
                taken = np.where(fits & (least_s <= step_s), load, -np.inf).max(axis=1)
                np.maximum.at(most[stage], table.row, taken)
    return found


@pytest.mark.parametrize("counts", [(6,), (2, 3)])
def test_no_stage_that_fits_and_is_fast_enough_takes_more(counts: tuple[int, ...]) -> None:
    num_short = num_reached = 0
    for model in models(counts):
        least = model.group.schedule.vpp
        ranges = layer_ranges(model.job, model.group.num_stages, least=least)
        for device_bytes in (0.4e9, 0.9e9, math.inf):
            limits = Limits(device_bytes=device_bytes, host_bytes=HOST)
            load = capacity(model, ranges, limits, 1.0).load
            for step_s, taken in most_taken(model, ranges, load, limits).items():
                fine, coarse = (
                    capacity(model, ranges, limits, step_s, coarse=each) for each in (False, True)
                )
                assert (taken <= fine.most).all()
                assert (fine.most <= coarse.most).all()
                num_short += int(fine.most.max() > 0 and not fine.suffices)
                if len(counts) == 1:
                    num_reached += int((np.isclose(taken, fine.most) & (taken > 0)).any())
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
