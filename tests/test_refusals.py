"""What mist apply refuses: each rule with its exact words."""

from dataclasses import replace

import pytest

from mist.errors import InputError, PlanError
from mist.model.summary import LayerRun, ModelFacts, TpLimit
from mist.plans.plan import Offload, Plan, Schedule, StagePlan
from mist.plans.workload import MemoryLevel, Precision, ScheduleKind
from mist.platform.profiles import load_runtime
from mist.rules.apply import (
    as_applied,
    offloaded_bytes,
    refuse_small_host,
    refuse_unplayable,
    refuse_world,
)
from mist.units import GIB
from tests.sample_plans import sample_plan, stage_plan

FACTS = ModelFacts(
    name="toy",
    num_params=8_030_261_248,
    num_trainable=8_030_261_248,
    layers=(LayerRun(block=0, count=16),),
    tied=False,
    max_seq_len=None,
    tp_limits=(TpLimit(label="key/value heads", size=8),),
    sequential=True,
    precision="bf16",
    fingerprint="sha256:toy",
    notes=(),
)


def faults_of(plan: Plan, facts: ModelFacts | None = None) -> list[str]:
    with pytest.raises(PlanError) as error:
        refuse_unplayable(plan, facts)
    return [*map(str, error.value.faults)]


def words_of(plan: Plan, facts: ModelFacts | None = None) -> str:
    (fault,) = faults_of(plan, facts)
    return fault


def one_stage(**changes: object) -> Plan:
    stage = stage_plan(count=16, devices=(0, 8), dp=4, micro_batch=1, **changes)
    memory = changes.get("memory", {MemoryLevel.NONE: 16})
    return staged(replace(stage, memory=memory))  # type: ignore[arg-type]


def staged(*stages: StagePlan, **changes: object) -> Plan:
    plan = sample_plan()
    estimate = replace(plan.estimate, stages=plan.estimate.stages[:1] * len(stages))
    return replace(plan, stages=stages, estimate=estimate, **changes)  # type: ignore[arg-type]


def test_a_good_plan_passes() -> None:
    refuse_unplayable(sample_plan(), FACTS)
    refuse_unplayable(one_stage(), FACTS)


def test_another_runtime() -> None:
    assert words_of(sample_plan(runtime="megatron")) == (
        "runtime: megatron is run by its own framework; mist apply runs plans for torch"
    )


def test_fp16() -> None:
    workload = replace(sample_plan().workload, precision=Precision.FP16)
    assert words_of(sample_plan(workload=workload)) == (
        "workload.precision: fp16 needs loss scaling, which mist apply has not; use bf16 or fp32"
    )


def test_context_parallelism() -> None:
    stage = stage_plan(count=16, devices=(0, 8), cp=2)
    assert words_of(staged(stage)) == (
        "stages[0].cp: cp 2: context parallelism is not predicted or run yet; use 1."
    )


def test_fewer_micro_batches_than_stages() -> None:
    big = [replace(s, micro_batch=16) for s in sample_plan().stages]
    assert words_of(sample_plan(stages=tuple(big), num_micro_batches=1)) == (
        "num_micro_batches: 1 micro-batches cannot fill 2 pipeline stages: "
        "use at least one for each (a smaller micro-batch, or fewer stages)."
    )


def chunked(kind: ScheduleKind, **changes: object) -> Plan:
    """Two stages of two chunks."""
    eager = {MemoryLevel.NONE: 8}
    first = stage_plan(layers=((0, 4), (8, 4)), memory=eager)
    second = stage_plan(layers=((4, 4), (12, 4)), memory=eager, device=4)
    schedule = Schedule(kind=kind, vpp=2)
    return replace(sample_plan(schedule=schedule, stages=(first, second)), **changes)


def test_interleaved_turns_must_divide_the_micro_batches() -> None:
    plan = chunked(ScheduleKind.INTERLEAVED)
    refuse_unplayable(plan, FACTS)
    workload = replace(plan.workload, global_batch=28)
    assert words_of(replace(plan, workload=workload, num_micro_batches=7)) == (
        "num_micro_batches: schedule interleaved runs micro-batches in rounds of 2: 7 are no whole "
        "number of them."
    )


