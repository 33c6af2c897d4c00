"""The step time against Mist's own form of it, and against numbers worked out by hand.

What is in flight against the orders of micro-batches, replayed: written out here, and torch's own.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.plans.schedules import held, in_flight, layers_more, step_time, zero_as_run
from mist.plans.workload import ScheduleKind
from tests.torch_schedules import ends_held, most_held, pipeline_order


def paper_form(num_micro_batches: int, stable: list[float], delta: list[float]) -> float:
    """(G - 1) max t + sum t + max (d_i - sum_{j<i} t_j): Mist, EuroSys'25, section 5."""
    waits = [delta[i] - sum(stable[:i]) for i in range(len(stable))]
    return (num_micro_batches - 1) * max(stable) + sum(stable) + max(waits)


STAGES = st.lists(st.tuples(st.floats(0, 10), st.floats(-10, 10)), min_size=1, max_size=8)


@given(st.integers(1, 512), STAGES)
def test_equals_the_form_of_the_paper(num: int, stages: list[tuple[float, float]]) -> None:
    stable, delta = ([*column] for column in zip(*stages, strict=True))
    lone = np.array(stable) + np.array(delta)
    # 1e-12 of the largest term: rounding of sums of at most 8 stages.
    expected = pytest.approx(paper_form(num, stable, delta), rel=1e-12, abs=1e-9)
    assert float(step_time(num, np.array(stable), lone)) == expected


@pytest.mark.parametrize(
    ("num", "stable", "lone", "expected"),
    [
        # 7 * 5 + max(5 + 4.9, 10.4) = 35 + 10.4
        (8, [5.0, 4.9], [5.0, 10.4], 45.4),
        # 7 * 5 + max(5 + 3, 13) = 35 + 13
        (8, [5.0, 3.0], [5.0, 13.0], 48.0),
        # one stage, one micro-batch: its lone time
        (1, [2.0], [3.0], 3.0),
        # one micro-batch through three stages: max(2 + 5, 4 + 3, 1)
        (1, [1.0, 2.0, 3.0], [2.0, 4.0, 1.0], 7.0),
    ],
)
def test_by_hand(num: int, stable: list[float], lone: list[float], expected: float) -> None:
    assert float(step_time(num, np.array(stable), np.array(lone))) == pytest.approx(expected)


def test_filling_and_draining_by_hand() -> None:
    # 1 * 6 + max(6 + 1 + 2, 5 + 2, 4): what a stage adds behind another is its fill, not its time
    stable, lone, fill = np.array([6.0, 4.0, 3.0]), np.array([6.0, 5.0, 4.0]), np.array([3.0, 1, 2])
    assert float(step_time(2, stable, lone, fill)) == 6 + 9


def test_a_fill_of_the_stable_times_changes_nothing() -> None:
    stable, lone = np.random.default_rng(1).uniform(0, 1, (2, 4, 5))
    np.testing.assert_array_equal(step_time(3, stable, lone, stable), step_time(3, stable, lone))


def test_many_pipelines_at_once() -> None:
    rng = np.random.default_rng(0)
    stable, lone = rng.uniform(0, 1, (2, 3, 4, 5))
    num = rng.integers(1, 9, (3, 4))
    found = step_time(num, stable, lone)
    assert found.shape == (3, 4)
    for index in np.ndindex(3, 4):
        one = step_time(int(num[index]), stable[index], lone[index])
        assert found[index] == one
        assert one.shape == ()


def replayed(order: str) -> int:
    """Most micro-batches between their forward and their backward pass in an order such as FFBB."""
    held = np.cumsum([1 if step == "F" else -1 for step in order])
    assert held[-1] == 0
    return int(held.max())


def gpipe(num_micro_batches: int) -> str:
    return "F" * num_micro_batches + "B" * num_micro_batches


def one_f_one_b(stage: int, num_stages: int, num_micro_batches: int) -> str:
    """Forward until the last stage has sent the first gradient back, then one of each in turn."""
    warm = min(num_stages - 1 - stage, num_micro_batches)
    return "F" * warm + "FB" * (num_micro_batches - warm) + "B" * warm


