"""Estimates of concrete layouts against known formulas and figures."""

from dataclasses import replace

import numpy as np
import pytest

from mist.plans.plan import Layout, Offload, Schedule, StagePlan
from mist.plans.schedules import fill_time, spare_time
from mist.plans.workload import HeadMode, MemoryLevel, ScheduleKind
from mist.platform.cluster import Collective
from mist.symbolic.estimate import estimate, model_flop
from mist.symbolic.job import Job, make_job
from mist.symbolic.pipeline_costs import resharding_seconds
from tests.toys import toy_graph, toy_job


def stages_of(job: Job, pp: int, **knobs: int) -> tuple[StagePlan, ...]:
    """Equal stages of plain data parallelism, or what `knobs` change of it."""
    per_stage, count = job.platform.num_gpus // pp, job.num_layers // pp
    full = knobs.pop("full", 0)
    return tuple(
        replace(
            StagePlan(
                layers=((i * count, count),),
                devices=(i * per_stage, per_stage),
                dp=per_stage,
                tp=1,
                sp=False,
                cp=1,
                ep=1,
                micro_batch=1,
                zero=0,
                head=HeadMode.NONE,
                memory={MemoryLevel.NONE: count - full, MemoryLevel.FULL: full},
                offload=Offload(),
            ),
            **knobs,
        )
        for i in range(pp)
    )


def test_model_flop_is_six_per_parameter_and_token() -> None:
    """PaLM (arXiv 2204.02311, appendix B): 6 N FLOPs per token, attention apart."""
    graph = toy_graph((8,), vocab=32000)
    job = toy_job(graph, 8, seq_len=2048, global_batch=64)
    matrices = graph.num_params - 8 * 1024  # norms are no matrices
    # the toy's embedding multiplies, so it counts as the head does
    assert model_flop(job) == pytest.approx(6.0 * matrices * 64 * 2048, rel=1e-12)


def test_step_is_micro_batches_times_stable_plus_delta_without_a_pipeline() -> None:
    job = toy_job(num_gpus=8)
    judged = estimate(job, Layout(stages=stages_of(job, 1), num_micro_batches=8))
    (stage,) = judged.stages
    assert judged.step_s == pytest.approx(8 * stage.stable_s + stage.delta_s, rel=1e-5)
    assert judged.bubble_s == 0.0
    assert judged.tokens_per_s == pytest.approx(64 * 2048 / judged.step_s, rel=1e-5)


def test_bubble_is_that_of_1f1b() -> None:
    """Equal stages: the bubble is (S - 1) t (Narayanan et al., SC'21), here up to the ends."""
    job = toy_job(toy_graph((64,), vocab=64), num_gpus=4)
    judged = estimate(job, Layout(stages=stages_of(job, 4), num_micro_batches=64))
    stable_s = max(stage.stable_s for stage in judged.stages)
    assert judged.bubble_s == pytest.approx(3 * stable_s, rel=0.05)  # ends lack one transfer


def chunked(stages: tuple[StagePlan, ...], chunks: int) -> tuple[StagePlan, ...]:
    """The same stages with their layers dealt out in turn."""
    count = stages[0].num_layers // chunks
    return tuple(
        replace(stage, layers=tuple(((c * len(stages) + i) * count, count) for c in range(chunks)))
        for i, stage in enumerate(stages)
    )


@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_divide_the_bubble(chunks: int) -> None:
    """Narayanan et al. (SC'21), section 2.2: (S - 1) t / v with v chunks."""
    job = toy_job(toy_graph((64,), vocab=64), num_gpus=4)
    schedule = Schedule(kind=ScheduleKind.INTERLEAVED, vpp=chunks)
    judged = estimate(
        job,
        Layout(stages=chunked(stages_of(job, 4), chunks), num_micro_batches=64, schedule=schedule),
    )
    stable_s = max(stage.stable_s for stage in judged.stages)
    assert judged.bubble_s == pytest.approx(3 * stable_s / chunks, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "chunks", "fill_s"),
    [
        (ScheduleKind.GPIPE, 1, 6.0),
        (ScheduleKind.ONE_F_ONE_B, 1, 6.0),
        (ScheduleKind.INTERLEAVED, 3, 6.0 / 3),
        (ScheduleKind.ZERO_BUBBLE, 1, 6.0 - 2 * 2.5),
        (ScheduleKind.ZERO_BUBBLE, 2, (6.0 - 2 * 2.5) / 2),
    ],
)
def test_fill_of_each_schedule_by_hand(kind: ScheduleKind, chunks: int, fill_s: float) -> None:
    # A stable time of 6 s, of which 2.5 s compute gradients of weights.
    assert fill_time(6.0, spare_time(kind, 2.5), chunks=chunks) == fill_s
    assert fill_time(6.0, spare_time(kind, 4.0), chunks=chunks) >= 0.0


