"""Pictures of a plan alone: their shapes add up to the numbers of the plan."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from mist.plans.file import load_plan
from mist.plans.plan import Offload, Plan, Schedule
from mist.plans.workload import MemoryLevel, ScheduleKind
from mist.report.pictures import Picture
from mist.report.plan_pictures import devices, layers, memory, waterfall
from mist.units import GIB
from tests.sample_plans import LIMITS, sample_plan, stage_plan

PLANS = [
    sample_plan(),
    *(load_plan(path) for path in sorted((Path(__file__).parents[2] / "plans").glob("*.yaml"))),
]


@pytest.fixture(params=PLANS, ids=lambda plan: plan.model.name)
def plan(request: pytest.FixtureRequest) -> Plan:
    found: Plan = request.param
    return found


def by_row(picture: Picture) -> dict[int, list[tuple[float, float]]]:
    rows = defaultdict(list)
    for shape in picture.shapes:
        if shape.kind == "rect":
            rows[round((shape.y1 + shape.y2) / 2)].append((shape.x1, shape.x2))
    return rows


def test_devices_cover_the_cluster_once(plan: Plan) -> None:
    spans = sorted(span for spans in by_row(devices(plan)).values() for span in spans)
    gpus = [gpu for start, end in spans for gpu in range(int(start), int(end))]
    assert gpus == list(range(plan.cluster.num_gpus))


def test_layers_cover_the_model_once(plan: Plan) -> None:
    spans = sorted(span for spans in by_row(layers(plan)).values() for span in spans)
    places = [layer for start, end in spans for layer in range(int(start), int(end))]
    assert places == list(range(plan.num_layers))


def test_layers_of_two_levels_and_two_chunks_are_bars_of_their_own() -> None:
    memory_of = {MemoryLevel.NONE: 5, MemoryLevel.FULL: 1}
    stage = stage_plan(layers=((0, 3), (6, 3)), memory=memory_of, offload=Offload(optimizer=0.5))
    other = stage_plan(layers=((3, 3), (9, 3)), device=4, memory=memory_of)
    schedule = Schedule(kind=ScheduleKind.INTERLEAVED, vpp=2)
    picture = layers(sample_plan(stages=(stage, other), schedule=schedule))
    first = [s for s in picture.shapes if s.kind == "rect" and s.y1 < 0.5]
    assert [(s.x1, s.x2, s.series) for s in first] == [
        (0, 1, "full recomputation"),
        (1, 3, "nothing repeated"),
        (6, 9, "nothing repeated"),
    ]
    (words,) = [s.words for s in picture.shapes if s.kind == "text"]
    assert words == "on the host: optimizer 50%"


def test_parts_of_memory_end_at_the_peak(plan: Plan) -> None:
    for row, spans in by_row(memory(plan, LIMITS)).items():
        assert all(one[1] == two[0] for one, two in pairwise(spans))
        assert spans[0][0] == 0
        peak_gib = plan.estimate.stages[row].peak_bytes / GIB
        # Each part is rounded to a byte.
        assert spans[-1][1] == pytest.approx(peak_gib, abs=10 / GIB)


def test_the_waterfall_ends_at_the_predicted_step(plan: Plan) -> None:
    rows = by_row(waterfall(plan))
    *steps, last = (rows[row] for row in sorted(rows))
    ends = [spans[0] for spans in steps]
    assert ends[0][0] == 0
    assert ends[0][1] == pytest.approx(plan.estimate.mfu * plan.estimate.step_s)
    assert all(one[1] == two[0] for one, two in pairwise(ends))
    # What is too small to be shown: at most 1e-5 of the step for each of nine parts.
    assert ends[-1][1] == pytest.approx(plan.estimate.step_s, rel=1e-4)
    assert last[0] == (0.0, plan.estimate.step_s)
