"""Why one layout beats another: the parts are the step, the words name the largest differences."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.plans.breakdown import (
    PART_NAMES,
    SHORT_NAMES,
    layout_words,
    losing_reason,
    overflow,
    short_layout,
    short_reasons,
    step_parts,
)
from mist.plans.plan import Layout, Offload, Schedule
from mist.plans.workload import HeadMode, MemoryLevel, ScheduleKind
from mist.symbolic.program import TIME_PARTS
from mist.units import GIB
from tests.sample_plans import estimate_of, sample_plan, stage_estimate, stage_plan

numbers = st.floats(0.0, 100.0)


def test_every_part_of_a_stage_has_a_name() -> None:
    assert {*PART_NAMES} == {*TIME_PARTS, "delta", "bubble"}


def test_the_parts_of_a_step_by_hand() -> None:
    # Slowest stage: 0.5 s, a quarter of it tp; G = 8; delta 0.25 s; of 5 s, 0.75 s are left.
    estimate = estimate_of(stage_estimate(0.25), stage_estimate(0.5), step_s=5.0)
    assert step_parts(estimate, 8) == {
        "compute": 3.0,
        "tp": 1.0,
        "dp": 0.0,
        "delta": 0.25,
        "bubble": 0.75,
    }


@given(stable=st.lists(numbers, min_size=1, max_size=4), step_s=numbers, g=st.integers(1, 64))
def test_the_parts_of_a_step_sum_to_it(stable: list[float], step_s: float, g: int) -> None:
    estimate = replace(estimate_of(*map(stage_estimate, stable)), step_s=step_s)
    # Tolerance: a handful of float additions of numbers up to 64 * 100 s.
    assert sum(step_parts(estimate, g).values()) == pytest.approx(step_s, abs=1e-9)


WINNER = {"compute": 3.0, "tp": 1.0, "dp": 0.0, "delta": 0.25, "bubble": 0.75}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tp": 3.5}, "+2.50 s tensor-parallel collectives"),
        (
            {"tp": 1.5, "dp": 0.75, "delta": 0.26},
            "+750 ms exposed data-parallel collectives and +500 ms tensor-parallel collectives",
        ),
        (
            {"bubble": 2.0, "compute": 2.5, "delta": 0.2},
            "+1.25 s pipeline bubble and imbalance, -500 ms compute",
        ),
        ({}, "equal within rounding"),
        # 1e-5 of the step of 5 s is 50 us: below it is the rounding of six digits.
        ({"tp": 1.0 + 4.9e-5, "dp": -4.9e-5}, "equal within rounding"),
        ({"tp": 1.0 + 5.1e-5}, "+51.0 us tensor-parallel collectives"),
    ],
)
def test_why_a_layout_loses(changes: dict[str, float], words: str) -> None:
    assert losing_reason(WINNER | changes, WINNER) == words


def test_a_layout_in_words() -> None:
    assert (
        layout_words(Layout(stages=[stage_plan()], num_micro_batches=8))
        == "pp1 dp2 tp2 zero1 mb2 x8, 1 of 8 layers recomputed"
    )


def test_a_layout_of_unequal_stages_in_words() -> None:
    levels = {MemoryLevel.NONE: 4, MemoryLevel.FULL: 2}
    second = stage_plan(first=8, count=6, device=4, zero=3, tp=1, dp=4, memory=levels)
    assert layout_words(Layout(stages=[stage_plan(), second], num_micro_batches=8)) == (
        "pp2 dp2+4 tp2+1 zero1+3 mb2 x8, 1+2 of 8+6 layers recomputed"
    )


def test_a_selective_level_a_schedule_and_offloads_in_words() -> None:
    levels = {MemoryLevel.NONE: 3, MemoryLevel.SELECTIVE: 4, MemoryLevel.FULL: 1}
    stages = [
        stage_plan(memory=levels, offload=Offload(optimizer=0.5, activations=0.375)),
        stage_plan(first=8, device=4, offload=Offload(optimizer=0.5, activations=1.0)),
    ]
    assert layout_words(
        Layout(
            stages=stages,
            num_micro_batches=8,
            schedule=Schedule(kind=ScheduleKind.ZERO_BUBBLE, vpp=1),
        )
    ) == (
        "pp2 dp2 tp2 zero1 mb2 x8, 1 of 8 layers recomputed, 4+0 selectively, zero-bubble, "
        "offloaded: optimizer 50 %, activations 38+100 %"
    )


def test_a_head_in_words() -> None:
    first, last = sample_plan().stages
    plan = sample_plan(stages=(first, replace(last, head=HeadMode.CHECKPOINTED)))
    assert layout_words(plan.layout).endswith(", head checkpointed")
    assert "head" not in layout_words(sample_plan().layout)


def test_chunks_in_words() -> None:
    stages = [stage_plan(), stage_plan(first=8, device=4)]
    chunks = Schedule(kind=ScheduleKind.INTERLEAVED, vpp=4)
    line = "pp2 dp2 tp2 zero1 mb2 x8, 1 of 8 layers recomputed"
    assert (
        layout_words(Layout(stages=stages, num_micro_batches=8, schedule=chunks))
        == f"{line}, interleaved of 4 chunks"
    )
    assert (
        layout_words(
            Layout(
                stages=stages,
                num_micro_batches=8,
                schedule=Schedule(kind=ScheduleKind.GPIPE, vpp=1),
            )
        )
        == f"{line}, gpipe"
    )
    assert layout_words(Layout(stages=stages, num_micro_batches=8)) == line


def test_one_stage_has_no_schedule_to_tell() -> None:
    offload = Offload(weights=1.0, grads=1.0, optimizer=0.004)  # the last rounds to nothing
    schedule = Schedule(kind=ScheduleKind.GPIPE, vpp=1)
    assert layout_words(
        Layout(stages=[stage_plan(offload=offload)], num_micro_batches=8, schedule=schedule)
    ) == (
        "pp1 dp2 tp2 zero1 mb2 x8, 1 of 8 layers recomputed, offloaded: weights 100 %, grads 100 %"
    )


def test_copies_of_the_states_in_words() -> None:
    stage = stage_plan(devices=(0, 8), dp=4, dp_replicate=2)
    line = "pp1 dp4 replicate2 tp2 zero1 mb2 x8, 1 of 8 layers recomputed"
    assert layout_words(Layout(stages=[stage], num_micro_batches=8)) == line


def test_long_runs_of_equal_stages_are_counted() -> None:
    stages = [stage_plan(first=8 * i, device=4 * i, zero=3 if i == 0 else 2) for i in range(5)]
    assert layout_words(Layout(stages=stages, num_micro_batches=8)) == (
        "pp5 dp2 tp2 zero3+4*2 mb2 x8, 1 of 8 layers recomputed"
    )


def test_a_stage_that_does_not_fit_in_words() -> None:
    stage = replace(
        stage_estimate(peak_gib=48),
        memory_parts_bytes={"activations": 18 * GIB, "states": 30 * GIB, "buffers": 0},
    )
    stage = replace(stage, usable_bytes=40 * GIB)
    assert overflow(1, stage, "a100-sxm-40", 38 * GIB) == (
        "stage 1 needs 48.0 GiB of the 38.0 GiB that a plan may use on a100-sxm-40 "
        "(states 30.0 GiB, activations 18.0 GiB); the card itself is exceeded: it has "
        "40.0 GiB usable, 8.0 GiB too few"
    )


def test_a_layout_is_shortened() -> None:
    """What is 0 and shares are left out; of three kinds of schedule the words stay."""
    assert short_layout("pp1 dp8 tp1 zero2 mb1 x8, 0 of 16 layers recomputed") == (
        "pp1 dp8 tp1 zero2 mb1 x8"
    )
    words = "pp2 dp8 tp1 zero2 mb1 x32, 3+0 of 17+15 layers recomputed, 11+3 selectively"
    offload = "offloaded: weights 100 %, optimizer 88 %"
    assert short_layout(f"{words}, interleaved of 3 chunks, {offload}") == (
        "pp2 dp8 tp1 zero2 mb1 x32, 3+0 recomputed, 11+3 partly, interleaved of 3 chunks, offload"
    )


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        (
            "+762 ms recomputation, -448 ms pipeline bubble and imbalance",
            ["+762 ms recomputation, -448 ms pipeline bubble", "+762 ms recomputation"],
        ),
        # Nine words are too many.
        (
            "+1.00 s transfers between stages and +2 us first and last micro-batch, optimizer",
            ["+1.00 s between stages"],
        ),
        ("+1.00 s compute", ["+1.00 s compute"]),
        (
            "faster if every figure is right; more regret where one is wrong",
            ["faster if every figure is right"],
        ),
        (
            "one two three four five six seven eight nine",
            ["one two three four five six seven eight"],
        ),
    ],
)
def test_a_reason_has_eight_words_at_most(reason: str, short: list[str]) -> None:
    assert short_reasons(reason) == short
    assert all(len(words.split()) <= 8 for words in short)


def test_the_letters_of_a_bar_differ() -> None:
    assert {*SHORT_NAMES} == {*PART_NAMES}
    assert len({name[0] for name in SHORT_NAMES.values()}) == len(SHORT_NAMES)
