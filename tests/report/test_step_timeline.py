"""The order of passes against torch's own schedules, the step against the formula of plans."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.plans.plan import Layout, Schedule
from mist.plans.schedules import fill_time, spare_time, step_time
from mist.plans.workload import ScheduleKind
from mist.report.step_timeline import MOST_PASSES, StagePace, Timeline, timeline
from tests.sample_plans import stage_plan
from tests.torch_schedules import pipeline_order

KINDS = {"FORWARD": "forward", "FULL_BACKWARD": "backward", "BACKWARD_INPUT": "backward"}
KINDS |= {"BACKWARD_WEIGHT": "weights"}


def layout_of(num_stages: int, num_micro_batches: int, kind: str, chunks: int = 1) -> Layout:
    return Layout(
        stages=[stage_plan() for _ in range(num_stages)],
        num_micro_batches=num_micro_batches,
        schedule=Schedule(kind=ScheduleKind(kind), vpp=chunks),
    )


def pace(
    forward_s: float, backward_s: float, once_s: float = 0.0, weight_s: float = 0.0
) -> StagePace:
    return StagePace(
        forward_s={"compute": forward_s},
        backward_s={"compute": backward_s},
        weight_s=weight_s,
        once_s=once_s,
    )


def order_of(step: Timeline, stage: int, num_stages: int) -> list[tuple[str, int, int]]:
    own = sorted((each for each in step.passes if each.stage == stage), key=lambda p: p.start_s)
    return [(p.kind, p.chunk * num_stages + stage, p.micro_batch) for p in own]


@pytest.mark.parametrize(
    ("kind", "num_stages", "num_micro_batches", "chunks"),
    [
        ("interleaved", 2, 4, 2),
        ("interleaved", 4, 8, 3),
        ("interleaved", 3, 9, 2),
        ("zero-bubble", 2, 4, 1),
        ("zero-bubble", 4, 12, 1),
    ],
)
def test_ranks_run_what_torch_runs(
    kind: str, num_stages: int, num_micro_batches: int, chunks: int
) -> None:
    layout = layout_of(num_stages, num_micro_batches, kind, chunks)
    step = timeline(layout, [pace(1.0, 2.0, weight_s=1.0)] * num_stages)
    order = pipeline_order(kind, num_stages, num_micro_batches, chunks)
    assert order is not None
    for stage in range(num_stages):
        torchs = [
            (KINDS[a.computation_type.name], a.stage_index, a.microbatch_index)
            for a in order[stage]
            if a is not None
        ]
        assert order_of(step, stage, num_stages) == torchs


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@given(
    num_stages=st.integers(1, 6),
    rounds=st.integers(1, 4),
    forward_s=st.floats(0.1, 3.0),
    backward_s=st.floats(0.1, 3.0),
    once_s=st.floats(0.0, 2.0),
)
def test_like_stages_take_what_the_formula_says(
    kind: str, num_stages: int, rounds: int, forward_s: float, backward_s: float, once_s: float
) -> None:
    num = num_stages * rounds
    step = timeline(
        layout_of(num_stages, num, kind), [pace(forward_s, backward_s, once_s)] * num_stages
    )
    stable = np.full(num_stages, forward_s + backward_s)
    # 1e-9: sums of at most a hundred passes, rounded in another order.
    assert step.step_s == pytest.approx(float(step_time(num, stable, stable + once_s)), rel=1e-9)


def test_interleaved_stages_take_what_the_formula_says() -> None:
    step = timeline(layout_of(4, 8, "interleaved", 2), [pace(1.0, 2.0)] * 4)
    stable = np.full(4, 3.0)
    assert step.step_s == pytest.approx(
        float(step_time(8, stable, stable, fill_time(stable, chunks=2)))
    )


def test_a_split_backward_pass_fills_the_bubble() -> None:
    step = timeline(layout_of(4, 8, "zero-bubble"), [pace(1.0, 2.0, weight_s=1.0)] * 4)
    stable = np.full(4, 3.0)
    fill = fill_time(stable, spare_time(ScheduleKind.ZERO_BUBBLE, np.full(4, 1.0)))
    assert step.step_s == pytest.approx(float(step_time(8, stable, stable, fill)))


@given(
    st.lists(st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)), min_size=1, max_size=5),
    st.integers(1, 9),
)
def test_a_rank_does_one_pass_at_a_time_and_none_before_what_it_needs(
    times: list[tuple[float, float]], num: int
) -> None:
    step = timeline(layout_of(len(times), num, "1f1b"), [pace(*each) for each in times])
    at = {(p.kind, p.stage, p.micro_batch): p for p in step.passes}
    assert len(at) == 2 * len(times) * num
    for stage in range(len(times)):
        own = sorted((p for p in step.passes if p.stage == stage), key=lambda p: p.start_s)
        assert all(first.end_s <= second.start_s for first, second in pairwise(own))
    for (kind, stage, micro_batch), each in at.items():
        before = (
            ("forward", stage - 1, micro_batch)
            if kind == "forward"
            else ("backward", stage + 1, micro_batch)
        )
        if before in at:
            assert at[before].end_s <= each.start_s


def test_a_long_step_is_shown_in_part() -> None:
    step = timeline(layout_of(4, 4000, "1f1b"), [pace(1.0, 2.0)] * 4)
    assert step.num_micro_batches == MOST_PASSES // 8 // 4 * 4
    assert len(step.passes) <= MOST_PASSES
