"""Stage cost: time and memory of a pipeline stage as expressions (docs/cost-model.md).

Two levels, so that a search pays for each only where it varies:

*terms*, functions of the strategy (b, t, dp, zero, copies, offload ratios, in-node shares of the
data-parallel groups): for each block x and memory level, seconds of one micro-batch by part, bytes;
*stage*, functions of the terms and of the layout (layers of each kind and level, position):

    stable_s = sum over layers of their slots (`overlap.py`) + ends + p2p
    lone_s   = the same in the first forward and last backward + exposed collectives + optimizer
    weight_s = what of a micro-batch computes gradients of weights, which may wait
    peak     = states + kept * in_flight + working set of the worst block + gathered + buffers,
               or as the optimizer steps: states + what that makes + buffers
    host     = what of states and kept activations lives in host memory

Formulas: Mist (EuroSys'25) section 4; bytes and collectives by ZeRO level from profiles/runtimes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy import Expr

from mist.model.graph import Block, ModelGraph
from mist.plans.workload import MemoryLevel, Precision
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import (
    BlockCost,
    CostSetting,
    kept_bytes,
    layer_cost,
    rank_params,
)
from mist.symbolic.block_sums import Row, of_blocks, params_of, rows_of, term, total, worst
from mist.symbolic.fsdp_groups import activations_bytes, gradients_bytes, held_by_groups
from mist.symbolic.head_cost import embed_cost, head_cost
from mist.symbolic.host_bytes import allocated_terms, drawn_terms, hosted_terms
from mist.symbolic.optimizer_memory import step_bytes
from mist.symbolic.overlap import (
    Level,
    at_least,
    ends_seconds,
    levels,
    optimizer_seconds,
    slots,
)
from mist.symbolic.pipeline_memory import UNMADE_RATIO, kept_outputs
from mist.symbolic.program import TIME_PARTS
from mist.symbolic.state_bytes import from_level, frozen_bytes, gathered_bytes, unmade_terms

_NONE, _ONE = sympy.Integer(0), sympy.Integer(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Named expressions: `costs` of blocks and `terms` of costs, both of the strategy; `stage`.

    A `term_x` in `stage` is the term x, a `cost_x` in `terms` is the cost x.
    """

    num_kinds: int
    costs: Mapping[str, Expr]
    terms: Mapping[str, Expr]
    stage: Mapping[str, Expr]


def stage_cost(graph: ModelGraph, runtime: Runtime, precision: Precision) -> StageCost:
    """Build the expressions of any stage of `graph`.

    Args:
        graph: the traced model.
        runtime: the framework whose behaviour is predicted.
        precision: compute precision of the workload.
    """
    setting = CostSetting(runtime=runtime, precision=precision)
    traced = {str(kind): block for kind, block in enumerate(graph.blocks)}
    blocks = {name: layer_cost(block, setting) for name, block in traced.items()}
    traced |= {"embed": graph.embed, "head": graph.head}
    blocks["embed"] = embed_cost(graph.embed, setting)
    blocks["head"] = head_cost(graph.head, setting)
    costs = {
        "sent_bytes": _sent_bytes(graph, setting),
        "shared_bytes": kept_bytes(graph.shared, graph.shared_single, setting),
    }
    terms: dict[str, Expr] = {}
    named: dict[str, BlockCost] = {}
    for name, cost in blocks.items():
        values, named[name] = cost.named(name)
        costs |= values
        terms |= _block_terms(name, named[name], setting, traced[name])
    terms |= _stage_terms(graph, setting) | drawn_terms(graph, runtime)
    terms |= allocated_terms(graph, setting)
    every = (named[str(kind)].trainable_params for kind in graph.layer_kinds())
    terms["all_layers_params"] = sympy.Add(*every)
    return StageCost(
        num_kinds=len(graph.blocks),
        costs=costs,
        terms=terms,
        stage=_stage(len(graph.blocks), runtime, precision),
    )


def _block_terms(
    name: str, cost: BlockCost, setting: CostSetting, traced: Block
) -> dict[str, Expr]:
    """Terms of one block; the embedding and the head are never recomputed or offloaded."""
    is_layer, runtime = name.isdigit(), setting.runtime
    terms = {
        f"{name}_params": cost.params,
        f"{name}_trainable_params": cost.trainable_params,
        f"{name}_hosted_params": cost.hosted_params,
        f"{name}_back_params": cost.params * int(traced.goes_back),
        f"{name}_without_gradient": sympy.Integer(int(not traced.flows)),
        f"{name}_largest_params": cost.largest_params,
        f"{name}_optimizer_s": _NONE
        if traced.is_frozen
        else optimizer_seconds(cost.trainable_params, runtime, is_layer=is_layer),
        f"{name}_ends_s": ends_seconds(cost, runtime),
        f"{name}_weight_s": cost.weight_s,
        f"{name}_input_bytes": cost.input_bytes,
        f"{name}_early_bytes": cost.early_bytes,
        f"{name}_awaited_bytes": cost.awaited_bytes,
        f"{name}_made_bytes": cost.made_bytes,
    }
    for level in levels(cost, runtime, is_layer=is_layer):
        prefix = f"{name}_{level.name}"
        times = slots(cost, level, setting, is_layer=is_layer, goes_back=traced.goes_back)
        for part in TIME_PARTS[:-1]:
            terms[f"{prefix}_{part}_s"] = getattr(times, part)
        terms |= {f"{prefix}_stable_s": times.stable(), f"{prefix}_lone_s": times.lone()}
        terms |= _level_bytes(prefix, level, runtime if is_layer else None)
    return terms


