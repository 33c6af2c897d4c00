"""Time of a stage for one micro-batch: sums over its layers, the ends of the model, transfers.

    stable_s = sum over layers of their slots (`overlap.py`) + ends + p2p
    lone_s   = the same in the first forward and last backward + exposed collectives + optimizer
    weight_s = what of a micro-batch computes gradients of weights, which may wait

The delta of the step time (`mist.plans.schedules`) is lone_s - stable_s.
"""

import sympy
from sympy import Expr

from mist.model.graph import Block, ModelGraph
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import BlockCost, rank_params
from mist.symbolic.block_sums import StageBlocks, max_over, sum_over, term
from mist.symbolic.cost_setting import CostSetting, figure
from mist.symbolic.level_cost import LevelCost
from mist.symbolic.overlap import ends_seconds, optimizer_seconds, slots
from mist.symbolic.program import TIME_PARTS


def block_time_terms(
    name: str, cost: BlockCost, setting: CostSetting, traced: Block
) -> dict[str, Expr]:
    """Seconds of one block that do not depend on its memory level: once a step, and of weights."""
    step_s: Expr = sympy.Integer(0)
    if not traced.is_frozen:
        step_s = optimizer_seconds(cost.trainable_params, setting, is_layer=name.isdigit())
    return {
        f"{name}_optimizer_s": step_s,
        f"{name}_ends_s": ends_seconds(cost, setting.runtime),
        f"{name}_weight_s": cost.weight_s,
    }


def level_time_terms(
    prefix: str, cost: BlockCost, level: LevelCost, setting: CostSetting, traced: Block
) -> dict[str, Expr]:
    """Seconds of one block at a memory level, by part; `prefix`: block and level."""
    is_layer = prefix[0].isdigit()
    times = slots(cost, level, setting, is_layer=is_layer, goes_back=traced.goes_back)
    parts = {f"{prefix}_{part}_s": getattr(times, part) for part in TIME_PARTS if part != "p2p"}
    return parts | {f"{prefix}_stable_s": times.stable(), f"{prefix}_lone_s": times.lone()}


def transfer_terms(graph: ModelGraph, setting: CostSetting) -> dict[str, Expr]:
    """Seconds and bytes between stages: activations, and the gradient of a tied embedding."""
    sent = sympy.Symbol("cost_sent_bytes", real=True)
    tied = rank_params(param for param in graph.head.params if param.tied and param.trainable)
    tied_bytes = tied * setting.numerics.gradients.num_bytes
    return {
        "tied_reduce_in_node_s": sym.P2P(tied_bytes, 0),
        "tied_reduce_cross_s": sym.P2P(tied_bytes, 1),
        "p2p_bytes": sent,
        "activation_bytes": sent * setting.sequence_shards,
        "p2p_in_node_s": sym.P2P(sent, 0),
        "p2p_cross_s": sym.P2P(sent, 1),
    }


def stage_seconds(blocks: StageBlocks, runtime: Runtime) -> dict[str, Expr]:
    """Seconds of a stage by part (`TIME_PARTS`), and its stable, lone and weight-gradient time."""
    rows, micro_batch_s = blocks.every, figure(runtime, "host.micro_batch_launch_s")
    parts = {
        f"{part}_s": sum_over(rows, f"{{x}}_{{level}}_{part}_s")
        for part in TIME_PARTS
        if part != "p2p"
    }
    parts["p2p_s"] = _p2p_seconds(runtime)
    parts["launch_s"] += micro_batch_s
    each = parts["p2p_s"] + micro_batch_s
    # Only one layer's collectives have nothing to run beside at each end of a step: the others
    # hide behind layers that still run.
    once = max_over(blocks.layers, "{x}_ends_s") + sum_over(rows, "{x}_optimizer_s")
    once += _tied_reduce_seconds() + figure(runtime, "host.step_s")
    return {
        **parts,
        "stable_s": sum_over(rows, "{x}_{level}_stable_s") + each,
        "lone_s": sum_over(rows, "{x}_{level}_lone_s") + each + once,
        "weight_s": sum_over(rows, "{x}_weight_s"),
    }


def _p2p_seconds(runtime: Runtime) -> Expr:
    """Each chunk sends its output forward and its input's gradient back, once per micro-batch.

    The last stage sends nothing forward and the first nothing back, except for the chunks that are
    not the model's ends: v - 1 more each way, of which runtimes hide a part.
    """
    more = runtime.overlap.chunk_transfer_ratio.value * (sym.CHUNKS - 1)
    in_node, cross = term("p2p_in_node_s"), term("p2p_cross_s")
    to_next = in_node + sym.NEXT_CROSSES * (cross - in_node)
    to_prev = in_node + sym.PREV_CROSSES * (cross - in_node)
    return (1 - sym.LAST + more) * to_next + (1 - sym.FIRST + more) * to_prev


def _tied_reduce_seconds() -> Expr:
    """A tied embedding on two stages exchanges its gradient once per step."""
    in_node, cross = term("tied_reduce_in_node_s"), term("tied_reduce_cross_s")
    # 1 where a stage is one end only: a single stage has the matrix once and sums nothing.
    at_one_end = sym.FIRST + sym.LAST - 2 * sym.FIRST * sym.LAST
    return at_one_end * (in_node + sym.SPANS_NODES * (cross - in_node))