def test_weight_gradients_fill_the_bubble() -> None:
    """ZB-H1 (Qi et al. 2024, table 1): (S - 1) (F + B - W) = (S - 1) (t - 2 W)."""
    job = toy_job(toy_graph((64,), hidden=8192, vocab=64), num_gpus=4)
    schedule = Schedule(kind=ScheduleKind.ZERO_BUBBLE, vpp=1)
    judged = estimate(
        job, Layout(stages=stages_of(job, 4), num_micro_batches=64, schedule=schedule)
    )
    tokens = 2048
    products = [(1, 8192, 4 * 8192, tokens), (1, 4 * 8192, 8192, tokens)]
    weight_s = 16 * sum(float(job.laws.gemm_s(*dims)) for dims in products)
    stable_s = max(stage.stable_s for stage in judged.stages)
    assert stable_s > 3 * weight_s  # what is left of the bubble is more than nothing
    assert judged.bubble_s == pytest.approx(3 * (stable_s - 2 * weight_s), rel=0.05)


@pytest.mark.parametrize(
    ("kind", "chunks", "held", "embed", "head"),
    [
        (ScheduleKind.GPIPE, 1, [64, 64, 64, 64], 64, 64),
        (ScheduleKind.ONE_F_ONE_B, 1, [4, 3, 2, 1], 4, 1),
        (ScheduleKind.INTERLEAVED, 2, [5.5, 4.5, 3.5, 2.5], 8, 1),
        (ScheduleKind.INTERLEAVED, 4, [4.75, 4.25, 3.75, 3.25], 8, 1),
    ],
)
def test_activations_are_held_by_schedule(
    kind: ScheduleKind, chunks: int, held: list[float], embed: int, head: int
) -> None:
    """As many as are in flight (tests/test_schedules.py), embedding and head by their own order.

    The toy: a layer keeps [tokens, 1024] twice and [tokens, 4096] once in 2 bytes, the tables that
    all share [seq, 1024], an end [tokens, vocabulary] in 4 bytes.
    """
    vocab, tokens, num_layers = 8192, 2048, 16
    job = toy_job(toy_graph((64,), vocab=vocab), num_gpus=4)
    stages = chunked(stages_of(job, 4), chunks)
    judged = estimate(
        job, Layout(stages=stages, num_micro_batches=64, schedule=Schedule(kind=kind, vpp=chunks))
    ).stages
    layers = num_layers * 2 * tokens * (1024 + 1024 + 4096) + chunks * 2 * tokens * 1024
    ends = [embed, 0, 0, head]
    for stage, count, end in zip(judged, held, ends, strict=True):
        activations = count * layers + end * 4 * tokens * vocab
        assert stage.memory_parts_bytes["activations"] == pytest.approx(activations, rel=1e-6)


def test_activations_wait_under_zero_bubble() -> None:
    """S micro-batches on every stage, of which stage i has i that wait for gradients of weights.

    These hold gradients of [tokens, 1024] twice and [tokens, 4096] once for each layer, and of the
    head its logits in 2 bytes and its input, but not what the loss kept.
    """
    vocab, tokens, num_layers = 8192, 2048, 16
    job = toy_job(toy_graph((64,), vocab=vocab), num_gpus=4)
    schedule = Schedule(kind=ScheduleKind.ZERO_BUBBLE, vpp=1)
    judged = estimate(
        job, Layout(stages=stages_of(job, 4), num_micro_batches=64, schedule=schedule)
    ).stages
    layer, loss = 2 * tokens * (1024 + 1024 + 4096), 4 * tokens * vocab
    for i, stage in enumerate(judged):
        activations = 4 * (num_layers * layer + 2 * tokens * 1024) + i * num_layers * layer
        activations += 4 * loss * (i == 0)
        if i == 3:
            activations += loss + i * 2 * tokens * (1024 + vocab)
        assert stage.memory_parts_bytes["activations"] == pytest.approx(activations, rel=1e-6)


def test_mfu_is_model_flop_over_peak() -> None:
    job = toy_job(num_gpus=8)
    judged = estimate(job, Layout(stages=stages_of(job, 1), num_micro_batches=8))
    assert judged.mfu == pytest.approx(model_flop(job) / judged.step_s / (8 * 989e12), rel=1e-5)