def _level_bytes(prefix: str, level: Level, offloads: Runtime | None) -> dict[str, Expr]:
    """Bytes of a block at a level: on the device, in host memory, and on their way."""
    share, staged = sympy.Integer(0), 0.0
    if offloads is not None and offloads.offload is not None and offloads.offload.activations:
        share = sym.OFFLOAD["activations"]
        staged = offloads.offload.num_staged_layers.value
    return {
        f"{prefix}_kept_bytes": (1 - share) * level.kept_bytes,
        f"{prefix}_host_bytes": share * level.allocated_bytes,
        f"{prefix}_staged_bytes": staged * share * level.kept_bytes,
        f"{prefix}_working_bytes": level.working_bytes,
        f"{prefix}_running_bytes": level.running_bytes,
        f"{prefix}_adding_bytes": level.adding_bytes,
    }


def _stage_terms(graph: ModelGraph, setting: CostSetting) -> dict[str, Expr]:
    """Terms that belong to no block: states per parameter, transfers, ties."""
    sent = sympy.Symbol("cost_sent_bytes", real=True)
    tied = [param for param in graph.head.params if param.tied]
    trained = rank_params(param for param in tied if param.trainable)
    tied_bytes = trained * Precision.FP32.num_bytes
    return {
        "tied_params": rank_params(tied),
        "tied_trainable_params": trained,
        "shared_bytes": sympy.Symbol("cost_shared_bytes", real=True),
        "tied_reduce_in_node_s": sym.P2P(tied_bytes, 0),
        "tied_reduce_cross_s": sym.P2P(tied_bytes, 1),
        "state_bytes_per_param": _state_bytes(setting.runtime, setting.precision),
        "frozen_bytes_per_param": frozen_bytes(setting.runtime, setting.precision),
        **hosted_terms(setting.runtime),
        "step_bytes_per_param": step_bytes(graph, setting.runtime),
        "gathered_bytes_per_param": gathered_bytes(setting.runtime, setting.precision),
        "compute_bytes_per_param": sympy.Float(setting.precision.num_bytes),
        "fp32_bytes_per_param": sympy.Float(Precision.FP32.num_bytes),
        **unmade_terms(),
        "whole_bytes_per_param": from_level(3, setting.precision),
        "unsharded_bytes_per_param": from_level(0, setting.precision, below=3),
        "buffer_bytes_per_param": from_level(2, Precision.FP32),
        "reduces": at_least(2),
        "p2p_bytes": sent,
        "activation_bytes": sent * setting.sequence_shards,
        "p2p_in_node_s": sym.P2P(sent, 0),
        "p2p_cross_s": sym.P2P(sent, 1),
    }


def _sent_bytes(graph: ModelGraph, setting: CostSetting) -> Expr:
    """What a stage sends to the next: the largest input of any layer."""
    inputs = {block.boundary_bytes + block.carried_bytes for block in graph.blocks}
    return sym.larger(*sorted(inputs, key=str)) / setting.sequence_shards


def _state_bytes(runtime: Runtime, precision: Precision) -> Expr:
    """Bytes per parameter that live through the step: parameters, gradients, moments."""
    rows = {int(z): runtime.state(precision, z) for z in runtime.knobs.zero_levels}
    replicated = {zero: row.replicated_bytes_per_param.value for zero, row in rows.items()}
    sharded = {zero: row.sharded_bytes_per_param.value for zero, row in rows.items()}
    return sym.by_zero(replicated) + sym.by_zero(sharded) / sym.SHARD


def _stage(num_kinds: int, runtime: Runtime, precision: Precision) -> dict[str, Expr]:
    """Sums over the layers of the stage: every count and position times its term."""
    rows = list(rows_of(num_kinds, runtime))
    parts = {f"{part}_s": total(rows, f"{part}_s") for part in TIME_PARTS if part != "p2p"}
    p2p = _p2p(runtime)
    parts |= {"p2p_s": p2p}
    each = runtime.host.micro_batch_launch_s.value
    parts["launch_s"] += each
    layers = [row for row in rows if row[0].isdigit()]
    once = worst(layers, "{x}_ends_s") + of_blocks(rows, "optimizer_s") + _tied_reduce()
    once += runtime.host.step_s.value
    memory, instants = _memory(rows, runtime, precision)
    return {
        **parts,
        "stable_s": total(rows, "stable_s") + p2p + each,
        "lone_s": total(rows, "lone_s") + p2p + each + once,
        "weight_s": of_blocks(rows, "weight_s"),
        **{f"{part}_bytes": expr for part, expr in memory.items()},
        "peak_bytes": sympy.Add(*memory.values()),
        **instants,
        "host_bytes": _host_bytes(rows, runtime),
        "drawn_bytes": worst(rows, "{x}_drawn_bytes"),
    }


