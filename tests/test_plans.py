"""Plans: what they say of themselves, and that a broken one does not construct."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from mist.errors import PlanError
from mist.plans.invariants import plan_faults
from mist.plans.plan import Plan
from mist.plans.workload import MemoryLevel
from tests.sample_plans import estimate_of, plans, sample_plan, stage_estimate, stage_plan


def test_counts_of_layers() -> None:
    plan = sample_plan()
    assert plan.num_layers == 16
    assert [stage.num_layers for stage in plan.stages] == [8, 8]
    assert [stage.num_full for stage in plan.stages] == [1, 1]


def test_a_level_that_is_not_named_has_no_layers() -> None:
    assert stage_plan(memory={MemoryLevel.NONE: 8}).num_full == 0


def test_a_broken_plan_does_not_construct() -> None:
    with pytest.raises(PlanError) as refused:
        sample_plan(num_micro_batches=7, stages=(stage_plan(), stage_plan(first=9, device=4)))
    assert str(refused.value) == (
        "plan for toy has 2 faults:\n"
        "  stages[1].layers: layers [9, 8] leave a gap after those before, which end at 7\n"
        "  num_micro_batches: dp * micro_batch * num_micro_batches = 4 * 7 = 28, "
        "but the global batch is 32"
    )


def test_an_estimate_judges_every_stage() -> None:
    with pytest.raises(PlanError, match=r"estimate.stages: 1 stages judged, but the plan has 2"):
        sample_plan(estimate=estimate_of(stage_estimate()))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_layers_and_devices_are_covered_once(plan: Plan) -> None:
    runs = [s.layers[chunk] for chunk in range(plan.schedule.vpp) for s in plan.stages]
    layers = [i for first, n in runs for i in range(first, first + n)]
    devices = [i for s in plan.stages for i in range(s.devices[0], sum(s.devices))]
    assert layers == list(range(plan.num_layers))
    assert devices == list(range(plan.cluster.num_gpus))


@pytest.mark.parametrize("data", [{}, {"stages": 3}, {"stages": [3]}, {"stages": [{"layers": 1}]}])
def test_invariants_pass_over_what_the_schema_reports(data: dict[str, object]) -> None:
    assert not [*plan_faults(data)]


def test_layers_that_keep_least_come_first_in_each_chunk() -> None:
    """Their backward passes run last, when most else is gone."""
    none, full = MemoryLevel.NONE, MemoryLevel.FULL
    stage = stage_plan(memory={none: 5, full: 3})
    assert stage.levels == (full,) * 3 + (none,) * 5
    chunks = replace(stage, layers=((0, 4), (8, 4)))
    assert chunks.levels == (full, full, none, none, full, none, none, none)