def test_recomputation_trades_memory_for_time() -> None:
    job = toy_job(num_gpus=8)
    kept, recomputed = (
        estimate(job, Layout(stages=stages_of(job, 1, full=full), num_micro_batches=8))
        for full in (0, 8)
    )
    assert recomputed.stages[0].peak_bytes < kept.stages[0].peak_bytes
    assert recomputed.step_s > kept.step_s
    assert kept.stages[0].time_parts_s["recompute"] == 0.0


def test_figures_are_rounded_to_six_digits() -> None:
    judged = estimate(
        toy_job(num_gpus=8), Layout(stages=stages_of(toy_job(num_gpus=8), 1), num_micro_batches=8)
    )
    assert judged.step_s == float(f"{judged.step_s:.6g}")
    assert judged.stages[0].usable_bytes > judged.stages[0].peak_bytes
    assert "data loading" in judged.not_modelled[0]


def test_how_operations_are_priced_is_told_of_one_node() -> None:
    judged = estimate(
        toy_job(num_gpus=8), Layout(stages=stages_of(toy_job(num_gpus=8), 1), num_micro_batches=8)
    )
    assert [(row.what, row.how) for row in judged.op_costs] == [
        ("matrix products", "law"),
        ("attention forward", "law"),
        ("attention backward", "law"),
        ("memory-bound operations", "law"),
        ("collectives in a node", "table"),
        ("transfers in a node", "law"),
        ("copies between host and device", "law"),
        ("streams at once", "law"),
    ]
    assert judged.extrapolated == ()


@pytest.mark.parametrize(
    ("zero", "told"),
    [
        # the vocabulary matrix: 32000 * 1024 parameters, 4 bytes of each reduced, 2 gathered
        (0, ["all-reduces of 125.0 MiB"]),
        (1, ["reduce-scatters of 125.0 MiB", "all-gathers of 62.5 MiB"]),
    ],
)
def test_only_collectives_of_the_layout_are_told_to_leave_their_table(
    zero: int, told: list[str]
) -> None:
    job = toy_job(num_gpus=8)
    cluster = job.platform.cluster
    tables = {
        word: replace(cluster.tables[word], rows=cluster.tables[word].rows[:12])
        for word in Collective
    }
    platform = replace(job.platform, cluster=replace(cluster, tables=tables))
    judged = estimate(
        make_job(job.programs, platform, job.workload),
        Layout(stages=stages_of(job, 1, zero=zero), num_micro_batches=8),
    )
    ratios = {"125.0 MiB": "x125.0", "62.5 MiB": "x62.5"}
    assert sorted(judged.extrapolated) == sorted(
        f"{what} are priced beyond the largest measured size, 1.0 MiB "
        f"({ratios[what.split(' of ')[1]]})"
        for what in told
    )


def test_unlike_neighbours_wait_for_the_larger_transfer() -> None:
    """dp 4 sends a sample from each rank, dp 2 tp 2 takes two: sequence shards make them equal."""
    job = toy_job(num_gpus=8)
    like = stages_of(job, 2)
    wide = replace(like[1], dp=2, tp=2, sp=True, micro_batch=2)
    narrow = replace(like[1], dp=1, tp=4, sp=True, micro_batch=4)
    edge = float(job.laws.p2p_s(2 * 2048 * 1024, 0))  # bf16, sequence, hidden, in a node
    for second in (wide, narrow):
        judged = estimate(job, Layout(stages=(like[0], second), num_micro_batches=16))
        sent = [stage.time_parts_s["p2p"] for stage in judged.stages]
        assert sent == [pytest.approx(edge, rel=1e-5)] * 2
    pair = stages_of(job, 2, zero=1)
    deep = (replace(pair[0], dp=2, tp=2, sp=True, micro_batch=2), replace(pair[1], dp=4, tp=1))
    assert estimate(job, Layout(stages=deep, num_micro_batches=16)).stages[0].time_parts_s[
        "p2p"
    ] == pytest.approx(edge, rel=1e-5)


def test_the_slower_side_sets_the_pace_of_both() -> None:
    terms = {
        "term_p2p_in_node_s": np.array([1.0, 3.0, 2.0]),
        "term_p2p_cross_s": np.array([10.0, 10.0, 40.0]),
    }
    added = resharding_seconds(terms, np.array([0, 1]))
    assert added.tolist() == [2.0, 30.0, 0.0]