def _p2p(runtime: Runtime) -> Expr:
    """Each chunk sends its output forward and its input's gradient back, once per micro-batch."""
    more = runtime.overlap.chunk_transfer_ratio.value * (sym.CHUNKS - 1)
    in_node, cross = term("p2p_in_node_s"), term("p2p_cross_s")
    to_next = in_node + sym.NEXT_CROSSES * (cross - in_node)
    to_prev = in_node + sym.PREV_CROSSES * (cross - in_node)
    return (1 - sym.LAST + more) * to_next + (1 - sym.FIRST + more) * to_prev


def _tied_reduce() -> Expr:
    """A tied embedding on two stages exchanges its gradient once per step."""
    in_node, cross = term("tied_reduce_in_node_s"), term("tied_reduce_cross_s")
    at_one_end = sym.FIRST + sym.LAST - 2 * sym.FIRST * sym.LAST
    return at_one_end * (in_node + sym.SPANS_NODES * (cross - in_node))


def _memory(
    rows: list[Row], runtime: Runtime, precision: Precision
) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """Peak bytes by part, which sum to the peak; and bytes at the instants that may be the peak.

    These are: a backward pass begins, it ends, the last one does (`pipeline_memory.last`), the
    optimizer steps. The peak is the largest of them, and each is a straight line in the numbers of
    layers.
    """
    own = runtime.memory.fixed_bytes.value
    own += runtime.memory.buffer_ratio.value * term("activation_bytes")
    own += worst(rows, "{x}_{level}_staged_bytes")
    trainable = params_of(rows, "trainable_params")
    states = trainable * term("state_bytes_per_param") - _hosted_bytes(rows)
    states += (params_of(rows) - trainable) * term("frozen_bytes_per_param")
    step = trainable * term("step_bytes_per_param")
    if runtime.transients.root_group:
        amid, gathered, grads = held_by_groups(rows, precision)
        states -= UNMADE_RATIO * gradients_bytes(rows)
        step += grads
    else:
        streamed = term("streamed_bytes_per_param") * worst(rows, "{x}_params")
        works = sym.larger(worst(rows, "{x}_{level}_working_bytes"), streamed)
        amid = dict.fromkeys(("begin_bytes", "end_bytes", "last_bytes"), works)
        gathered = term("gathered_bytes_per_param") * worst(rows, "{x}_params")
    others = {
        "states": states,
        "activations": activations_bytes(rows),
        "gathered": gathered,
        "buffers": _exchanged(rows, runtime) + own,
    }
    overhead = runtime.memory.allocator_overhead_ratio.value
    step -= others["activations"] + others["gathered"]
    instants = {**amid, "step_bytes": step}
    held, working = sympy.Add(*others.values()), sym.larger(*dict.fromkeys(instants.values()))
    parts = {name: others[name] for name in ("states", "activations")} | {"working": working}
    parts |= {name: others[name] for name in ("gathered", "buffers")}
    parts["allocator"] = overhead * (held + working)
    return parts, {name: (1 + overhead) * (held + size) for name, size in instants.items()}


def _exchanged(rows: list[Row], runtime: Runtime) -> Expr:
    """Bytes that a stage receives into, and of those it sent that it still holds."""
    if not runtime.memory.keeps_outputs:
        return (2 * sym.CHUNKS - sym.LAST - sym.FIRST) * term("p2p_bytes")
    eager = [row for row in rows if row[0].isdigit() and row[1] == MemoryLevel.NONE]
    deeper = [row for row in rows if row[0].isdigit() and row[1] != MemoryLevel.NONE]
    # Layers that keep least, and among that their input, come first.
    alone = 1 - sym.smaller(1, sympy.Add(*(count for _, _, count in deeper)))
    borders, inputs = kept_outputs()
    return borders * term("p2p_bytes") + inputs * alone * worst(eager, "{x}_input_bytes")


def _hosted_bytes(rows: list[Row]) -> Expr:
    """States in host memory: weights and gradients of layers, optimizer states of all blocks."""
    layers = [row for row in rows if row[0].isdigit()]
    return (
        of_blocks(layers, "hosted_params") * term("hosted_weights_bytes_per_param")
        + of_blocks(layers, "trainable_params") * term("hosted_grads_bytes_per_param")
        + params_of(rows, "trainable_params") * term("hosted_bytes_per_param")
    )


def _host_bytes(rows: list[Row], runtime: Runtime) -> Expr:
    """What one rank keeps in host memory, as it is allocated there."""
    overhead = runtime.offload.host_overhead_ratio if runtime.offload else None
    states = of_blocks(rows, "allocated_bytes")
    states -= sym.FIRST * sym.LAST * term("tied_allocated_bytes")
    states *= 1 + overhead.value if overhead else 1
    return states + (sym.IN_FLIGHT + sym.LAYERS_MORE) * total(rows, "host_bytes")