def test_schedules_that_take_turns_need_like_stages() -> None:
    plan = chunked(ScheduleKind.ZERO_BUBBLE)
    first, second = plan.stages
    unlike = replace(second, dp=4, tp=1, sp=False, micro_batch=1)
    assert words_of(replace(plan, stages=(first, unlike))) == (
        "stages: zero-bubble needs the same dp and tp in every stage, found "
        "dp 2 tp 2 and dp 4 tp 1; use 1f1b or gpipe"
    )


def test_zero_bubble_with_zero3() -> None:
    plan = chunked(ScheduleKind.ZERO_BUBBLE)
    first, second = plan.stages
    assert words_of(replace(plan, stages=(first, replace(second, zero=3)))) == (
        "stages[1].zero: schedule zero-bubble with ZeRO-3 computes wrong gradients without an "
        "error (parameters are gone when the weight gradients run). Use ZeRO-2, or 1f1b."
    )


def test_zero_bubble_with_what_its_backward_pass_cannot_do() -> None:
    plan = chunked(ScheduleKind.ZERO_BUBBLE)
    first, second = plan.stages
    away = replace(first, offload=Offload(activations=0.5))
    assert words_of(replace(plan, stages=(away, second))) == (
        "stages[0].offload.activations: schedule zero-bubble with offloaded activations holds "
        "those of all micro-batches (its split backward pass keeps what it fetches). Use 1f1b, or "
        "offload none."
    )
    for level in (MemoryLevel.SELECTIVE, MemoryLevel.FULL):
        some = replace(second, memory={level: second.num_layers})
        assert words_of(replace(plan, stages=(first, some))) == (
            "stages[1].memory: zero-bubble splits the backward pass: torch runs a selective layer "
            "backward once only, and a full one forward again for each of its weights; use "
            "checkpoint none, or 1f1b"
        )
    away = replace(first, zero=2, offload=Offload(weights=0.5, grads=0.5))
    assert words_of(replace(plan, stages=(away, second))) == (
        "stages[0].offload.grads: schedule zero-bubble reduces gradients once a step, and until "
        "then all of them are on the device. Use 1f1b, or offload no weights and grads."
    )


def test_offload_of_weights_and_gradients() -> None:
    assert words_of(one_stage(zero=2, offload=Offload(weights=0.5))) == (
        "stages[0].offload: runtime torch offloads weights and gradients of a layer together: "
        "their ratios are 0.5 and 0."
    )
    assert faults_of(one_stage(zero=1, offload=Offload(weights=0.5, grads=0.5))) == [
        f"stages[0].offload.{name}: offloading {name} needs ZeRO-2 or more under runtime torch, "
        "found ratio 0.5 at ZeRO-1."
        for name in ("weights", "grads")
    ]


def test_offload_of_what_selective_layers_keep() -> None:
    memory = {MemoryLevel.SELECTIVE: 16}
    assert words_of(one_stage(memory=memory, offload=Offload(activations=0.5))) == (
        "stages[0].memory: what selective layers keep stays on the device; offload no activations, "
        "or use checkpoint none or full"
    )


def test_another_model() -> None:
    other = replace(FACTS, fingerprint="sha256:other", num_params=5, num_trainable=5)
    assert words_of(sample_plan(), other) == (
        "model.fingerprint: the plan is for another model (8,030,261,248 parameters; "
        "toy from models/toy.py has 5); plan again"
    )


def test_a_model_that_trains_something_else() -> None:
    plan, count = sample_plan(), FACTS.num_params
    frozen = replace(FACTS, fingerprint="sha256:other", num_trainable=1024)
    assert words_of(plan, frozen) == (
        "model.fingerprint: the plan is for another model (8,030,261,248 parameters; toy from "
        "models/toy.py has 8,030,261,248, 1,024 of them trained); plan again"
    )
    planned = replace(plan, model=replace(plan.model, params=count, trainable=1024))
    assert words_of(planned, replace(FACTS, fingerprint="sha256:other")) == (
        "model.fingerprint: the plan is for another model (8,030,261,248 parameters, 1,024 of them "
        "trained; toy from models/toy.py has 8,030,261,248); plan again"
    )
    assert words_of(planned, frozen) == (
        "model.fingerprint: the plan is for another model (8,030,261,248 parameters; toy from "
        "models/toy.py has 8,030,261,248 too, with other names, shapes or ties, or trains other "
        "ones); plan again"
    )


