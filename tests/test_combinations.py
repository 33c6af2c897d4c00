"""Every rule, its mask and its exact message; and what holds of all of them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from mist.model.graph import B, ModelGraph, S
from mist.plans.workload import MemoryLevel, ScheduleKind
from mist.platform import load_platform
from mist.rules.between_stages import broken_between
from mist.rules.combinations import apply_rules, out_of_domain
from mist.rules.levels import broken_by_levels, may_have
from mist.rules.rule import Rule, broken
from mist.symbolic.compile import compile_model
from mist.symbolic.job import Job, make_job
from tests.torch_schedules import pipeline_order
from tests.toys import adamw_setting, toy_graph, toy_job, toy_workload

FITTING = {
    "tp": 2,
    "dp": 2,
    "micro_batch": 2,
    "zero": 1,
    "dp_replicate": 1,
    "head": 0,
    "num_stages": 2,
    "num_micro_batches": 16,
    "schedule": "1f1b",
    "chunks": 1,
    "weights": 0.0,
    "grads": 0.0,
    "optimizer": 0.0,
    "activations": 0.0,
}


def job(num_gpus: int = 8) -> Job:
    """Eight layers, MLP width 4096, sequence 2048, global batch 64, on H100s."""
    return toy_job(num_gpus=num_gpus)


def rule(name: str, of: Job | None = None) -> Rule:
    return next(found for found in (of or job()).rules if found.name == name)


def test_a_layout_that_keeps_every_rule() -> None:
    assert not [*broken(job().rules, FITTING)]


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"tp": 3},
            [
                "tp 3 does not divide the sequence of 2048 tokens, "
                "which runtime torch shards with it.",
                "tp 3 does not divide the 4096 MLP width of toy.",
                "tp 3 does not divide the 8 GPUs per node of dgx-h100.",
                "2 * 3 ranks per stage neither divide nor fill the 8 GPUs of a node.",
            ],
        ),
        ({"tp": 16}, ["tp 16 does not divide the 8 GPUs per node of dgx-h100."]),
        (
            {"head": 1},
            [
                "tp 2: a head that tensor parallelism divides keeps its part of all logits; use "
                "head none, or tp 1"
            ],
        ),
        ({"head": 1, "tp": 1, "dp": 4, "micro_batch": 1}, []),
        (
            {
                **{"head": 2, "tp": 1, "dp": 4, "micro_batch": 1},
                **{"schedule": "zero-bubble", "chunks": 2},
            },
            [
                "zero-bubble splits the backward pass, which a head without all logits runs at "
                "once; use head none, or 1f1b"
            ],
        ),
        (
            {"micro_batch": 3},
            ["dp 2 * micro-batch 3 * 16 micro-batches is not the global batch of 64."],
        ),
        (
            {"num_stages": 4, "num_micro_batches": 2, "micro_batch": 16},
            [
                "2 micro-batches cannot fill 4 pipeline stages: use at least one for each "
                "(a smaller micro-batch, or fewer stages)."
            ],
        ),
        ({"num_stages": 16}, ["pp 16 stages, but toy has 8 layers."]),
        (
            {"dp": 6, "tp": 1, "num_micro_batches": 1, "num_stages": 1},
            [
                "dp 6 * micro-batch 2 * 1 micro-batches is not the global batch of 64.",
                "6 * 1 ranks per stage neither divide nor fill the 8 GPUs of a node.",
            ],
        ),
        (
            {"schedule": "interleaved", "num_stages": 2, "chunks": 5},
            ["2 stages of 5 chunks, but toy has 8 layers."],
        ),
        (
            {"schedule": "interleaved", "chunks": 2, "num_stages": 3, "num_micro_batches": 16},
            [
                "schedule interleaved runs micro-batches in rounds of 3: "
                "16 are no whole number of them."
            ],
        ),
        (
            {"schedule": "zero-bubble", "zero": 3},
            [
                "schedule zero-bubble with ZeRO-3 computes wrong gradients without an error "
                "(parameters are gone when the weight gradients run). Use ZeRO-2, or 1f1b."
            ],
        ),
        (
            {"schedule": "zero-bubble", "activations": 0.5},
            [
                "schedule zero-bubble with offloaded activations holds those of all micro-batches "
                "(its split backward pass keeps what it fetches). Use 1f1b, or offload none."
            ],
        ),
        (
            {"weights": 0.5},
            [
                "offloading weights needs ZeRO-2 or more under runtime torch, "
                "found ratio 0.5 at ZeRO-1.",
                "runtime torch offloads weights and gradients of a layer together: "
                "their ratios are 0.5 and 0.",
            ],
        ),
        (
            {"weights": 0.25, "grads": 0.25, "zero": 0},
            [
                "offloading weights needs ZeRO-2 or more under runtime torch, "
                "found ratio 0.25 at ZeRO-0.",
                "offloading grads needs ZeRO-2 or more under runtime torch, "
                "found ratio 0.25 at ZeRO-0.",
            ],
        ),
        ({"weights": 1.0, "grads": 1.0, "zero": 2, "optimizer": 0.5, "activations": 0.5}, []),
        ({"dp": 4, "micro_batch": 1, "dp_replicate": 2, "zero": 2, "optimizer": 0.5}, []),
        (
            {"dp": 4, "micro_batch": 1, "dp_replicate": 3},
            ["dp_replicate 3 does not divide dp 4."],
        ),
        (
            {"dp_replicate": 2},
            [
                "dp_replicate 2 of dp 2 at ZeRO-1: states that have copies are also divided; "
                "use ZeRO-1 or more, and less than dp."
            ],
        ),
        (
            {"dp": 4, "micro_batch": 1, "dp_replicate": 2, "zero": 0},
            [
                "dp_replicate 2 of dp 4 at ZeRO-0: states that have copies are also divided; "
                "use ZeRO-1 or more, and less than dp."
            ],
        ),
        (
            {"dp": 24, "tp": 1, "micro_batch": 1, "num_micro_batches": 8, "dp_replicate": 4},
            [
                "dp 24 * micro-batch 1 * 8 micro-batches is not the global batch of 64.",
                "dp 24 * tp 1 in 4 copies: ranks of one copy neither divide nor fill the 8 GPUs "
                "of a node.",
            ],
        ),
        (
            {
                "dp": 4,
                "micro_batch": 1,
                "dp_replicate": 2,
                "zero": 2,
                "weights": 1.0,
                "grads": 1.0,
            },
            [
                "dp_replicate 2: gradients that wait for their sum over copies of the states stay "
                "on the device; offload no weights and grads, or use dp_replicate 1."
            ],
        ),
    ],
)
def test_the_words_of_a_broken_rule(changes: dict[str, object], messages: list[str]) -> None:
    assert [*broken(job().rules, FITTING | changes)] == messages


def of_runtime(name: str) -> tuple[Rule, ...]:
    """The rules of the toy under another runtime."""
    platform = load_platform(num_gpus=8, gpu="h100-sxm", cluster=None, runtime=name)
    programs = compile_model(toy_graph(), adamw_setting(platform.runtime))
    return make_job(programs, platform, toy_workload()).rules


@pytest.mark.parametrize(
    ("runtime", "changes", "messages"),
    [
        (
            "nanotron",
            {"schedule": "zero-bubble", "optimizer": 1.0, "activations": 0.5},
            [
                "schedule zero-bubble: runtime nanotron has gpipe, 1f1b.",
                "offloading optimizer is not possible under runtime nanotron, "
                "found ratio 1 at ZeRO-1.",
                "offloading activations is not possible under runtime nanotron.",
            ],
        ),
        (
            "megatron",
            {"dp": 4, "micro_batch": 1, "dp_replicate": 2},
            [
                "dp_replicate 2: copies of the states are predicted of FSDP2 only, not of runtime "
                "megatron; use dp_replicate 1."
            ],
        ),
        (
            "megatron",
            {"schedule": "interleaved", "chunks": 2, "num_micro_batches": 17},
            [
                "dp 2 * micro-batch 2 * 17 micro-batches is not the global batch of 64.",
                "schedule interleaved runs micro-batches in rounds of 2: "
                "17 are no whole number of them.",
                "runtime megatron interleaves multiples of 2 micro-batches on 2 stages: 17 is "
                "none.",
            ],
        ),
        (
            "megatron",  # torch would run three micro-batches as one round of two stages
            {"schedule": "interleaved", "chunks": 2, "num_micro_batches": 3},
            [
                "dp 2 * micro-batch 2 * 3 micro-batches is not the global batch of 64.",
                "runtime megatron interleaves multiples of 2 micro-batches on 2 stages: 3 is none.",
            ],
        ),
        (
            "deepspeed-zero3",
            {"num_stages": 1, "dp": 4, "zero": 3, "num_micro_batches": 8, "weights": 1.0},
            [
                "runtime deepspeed-zero3 offloads weights only where the optimizer is offloaded "
                "too.",
                "tp 2 with ZeRO-3: runtime deepspeed-zero3 divides tensors up to ZeRO-2 only.",
            ],
        ),
        (
            "deepspeed-zero3",
            {"num_stages": 1, "dp": 4, "zero": 2, "num_micro_batches": 8, "optimizer": 0.5},
            [
                "runtime deepspeed-zero3 offloads all optimizer or none below ZeRO-3, "
                "found ratio 0.5 at ZeRO-2.",
            ],
        ),
        (
            "torchtune",
            {"tp": 1, "dp": 4, "micro_batch": 1},
            [
                "zero 1: runtime torchtune has zero 0.",
                "dp 4: runtime torchtune has no data parallelism; use dp 1.",
                "pp 2: runtime torchtune has no pipelines; use pp 1.",
                "schedule 1f1b: runtime torchtune has no pipelines.",
            ],
        ),
        (
            "torchtitan",
            {"zero": 2},
            ["zero 2: runtime torchtitan has zero 0, 3."],
        ),
        (
            "fsdp1",
            {"zero": 3, "num_stages": 1, "dp": 4, "schedule": "gpipe", "num_micro_batches": 8},
            [
                "tp 2: runtime fsdp1 has no tensor parallelism; use tp 1.",
                "schedule gpipe: runtime fsdp1 has no pipelines.",
            ],
        ),
        (
            "deepspeed-zero3",  # parameters without gradients
            {"tp": 1, "dp": 8, "num_stages": 1, "num_micro_batches": 4, "weights": 1.0, "zero": 3}
            | {"optimizer": 0.5},
            [],
        ),
    ],
)
def test_what_other_runtimes_cannot_do(
    runtime: str, changes: dict[str, object], messages: list[str]
) -> None:
    assert [*broken(of_runtime(runtime), FITTING | changes)] == messages


@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble"])
def test_whole_rounds_are_those_that_torch_accepts(schedule: str) -> None:
    """Torch refuses micro-batches that its number of rounds does not divide."""
    found = rule("whole-rounds")
    for num_stages, num_micro_batches in itertools.product(range(2, 7), range(1, 25)):
        columns = FITTING | {
            "schedule": schedule,
            "chunks": 2,
            "num_stages": num_stages,
            "num_micro_batches": num_micro_batches,
        }
        accepted = pipeline_order(schedule, num_stages, num_micro_batches, 2) is not None
        assert bool(found.mask(columns)) is accepted, (num_stages, num_micro_batches)


def test_interleaving_needs_stages() -> None:
    columns = FITTING | {"num_stages": 1, "dp": 4, "micro_batch": 1, "schedule": "interleaved"}
    assert [*broken(job().rules, columns)] == [
        "schedule interleaved needs at least 2 stages. Use 1f1b for one."
    ]


@pytest.mark.parametrize(
    ("levels", "schedule", "activations", "messages"),
    [
        (["none", "full"], "1f1b", 0.5, []),
        (["drop-norm", "full"], "1f1b", 0.0, []),
        (
            ["drop-norm"],
            "1f1b",
            0.5,
            [
                "what drop-norm layers keep stays on the device; offload no activations, or use "
                "checkpoint none or full"
            ],
        ),
        (["none"], "zero-bubble", 0.0, []),
        (["selective", "full"], "interleaved", 0.0, []),
        (
            ["none", "selective"],
            "1f1b",
            0.5,
            [
                "what selective layers keep stays on the device; offload no activations, or use "
                "checkpoint none or full"
            ],
        ),
        (
            ["full", "full"],
            "zero-bubble",
            0.0,
            [
                "zero-bubble splits the backward pass: torch runs a selective layer backward once "
                "only, and a full one forward again for each of its weights; use checkpoint none, "
                "or 1f1b"
            ],
        ),
    ],
)
def test_what_memory_levels_go_with(
    levels: list[str], schedule: str, activations: float, messages: list[str]
) -> None:
    columns = {"schedule": schedule, "activations": activations, "tp": 1}
    known = [MemoryLevel(level) for level in levels]
    assert [*broken_by_levels(known, columns)] == messages
    assert all(may_have(level, columns).all() for level in known) is not bool(messages)


def test_converted_layers_are_not_divided() -> None:
    columns = {"schedule": "1f1b", "activations": 0.0, "tp": 2}
    levels = [MemoryLevel.NONE, MemoryLevel.DROP_NORM, MemoryLevel.FULL]
    assert [*broken_by_levels(levels, columns)] == [
        "tp 2: drop-norm layers keep all when tensor parallelism divides them; use tp 1, or "
        "checkpoint none or selective or sac-half or sdpa-only or full"
    ]


def test_what_stages_of_a_pipeline_share() -> None:
    facts = toy_graph(tied=True).facts
    first = {"dp": 2, "tp": 2, "dp_replicate": 1, "zero": 1}
    for change, alike in (
        ({}, True),
        ({"zero": 3}, True),  # all divided alike, gathered or not
        ({"zero": 0}, False),
        ({"dp": 4, "tp": 1}, False),
        ({"dp_replicate": 2}, False),
    ):
        stages = [first, first | {"tp": 1, "dp": 4}, first | change]
        found = [*broken_between(facts, ScheduleKind.ONE_F_ONE_B, stages)]
        assert (not found) is alike, change
        assert not [*broken_between(replace(facts, tied=False), ScheduleKind.GPIPE, stages)]
    assert [
        *broken_between(None, ScheduleKind.ZERO_BUBBLE, [first, first | {"tp": 1, "dp": 4}])
    ] == [
        "zero-bubble needs the same dp and tp in every stage, found dp 2 tp 2 and dp 4 tp 1; "
        "use 1f1b or gpipe"
    ]


def test_a_model_without_tensor_parallel_rules() -> None:
    known = toy_job(replace(toy_graph(), tp_limits=None))
    assert [*broken(known.rules, FITTING)] == [
        "tp 2: no tensor-parallel rules are known for toy; "
        "give the model a `tp_plan`, or use --tp 1."
    ]
    assert not [*broken(known.rules, FITTING | {"tp": 1, "dp": 4, "micro_batch": 1})]


@pytest.mark.parametrize(
    ("name", "column", "values", "mask"),
    [
        ("tp-in-node", "tp", [1, 2, 3, 4, 8, 16], [1, 1, 0, 1, 1, 0]),
        ("tp-divides-MLP width", "tp", [1, 2, 3, 4096, 8192], [1, 1, 0, 1, 0]),
        ("tp-divides-sequence", "tp", [1, 2, 3, 2048, 4096], [1, 1, 0, 1, 0]),
        ("batch-factors", "micro_batch", [1, 2, 4], [0, 1, 0]),
        ("enough-micro-batches", "num_micro_batches", [1, 2, 3], [0, 1, 1]),
        ("enough-layers", "num_stages", [1, 8, 9], [1, 1, 0]),
        ("stage-fills-nodes", "dp", [1, 2, 3, 4, 8, 12, 6], [1, 1, 0, 1, 1, 1, 0]),
        ("schedule-known", "schedule", ["gpipe", "1f1b", "chimera"], [1, 1, 0]),
        ("chunks-have-layers", "chunks", [1, 2, 4, 5], [1, 1, 1, 0]),
        ("offload-weights", "weights", [0.0, 0.5], [1, 0]),
        ("offload-grads", "grads", [0.0, 1.0], [1, 0]),
        ("offload-optimizer", "optimizer", [0.0, 1.0], [1, 1]),
        ("offload-activations", "activations", [0.0, 1.0], [1, 1]),
        ("offload-by-layer", "weights", [0.0, 0.5], [1, 0]),
    ],
)
def test_a_mask_is_true_where_the_rule_holds(
    name: str, column: str, values: list[object], mask: list[int]
) -> None:
    assert rule(name).mask(FITTING | {column: np.array(values)}).tolist() == [*map(bool, mask)]


def test_masks_have_the_common_shape_of_the_columns() -> None:
    columns = FITTING | {"tp": np.array([[1], [2]]), "dp": np.array([1, 2, 4])}
    assert {found.mask(columns).shape for found in job().rules} == {(2, 3)}


degrees = st.integers(1, 17)
ratios = st.sampled_from([0.0, 0.5, 1.0])


@given(
    tp=degrees,
    dp=degrees,
    micro_batch=degrees,
    num_stages=degrees,
    num_micro_batches=degrees,
    zero=st.integers(0, 3),
    head=st.integers(0, 2),
    dp_replicate=degrees,
    schedule=st.sampled_from([kind.value for kind in ScheduleKind]),
    chunks=st.integers(1, 4),
    weights=ratios,
    grads=ratios,
    optimizer=ratios,
    activations=ratios,
)
def test_words_are_said_exactly_where_a_mask_is_false(**columns: object) -> None:
    rules = RULES
    silent = [found for found in rules if found.mask(columns).all()]
    assert len(silent) + len([*broken(rules, columns)]) == len(rules)


RULES = job().rules


def restricted(relation: sympy.Basic) -> ModelGraph:
    """The toy, with costs that hold only under a relation."""
    graph = toy_graph()
    return replace(graph, head=replace(graph.head, domain=(relation,)))


def test_costs_hold_only_where_they_were_traced() -> None:
    rules = toy_job(restricted(sympy.Gt(B, 2))).rules
    assert [*broken(rules, FITTING)] == [
        "the costs of toy were traced for b > 2 only (b micro-batch, s sequence, t tp)."
    ]
    found = next(rule for rule in rules if rule.name == "domain-b > 2")
    columns = FITTING | {"micro_batch": np.array([1, 2, 3])}
    assert found.mask(columns).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("relation", "seq_len", "outside"),
    [
        (sympy.Ge(S, 4096), 2048, ("s >= 4096",)),
        (sympy.Ge(S, 4096), 4096, ()),
        (sympy.Gt(B * S, 4096), 2048, ()),  # from b = 3 on
        (sympy.Gt(B, 2), 2048, ()),
    ],
)
def test_sequences_that_no_micro_batch_makes_right(
    relation: sympy.Basic, seq_len: int, outside: tuple[str, ...]
) -> None:
    assert out_of_domain(toy_job(restricted(relation)).cost.domain, seq_len) == outside


def test_apply_keeps_every_rule_but_those_of_the_prediction() -> None:
    """What the search keeps beyond it is about priced clusters and traced sizes."""
    found = job()
    kept = apply_rules(found.platform.runtime, found.workload, found.facts)
    beyond = {rule.name for rule in found.rules} - {rule.name for rule in kept}
    assert beyond == {"tp-in-node", "stage-fills-nodes", "copies-fill-nodes"}
    assert {rule.name for rule in kept} - {rule.name for rule in found.rules} == {
        "cp-at-rest",
        "ep-at-rest",
    }
    assert not {rule.name for rule in apply_rules(found.platform.runtime, found.workload, None)} & {
        "tp-divides-MLP width",
        "enough-layers",
    }
