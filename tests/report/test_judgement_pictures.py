"""Pictures of what was judged: passes to scale, memory that peaks at the peak, what fits."""

from itertools import pairwise

import pytest

from mist.plans.plan import Schedule
from mist.plans.workload import ScheduleKind
from mist.report.judgement_pictures import judgement_pictures
from mist.report.pictures import Picture
from mist.report.plan_report import PlanReport
from mist.units import GIB
from tests.report.sample_reports import sample_report


def pictures(report: PlanReport) -> dict[str, Picture]:
    assert report.judgement is not None
    found = judgement_pictures(report.plan, report.sheet.limits, report.judgement)
    return {picture.name: picture for picture in found}


@pytest.mark.parametrize("kind", ["1f1b", "gpipe", "zero-bubble"])
def test_rows_of_the_timeline_do_not_overlap_and_add_up(kind: str) -> None:
    report = sample_report(schedule=Schedule(kind=ScheduleKind(kind), vpp=1))
    picture = pictures(report)["timeline"]
    assert picture.row_names == ("stage 0", "network of 0", "stage 1", "network of 1")
    for row in range(4):
        spans = sorted((s.x1, s.x2) for s in picture.shapes if round((s.y1 + s.y2) / 2) == row)
        # 1e-9: starts are sums of ends.
        assert all(one[1] <= two[0] + 1e-9 for one, two in pairwise(spans))
    # Eight micro-batches of 0.5 s on stage 0, of which a quarter is tensor parallelism.
    busy = sum(s.x2 - s.x1 for s in picture.shapes if s.y1 < 1.5)
    assert busy == pytest.approx(8 * 0.5 + 0.25)
    network = sum(s.x2 - s.x1 for s in picture.shapes if 0.5 < s.y1 < 1.5)
    assert network == pytest.approx(8 * 0.125)


@pytest.mark.parametrize("kind", ["1f1b", "gpipe", "zero-bubble"])
def test_memory_over_a_step_is_highest_at_the_peak(kind: str) -> None:
    report = sample_report(schedule=Schedule(kind=ScheduleKind(kind), vpp=1))
    picture = pictures(report)["memory-in-time"]
    for index, stage in enumerate(report.plan.estimate.stages):
        line = [s for s in picture.shapes if s.series == f"stage {index}" and s.kind == "line"]
        assert max(s.y1 for s in line) == pytest.approx(stage.peak_bytes / GIB)
        # All activations are gone in the end: the states are left.
        assert line[-1].y1 == pytest.approx(30.0)
        assert all(one.x1 <= two.x1 for one, two in pairwise(line))


def test_layouts_of_several_cards_are_left_out_and_the_front_is_marked() -> None:
    dots = [s for s in pictures(sample_report())["pareto"].shapes if s.kind in ("dot", "mark")]
    assert [(s.series, s.x1, s.y1) for s in dots] == [
        ("fastest at its memory", 30.0, 6.0),
        ("layout judged", 40.0, 7.0),
        ("alternative", 50.0, 6.0),
        ("the plan", 48.0, 5.0),
    ]


def test_ways_to_run_a_stage_that_do_not_fit_are_left_out() -> None:
    shapes = pictures(sample_report())["stages"].shapes
    assert [(s.series, s.x1, s.y1) for s in shapes[:2]] == [
        ("stage 0", 600.0, 600.0),
        ("stage 0, the plan", 500.0, 600.0),
    ]
    assert len(shapes) == 4


def test_draws_have_a_dot_each_and_a_median() -> None:
    shapes = pictures(sample_report())["robustness"].shapes
    dots = [s.x1 for s in shapes if s.series == "one draw" and s.y1 == 0]
    assert dots == [4.5, 5.0, 6.0]
    assert [s.x1 for s in shapes if s.series == "median"] == [5.0, 5.5]


def test_a_plan_that_does_not_fit_then_says_so() -> None:
    shapes = pictures(sample_report())["sensitivity"].shapes
    assert [s.series for s in shapes] == [
        "the plan",
        "the plan, which does not fit",
        "best layout judged",
    ]
    assert "does not fit (peak 48.0 GiB of 32.0 GiB)" in shapes[1].words