PIPELINES = [(s, g) for s, g in itertools.product((1, 2, 3, 5, 8), (1, 2, 3, 4, 8, 9, 20))]


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), PIPELINES)
def test_in_flight_as_replayed(num_stages: int, num_micro_batches: int) -> None:
    stages = np.arange(num_stages)
    sizes = {"num_stages": num_stages, "num_micro_batches": num_micro_batches, "chunks": 1}
    held = in_flight(ScheduleKind.GPIPE, stage=stages, **sizes)
    assert held.tolist() == [replayed(gpipe(num_micro_batches))] * num_stages
    held = in_flight(ScheduleKind.ONE_F_ONE_B, stage=stages, **sizes)
    assert held.tolist() == [
        replayed(one_f_one_b(stage, num_stages, num_micro_batches)) for stage in range(num_stages)
    ]


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE])
def test_in_flight_as_torch_orders_it(kind: ScheduleKind, chunks: int) -> None:
    compared = 0
    for num_stages, num_micro_batches in itertools.product(range(2, 7), range(1, 20)):
        order = pipeline_order(kind.value, num_stages, num_micro_batches, chunks)
        if order is None:
            continue
        found = in_flight(
            kind,
            stage=np.arange(num_stages),
            num_stages=num_stages,
            num_micro_batches=num_micro_batches,
            chunks=chunks,
        )
        want = [most_held(order[rank]) / chunks for rank in range(num_stages)]
        assert found.tolist() == want, (num_stages, num_micro_batches)
        compared += 1
    assert compared > 50


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("kind", [ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE])
def test_unequal_chunks_in_flight_as_torch_orders_them(kind: ScheduleKind, chunks: int) -> None:
    compared = 0
    for num_stages, num_micro_batches in itertools.product((2, 3, 4, 7), range(1, 24)):
        order = pipeline_order(kind.value, num_stages, num_micro_batches, chunks)
        if order is None:
            continue
        pipeline = {
            "stage": np.arange(num_stages),
            "num_stages": num_stages,
            "num_micro_batches": num_micro_batches,
            "chunks": chunks,
        }
        layers = np.arange(chunks, 3 * chunks + 1)
        found = in_flight(kind, **pipeline)[:, None]
        found = found + layers_more(kind, layers=layers[None, :], **pipeline)
        for stage, column in itertools.product(range(num_stages), range(len(layers))):
            few, larger = divmod(int(layers[column]), chunks)
            sizes = [few + (chunk < larger) for chunk in range(chunks)]
            want = most_held(order[stage], [n for n in sizes for _ in range(num_stages)])
            # Sums of whole numbers of layers: what is left is the rounding of one division.
            assert found[stage, column] * layers[column] == pytest.approx(want, rel=1e-12), pipeline
            compared += 1
    assert compared > 300


@pytest.mark.parametrize("kind", [ScheduleKind.GPIPE, ScheduleKind.ONE_F_ONE_B])
def test_one_chunk_has_no_unequal_ones(kind: ScheduleKind) -> None:
    pipeline = {"stage": np.arange(3), "num_stages": 3, "num_micro_batches": 6, "chunks": 1}
    assert not layers_more(kind, layers=np.array([[5, 6]]), **pipeline).any()


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("kind", [ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE])
def test_what_the_ends_hold_as_torch_orders_it(kind: ScheduleKind, chunks: int) -> None:
    compared = 0
    for num_stages, num_micro_batches in itertools.product(range(2, 7), range(2, 25)):
        order = pipeline_order(kind.value, num_stages, num_micro_batches, chunks)
        if order is None or num_micro_batches < num_stages:
            continue
        stage = np.arange(num_stages)
        sizes = {"num_stages": num_stages, "num_micro_batches": num_micro_batches}
        columns = held(kind, layers=chunks, stage=stage, chunks=chunks, **sizes)
        ends = [ends_held(order[rank], num_stages, chunks) for rank in range(num_stages)]
        embed = columns["in_flight"][0] + columns["embed_more"][0]
        exact = kind is ScheduleKind.INTERLEAVED or chunks == 1  # else an upper bound, not searched
        assert embed == ends[0][0] or (not exact and embed > ends[0][0]), sizes
        assert columns["head_held"][-1] == ends[-1][1], sizes
        assert columns["embed_more"][1:].tolist() == [0] * (num_stages - 1)
        assert (columns["waiting"] * chunks).tolist() == [waits for _, _, waits in ends], sizes
        compared += 1
    assert compared > 40


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_what_the_ends_hold_where_nothing_takes_turns(num_stages: int) -> None:
    sizes = {"num_stages": num_stages, "num_micro_batches": 8, "chunks": 1}
    all_first = held(ScheduleKind.GPIPE, layers=1, stage=np.arange(num_stages), **sizes)
    assert all_first["head_held"].tolist() == [8] * num_stages
    in_turn = held(ScheduleKind.ONE_F_ONE_B, layers=1, stage=np.arange(num_stages), **sizes)
    assert in_turn["head_held"].tolist() == [1] * num_stages
    for columns in (all_first, in_turn):
        assert not columns["embed_more"].any()
        assert not columns["waiting"].any()


def test_a_split_backward_pass_reduces_once_a_step() -> None:
    levels = np.arange(4)
    assert zero_as_run(ScheduleKind.ZERO_BUBBLE, levels).tolist() == [0, 1, 1, 3]
    assert zero_as_run(ScheduleKind.ONE_F_ONE_B, levels).tolist() == [0, 1, 2, 3]


def test_in_flight_of_many_pipelines_at_once() -> None:
    """Two chunks, four stages: 4 micro-batches are one round of 4, 8 are two; (v-1) 4 + 2 j + 1."""
    stages, micro = np.array([[0], [1], [3]]), np.array([4, 8])
    found = in_flight(
        ScheduleKind.INTERLEAVED, stage=stages, num_stages=4, num_micro_batches=micro, chunks=2
    )
    assert found.tolist() == [[4.0, 5.5], [4.0, 4.5], [2.5, 2.5]]