def test_heads_that_tp_does_not_divide() -> None:
    facts = replace(FACTS, tp_limits=(TpLimit(label="key/value heads", size=3),))
    assert words_of(one_stage(), facts) == (
        "stages[0].tp: tp 2 does not divide the 3 key/value heads of toy."
    )
    assert words_of(one_stage(), replace(FACTS, tp_limits=None)) == (
        "stages[0].tp: tp 2: no tensor-parallel rules are known for toy; give the model a "
        "`tp_plan`, or use --tp 1."
    )


def test_layers_that_exchange_tensors() -> None:
    assert words_of(sample_plan(), replace(FACTS, sequential=False)) == (
        "stages: pp 2: layers of toy exchange tensors with layers that are not their neighbours "
        "(skip connections); it runs on one pipeline stage only."
    )


def test_layers_that_take_more_than_one_activation() -> None:
    facts = replace(FACTS, unstaged="a layer takes a condition")
    assert words_of(sample_plan(), facts) == (
        "stages: pp 2: mist apply cannot divide toy over stages: a layer takes a condition; "
        "use pp 1."
    )


def test_sequences_that_stay_whole() -> None:
    facts = replace(FACTS, whole_sequence="a layer takes a condition")
    assert words_of(one_stage(), facts) == (
        "stages[0].sp: mist apply cannot divide the sequence of toy: a layer takes a condition; "
        "plan again"
    )
    refuse_unplayable(one_stage(sp=False), facts)
    runtimes = [load_runtime(name).profile for name in ("torch", "megatron")]
    assert [each.knobs.sequence_parallel for each in runtimes] == [True, True]
    applied = [as_applied(each, facts) for each in runtimes]
    assert [each.knobs.sequence_parallel for each in applied] == [False, True]


def test_layers_that_are_called_again_have_one_level() -> None:
    mixed = one_stage(memory={MemoryLevel.NONE: 8, MemoryLevel.FULL: 8})
    refuse_unplayable(mixed, FACTS)
    assert words_of(mixed, replace(FACTS, calls_again=True)) == (
        "stages[0].memory: checkpoint none and full in one stage: runtime torch does the same "
        "with all layers of a stage."
    )


def test_tied_ends_must_be_alike() -> None:
    first, second = sample_plan().stages
    tied = replace(FACTS, tied=True)
    refuse_unplayable(sample_plan(), tied)
    assert words_of(sample_plan(stages=(first, replace(second, zero=0))), tied) == (
        "stages: toy ties its embedding to its head, so the first and the last stage "
        "must agree in dp, dp_replicate, tp, and in whether zero is 0"
    )


def test_copies_of_the_states() -> None:
    refuse_unplayable(one_stage(dp_replicate=2, zero=2, offload=Offload(optimizer=0.5)), FACTS)
    away = one_stage(dp_replicate=2, zero=2, offload=Offload(weights=1.0, grads=1.0))
    assert words_of(away) == (
        "stages[0].dp_replicate: dp_replicate 2: gradients that wait for their sum over copies of "
        "the states stay on the device; offload no weights and grads, or use dp_replicate 1."
    )


def test_tied_embeddings_need_alike_copies() -> None:
    first, second = (
        replace(stage, dp=4, tp=1, sp=False, micro_batch=1) for stage in sample_plan().stages
    )
    unlike = sample_plan(stages=(first, replace(second, dp_replicate=2)))
    assert words_of(unlike, replace(FACTS, tied=True)) == (
        "stages: toy ties its embedding to its head, so the first and the last stage "
        "must agree in dp, dp_replicate, tp, and in whether zero is 0"
    )


def test_number_of_ranks() -> None:
    refuse_world(sample_plan(), 8)
    with pytest.raises(InputError) as error:
        refuse_world(sample_plan(), 4)
    assert str(error.value) == (
        "the plan is for 8 ranks, but 4 were started. Start 8, or plan for --gpus 4."
    )


def test_host_memory() -> None:
    # 8.03e9 parameters over tp 2 and 4 shards, 8 bytes of weights and gradients, half of them.
    plan = one_stage(zero=2, offload=Offload(weights=0.5, grads=0.5))
    rank_bytes = 8_030_261_248 // 2 // 4 * 8 // 2
    assert offloaded_bytes(plan, 0) == rank_bytes
    refuse_small_host(plan, 8 * rank_bytes, 8)
    with pytest.raises(InputError) as error:
        refuse_small_host(plan, 16 * GIB, 8)
    assert str(error.value) == (
        "offload needs 29.9 GiB of host memory for 8 ranks, but this machine has 16.0 GiB. "
        "Plan with lower offload ratios."
    )
