"""Parameters that are not trained: their states, their collectives and their time.

Bytes of runtime torch are those of live storages: FSDP2 keeps the shard of a frozen parameter, in
compute precision, and below ZeRO-3 its gathered copy (real programs: tests/workflow/
test_verifying.py). Those of other frameworks follow from what their optimizers copy.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from sympy import Expr

from mist.model.graph import B, Block, ModelGraph, Op, OpKind, S, T
from mist.plans.workload import Optimizer, Precision
from mist.platform import load_platform
from mist.platform.states import sum_states
from mist.symbolic import symbols as sym
from mist.symbolic.block import layer_cost
from mist.symbolic.estimate import model_flop
from mist.symbolic.job import Job
from mist.symbolic.state_bytes import state_bytes
from tests.symbolic.test_stage import judged
from tests.toys import adamw_setting, toy_graph, toy_job, toy_platform

DP, LAYERS, SEQ, BATCH = 8, 8, 2048, 64
TORCH_BF16 = {0: (4, 0), 1: (2, 2), 2: (2, 2), 3: (0, 2)}  # replicated, divided over the ranks
TORCH_FP32 = {0: (8, 0), 1: (4, 4), 2: (4, 4), 3: (0, 4)}
OTHERS = {
    ("megatron", "bf16"): {0: (2, 0), 1: (2, 0)},
    ("megatron", "fp32"): {0: (4, 0), 1: (4, 0)},
    ("deepspeed-zero3", "bf16"): {0: (2, 0), 1: (2, 0), 2: (2, 0), 3: (0, 2)},
    ("torchtitan", "bf16"): {0: (6, 0), 3: (0, 4)},
    ("torchtitan", "fp32"): {0: (4, 0), 3: (0, 4)},
    ("fsdp1", "bf16"): {3: (0, 4)},
    ("torchtune", "bf16"): {0: (2, 0)},
    ("nanotron", "bf16"): {0: (2, 0), 1: (2, 0)},
}
TABLE = {("torch", "bf16"): TORCH_BF16, ("torch", "fp32"): TORCH_FP32, **OTHERS}


@pytest.mark.parametrize(("runtime", "precision"), TABLE)
def test_bytes_of_a_frozen_parameter(runtime: str, precision: str) -> None:
    found = load_platform(num_gpus=8, gpu="h100-sxm", cluster=None, runtime=runtime).runtime
    expr = state_bytes(adamw_setting(found, Precision(precision)), frozen=True)
    for zero, (replicated, divided) in TABLE[runtime, precision].items():
        value = expr.subs({sym.ZERO: zero, sym.SHARD: DP})
        assert float(value) == replicated + divided / DP, zero


def frozen(block: Block, *, flows: bool) -> Block:
    """The block with nothing trained: of its backward pass the part of its input, if it `flows`."""
    stays = [op for op in block.ops if op.phase == "forward" or (flows and not of_weights(op))]
    params = tuple(replace(param, trainable=False) for param in block.params)
    kept = block.saved if flows else ()
    again = block.num_recomputed_ops if flows else 0
    block = replace(block, params=params, ops=tuple(stays), saved=kept, saved_single=kept)
    return replace(block, flows=flows, num_recomputed_ops=again)


def of_weights(op: Op) -> bool:
    return op.kind is OpKind.GEMM and bool(op.dims[3].has(B))


def only_head(*, flows: bool = False) -> ModelGraph:
    """The toy with all but its head frozen; `flows`: as if its input had a gradient."""
    graph = toy_graph((LAYERS,))
    (block,) = graph.blocks
    rest = {"blocks": (frozen(block, flows=flows),), "embed": frozen(graph.embed, flows=flows)}
    return replace(graph, **rest, num_trainable=graph.head.num_params)  # type: ignore[arg-type]


def stage_of(graph: ModelGraph, zero: int, full: int = 0) -> Mapping[str, float]:
    job = toy_job(graph)
    rows = {"tp": 1, "zero": zero, "micro_batch": 1, "num_micro_batches": 8}
    return {n: float(v[0]) for n, v in judged(job, rows, [(0, LAYERS, full)]).items()}


@pytest.mark.parametrize("zero", TORCH_BF16)
def test_states_of_a_frozen_model(zero: int) -> None:
    graph, (replicated, divided) = only_head(), TORCH_BF16[zero]
    states = toy_platform().runtime.states_of(Precision.BF16, Optimizer.ADAMW)
    expected = graph.num_trainable * sum_states(states, zero).bytes_per_param(DP)
    expected += (graph.num_params - graph.num_trainable) * (replicated + divided / DP)
    assert stage_of(graph, zero)["states_bytes"] == pytest.approx(expected, rel=1e-12)


def test_what_is_frozen_is_gathered_but_not_reduced() -> None:
    setting = adamw_setting(toy_platform().runtime)
    whole = layer_cost(toy_graph((LAYERS,)).blocks[0], setting)
    for flows in (True, False):
        cost = layer_cost(only_head(flows=flows).blocks[0], setting)
        assert (cost.params, cost.gather_s) == (whole.params, whole.gather_s)
        none = (cost.trainable_params, cost.scatter_s, cost.reduce_s, cost.scatter_copy_s)
        assert none == (0, 0, 0, 0)
        assert cost.weight_s == 0
        assert (cost.backward_s != 0) is flows
        assert (cost.boundary_bytes != 0) is flows


def test_reductions_are_of_what_is_trained() -> None:
    setting = adamw_setting(toy_platform().runtime)
    graph = toy_graph((LAYERS,))
    up, down, norm = graph.blocks[0].params
    some = replace(graph.blocks[0], params=(replace(up, trainable=False), down, norm))
    wanted = 4 * (down.num_reals / T + norm.num_reals)
    sizes = [call.args[0] for call in layer_cost(some, setting).scatter_s.atoms(sym.REDUCE_SCATTER)]
    assert sizes == [wanted]


def test_nothing_is_gathered_for_a_backward_pass_that_is_not_there() -> None:
    stays, flows = stage_of(only_head(), 3), stage_of(only_head(flows=True), 3)
    assert 0 < stays["dp_s"] < flows["dp_s"]
    assert stays["launch_s"] < flows["launch_s"]


def test_recomputation_of_nothing_takes_no_time_and_keeps_nothing() -> None:
    eager, full = stage_of(only_head(), 0), stage_of(only_head(), 0, full=LAYERS)
    assert full == pytest.approx(eager, rel=1e-12)  # sums in another order


def test_flops_that_training_needs() -> None:
    """Forward, and backward what runs: products of inputs, and those of the head's weights."""
    for graph in (only_head(), only_head(flows=True)):
        job = toy_job(graph)
        blocks = [graph.embed, *graph.blocks * LAYERS, graph.head]
        expected = sum(number(op.flop) for block in blocks for op in block.ops)
        assert model_flop(job) == pytest.approx(BATCH * expected, rel=1e-12)
    assert model_flop(toy_job()) == pytest.approx(BATCH * 3 * forward(toy_job()), rel=1e-12)


def forward(job: Job) -> float:
    graph = toy_graph()
    blocks = [graph.embed, *graph.blocks * job.facts.num_layers, graph.head]
    return sum(number(block.flop("forward")) for block in blocks)


def number(expr: Expr) -> float:
    return float(expr.subs({B: 1, S: SEQ, T: 1}))
