"""Even splits against every composition of the layers, and layouts with stages alike."""

import itertools
import math

import numpy as np
import pytest

from mist.pareto.candidates import GroupModel
from mist.pareto.layer_partition import even_split, least_sum
from mist.pareto.layer_ranges import Ranges, layer_ranges
from mist.pareto.layouts import stage_plans
from mist.pareto.offload_ratios import offloading
from mist.pareto.strategies import groups
from mist.pareto.uniform_layouts import alike_layouts, even_layouts
from mist.plans.plan import Layout, Limits
from mist.plans.search_space import NO_RATIOS, SPACES, SearchSpace
from mist.plans.workload import ScheduleKind
from mist.symbolic.estimate import estimate
from tests.fast_cases import first_fast
from tests.toys import toy_graph, toy_job

ANY = Limits(device_bytes=math.inf, host_bytes=math.inf)


def compositions(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    counts = itertools.product(range(1, num_layers + 1), repeat=num_stages)
    return [c for c in counts if sum(c) == num_layers]


def rows_of(ranges: Ranges, counts: tuple[int, ...]) -> list[int]:
    """The range of every stage of a composition."""
    rows, first = [], 0
    for count in counts:
        at = ranges.count == count
        rows.append(int(np.flatnonzero(at if ranges.alike else at & (ranges.first == first))[0]))
        first += count
    return rows


@pytest.mark.parametrize("counts", [(6,), (2, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_even_split_is_the_best_of_all_compositions(counts: tuple[int, ...], seed: int) -> None:
    ranges = layer_ranges(toy_job(toy_graph(counts), 4, global_batch=16), 4)
    rng = np.random.default_rng(seed)
    value = rng.uniform(1, 2, (5, 4, len(ranges))) * ranges.count
    value[rng.uniform(size=value.shape) < 0.25] = np.inf
    chosen = even_split(ranges, 6, value)
    for k in range(len(value)):
        every = [
            max(value[k, i, row] for i, row in enumerate(rows_of(ranges, c)))
            for c in compositions(6, 4)
        ]
        if np.isinf(min(every)):
            assert (chosen[k] == -1).all()
            continue
        got = [value[k, i, row] for i, row in enumerate(chosen[k])]
        assert ranges.count[chosen[k]].sum() == 6
        assert max(got) == min(every)


@pytest.mark.parametrize("counts", [(6,), (2, 4)])
def test_the_least_sum_is_that_of_all_compositions(counts: tuple[int, ...]) -> None:
    ranges = layer_ranges(toy_job(toy_graph(counts), 4, global_batch=16), 4)
    rng = np.random.default_rng(0)
    for share in (0.25, 0.8):
        value = rng.uniform(1, 2, (4, len(ranges))) * ranges.count
        value[rng.uniform(size=value.shape) < share] = np.inf
        every = [
            sum(value[i, row] for i, row in enumerate(rows_of(ranges, c)))
            for c in compositions(6, 4)
        ]
        assert least_sum(ranges, 6, value) == pytest.approx(min(every))


def test_nothing_feasible_gives_no_row() -> None:
    ranges = layer_ranges(toy_job(toy_graph((6,)), 4, global_batch=16), 2)
    assert (even_split(ranges, 6, np.full((3, 2, len(ranges)), np.inf)) == -1).all()


@pytest.mark.parametrize("counts", first_fast([(2, 4), (6,)]))
def test_even_layouts_are_what_the_estimate_says(counts: tuple[int, ...]) -> None:
    job = toy_job(toy_graph(counts, vocab=8192), 4, global_batch=16)
    found = 0
    space = SearchSpace(schedules=tuple(ScheduleKind))
    for group in groups(job, space):
        model = GroupModel(job, group, group.strategies, space)
        for layout in itertools.islice(even_layouts(model, ANY), 2):
            judged = estimate(
                job,
                Layout(
                    stages=stage_plans(job, layout),
                    num_micro_batches=layout.num_micro_batches,
                    schedule=layout.schedule,
                ),
            )
            assert judged.step_s == pytest.approx(layout.step_s, rel=6e-6)
            assert max(s.peak_bytes for s in judged.stages) == pytest.approx(layout.peak_bytes)
            found += 1
    assert found > 30


def test_stages_of_a_framework_are_alike() -> None:
    job = toy_job(toy_graph((7,), vocab=8192), 4, global_batch=16)
    space = SPACES["megatron"]
    limits = Limits(device_bytes=1.6e9, host_bytes=math.inf)
    for group in groups(job, space):
        model = GroupModel(job, group, group.strategies, space)
        for layout in alike_layouts(model, limits):
            counts = [stage.count for stage in layout.stages]
            assert max(counts) - min(counts) <= 1
            levels = {(s.upper, s.lower, s.num_lower) for s in layout.stages}
            assert len(levels) == len({tuple(s.knobs.items()) for s in layout.stages}) == 1
            assert layout.peak_bytes <= limits.device_bytes


@pytest.mark.slow
def test_layouts_alike_are_the_fastest_of_their_kind() -> None:
    """Against every strategy in a model of its own, where nothing else can be of its kind."""
    job = toy_job(toy_graph((4,), vocab=8192), 4, global_batch=16)
    ratios = {"optimizer": (0.0, 0.5, 1.0), "activations": (0.0, 0.5, 1.0)}
    space = SearchSpace(unlike_stages=False, offload={**NO_RATIOS, **ratios})
    limits = Limits(device_bytes=0.9e9, host_bytes=math.inf)
    checked = 0
    for group in itertools.islice(groups(job, space), 0, None, 3):
        away = offloading(job, group, space, np.arange(len(group.strategies)))
        every = group.strategies.joined(away)
        want: dict[tuple[object, ...], float] = {}
        for k in range(len(every)):
            for layout in alike_layouts(
                GroupModel(job, group, every.take(np.array([k])), space), limits
            ):
                want[layout.kind] = min(layout.step_s, want.get(layout.kind, math.inf))
        got: dict[tuple[object, ...], float] = {}
        for layout in alike_layouts(GroupModel(job, group, every, space), limits):
            got[layout.kind] = min(layout.step_s, got.get(layout.kind, math.inf))
        assert got == want
        checked += len(want)
    assert checked > 20
