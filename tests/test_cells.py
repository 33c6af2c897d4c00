"""Frontiers that pipelines of different lengths share."""

from dataclasses import replace

import numpy as np
import pytest

from mist.pareto.candidates import GroupModel
from mist.pareto.strategies import groups
from mist.plans.plan import Limits
from mist.plans.search_space import NO_RATIOS, SearchSpace
from mist.plans.workload import ScheduleKind
from mist.search.stage_frontiers import Bounds, CellStore, GroupProblem, problem_of
from mist.symbolic.job import Job
from tests.test_tune import HOST
from tests.toys import toy_graph, toy_job

SPACE = SearchSpace(
    offload=NO_RATIOS, schedules=(ScheduleKind.ONE_F_ONE_B,), unequal_meshes=True
)  # fmt: skip
G = 4


def problem(job: Job, num_stages: int, limit: float, store: CellStore) -> GroupProblem:
    """Of unequal stages, 4 micro-batches."""
    (group,) = (
        group
        for group in groups(job, SPACE)
        if (group.num_stages, group.num_micro_batches) == (num_stages, G) and len(group.sizes) > 1
    )
    limits = Limits(device_bytes=limit, host_bytes=HOST)
    model = GroupModel(job, group, group.strategies, SPACE)
    return problem_of(model, Bounds(limits=limits, step_s=np.inf), store)


def frontiers(found: GroupProblem, stage: int) -> dict[tuple[int, int], np.ndarray]:
    """Times and peaks of a stage's points, by layers and devices: [3, points]."""
    return {
        (cell.count, cell.units): np.array([points.stable_s, points.lone_s, points.peak_bytes])
        for cell, (points, _) in zip(found.problem.cells, found.points, strict=True)
        if cell.stage == stage
    }


@pytest.mark.parametrize("limit", [0.5e9, 1e9, 8e9])
def test_a_shared_frontier_is_that_of_a_pipeline_alone(limit: float) -> None:
    """The first of 4 stages holds all 4 micro-batches of a step, the first of 3 does not."""
    job = toy_job(toy_graph((6,), vocab=8192), 8, global_batch=12)
    for lengths in ((4, 3), (3, 4)):
        shared = CellStore()
        for num_stages in lengths:
            together = frontiers(problem(job, num_stages, limit, shared), stage=0)
            alone = frontiers(problem(job, num_stages, limit, CellStore()), stage=0)
            assert together.keys() == alone.keys() != set()
            for key, points in alone.items():
                np.testing.assert_array_equal(together[key], points)


def test_each_way_to_divide_a_tied_matrix_has_its_own_frontier() -> None:
    """Ends of 4 stages as if only strategies of that way were known; those between as untied."""
    space = SearchSpace(pp=(4,), offload=NO_RATIOS, schedules=(ScheduleKind.ONE_F_ONE_B,))
    tied = toy_job(toy_graph((6,), vocab=8192, tied=True), 16, global_batch=16)
    free = replace(tied, facts=replace(tied.facts, tied=False))
    bounds = Bounds(limits=Limits(device_bytes=0.8e9, host_bytes=HOST), step_s=np.inf)
    ways: set[tuple[int, ...]] = set()
    for group in (group for group in groups(tied, space) if group.num_micro_batches == G):
        found = problem_of(GroupModel(tied, group, group.strategies, space), bounds, CellStore())
        for way in found.problem.ties:
            dp, _, tp, unsharded = way
            own = group.strategies
            rows = (own["dp"] == dp) & (own["tp"] == tp) & ((own["zero"] == 0) == unsharded)
            alone = problem_of(GroupModel(free, group, own.take(rows), space), bounds, CellStore())
            for stage in (0, 3):
                assert points_of(found, stage, way) == points_of(alone, stage, None)
        ways |= set(found.problem.ties)
        whole = problem_of(GroupModel(free, group, group.strategies, space), bounds, CellStore())
        for stage in (1, 2):
            assert points_of(found, stage, None) == points_of(whole, stage, None)
    assert len(ways) >= 4


def points_of(
    found: GroupProblem, stage: int, way: tuple[int, ...] | None
) -> dict[int, list[tuple[float, float]]]:
    """The times of a stage's points by its layers, of one way to divide."""
    return {
        cell.count: list(zip(cell.stable_s.tolist(), cell.lone_s.tolist(), strict=True))
        for cell in found.problem.cells
        if cell.stage == stage and cell.tie == way
    }
