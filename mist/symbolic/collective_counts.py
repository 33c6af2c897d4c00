"""Which collectives the cost model charges one rank for in a step: how many, and how many bytes.

Counted from the slots and blocks that are priced (`overlap.sequence`, `Block.collectives`):
parameters are gathered in compute precision, gradients reduced in fp32 (and a rank's part of them
summed over copies of the states), tensor parallelism
exchanges activations; a recomputed layer repeats those of its forward pass that its level repeats.
Sums of a few numbers (loss, norm, a divided softmax) are not charged.
"""

from collections import Counter

import sympy

from mist.model.graph import B, Block, ModelGraph, S, T
from mist.plans.memory_levels import KEEPS_ALL
from mist.plans.numerics import NUMERICS
from mist.plans.plan import Plan, StagePlan
from mist.plans.schedules import zero_as_run
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import (
    collectives,
    rank_params,
    recomputed_exits,
)
from mist.symbolic.overlap import sequence

Key = tuple[str, str]  # axis and kind


def charged(
    graph: ModelGraph, runtime: Runtime, plan: Plan, stage: int
) -> dict[Key, tuple[int, int]]:
    """Of one rank of a stage, along ("dp" or "tp", kind): how many in a step, and their bytes."""
    stage_plan = plan.stages[stage]
    kinds = graph.layer_kinds()
    numbers = [n for first, count in stage_plan.layers for n in range(first, first + count)]
    layers = [graph.blocks[kinds[n]] for n in numbers]
    ends = [graph.embed] * (numbers[0] == 0) + [graph.head] * (numbers[-1] == len(kinds) - 1)
    counts: dict[Key, list[int]] = {}
    if stage_plan.dp > 1:
        _data_parallel(counts, plan, stage_plan, runtime, layers, ends)
    if stage_plan.tp > 1:
        _tensor_parallel(counts, plan, stage_plan, layers, ends)
    return {key: (count, size) for key, (count, size) in counts.items() if count}


def _add(counts: dict[Key, list[int]], key: Key, count: int, num_bytes: int) -> None:
    row = counts.setdefault(key, [0, 0])
    row[0] += count
    row[1] += count * num_bytes


def _data_parallel(  # noqa: PLR0913, PLR0917 - what is counted, of what
    counts: dict[Key, list[int]],
    plan: Plan,
    stage_plan: StagePlan,
    runtime: Runtime,
    layers: list[Block],
    ends: list[Block],
) -> None:
    numerics = NUMERICS[plan.workload.precision]
    compute, fp32 = numerics.compute.num_bytes, numerics.gradients.num_bytes
    zero = int(zero_as_run(plan.schedule.kind, stage_plan.zero))
    groups = [([layer], not layer.goes_back) for layer in layers]
    if ends:
        groups.append((ends, runtime.transients.root_group))
    for blocks, stays in groups:
        params = _params(blocks, stage_plan.tp)
        trained = _params(blocks, stage_plan.tp, trainable=True)
        times = _times(zero, plan.num_micro_batches, runtime, stays=stays)
        if params:
            _add(counts, ("dp", "all_gather"), times["gathers"], params * compute)
        if trained:
            _add(counts, ("dp", "reduce_scatter"), times["scatters"], trained * fp32)
        if trained and stage_plan.dp > stage_plan.dp_shard:
            part = trained // stage_plan.dp_shard
            _add(counts, ("dp", "all_reduce"), times["reduces"], part * fp32)


def _times(zero: int, num_micro_batches: int, runtime: Runtime, *, stays: bool) -> Counter[str]:
    """How often a group of parameters is gathered, scattered and reduced in a step.

    `stays`: what is gathered for the forward pass serves the backward pass, if there is one.
    """
    none = sympy.Integer(0)
    stable, lone = sequence(none, none, runtime, stays_gathered=stays)
    counts: Counter[str] = Counter()
    # The lone slots are the first forward and the last backward pass of a step.
    for slots, times in ((stable, num_micro_batches - 1), (lone, 1)):
        for slot in slots:
            for name in ("gathers", "scatters", "reduces"):
                counts[name] += times * int(getattr(slot, name).subs(sym.ZERO, zero))
    return counts


def _params(blocks: list[Block], tp: int, *, trainable: bool = False) -> int:
    """Parameters of blocks on a rank, or those of them with a gradient; a tied one counts once."""
    rows = [p for block in blocks for p in block.params if p.trainable or not trainable]
    tied_again = [p for p in rows if p.tied and len(blocks) > 1]
    every = int(rank_params(rows).subs(T, tp))
    return every - int(rank_params(tied_again).subs(T, tp))


def _tensor_parallel(
    counts: dict[Key, list[int]],
    plan: Plan,
    stage_plan: StagePlan,
    layers: list[Block],
    ends: list[Block],
) -> None:
    at = {B: stage_plan.micro_batch, S: plan.workload.seq_len, T: stage_plan.tp}
    levels = (*stage_plan.levels, *[KEEPS_ALL] * len(ends))
    for block, level in zip([*layers, *ends], levels, strict=True):
        for each in collectives(block, sequence_parallel=stage_plan.sp):
            count = each.count
            if level is not KEEPS_ALL and each.phase == "forward":
                # Sums within norms are smaller, and made again.
                leaves = each.kind != "all_gather" and each.bytes == block.tp_bytes
                spared = block.num_exits - recomputed_exits(block) if leaves else 0
                count += (each.count - spared) * int(block.num_recomputed_ops > 0)
            size = int(each.bytes.subs(at))
            _add(counts, ("tp", each.kind), plan.num_micro_batches * count, size)
