"""Stage cost: time and memory of a pipeline stage as expressions (docs/cost-model.md).

Two levels, so that a search pays for each only where it varies:

*terms*, functions of the strategy (b, t, dp, zero, copies, offload ratios, in-node shares of the
data-parallel groups): for each block x and memory level, seconds of one micro-batch by part, bytes;
*stage*, functions of the terms and of the layout (layers of each kind and level, position):

    stable_s, lone_s, weight_s, and seconds by part     `stage_time.py`
    peak_bytes, its parts, its candidate instants       `stage_memory.py`
    host_bytes, drawn_bytes                             `host_bytes.py`

Formulas: Mist (EuroSys'25) section 4; bytes and collectives by ZeRO level from profiles/runtimes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Final

import sympy
from sympy import Expr

from mist.model.graph import Block, ModelGraph
from mist.plans.workload import HeadMode, MemoryLevel
from mist.symbolic import symbols as sym
from mist.symbolic.block import BlockCost, forward_ops, kept_bytes, layer_cost
from mist.symbolic.block_sums import max_over, stage_blocks
from mist.symbolic.cost_setting import CostSetting
from mist.symbolic.head_cost import any_head_cost, embed_cost
from mist.symbolic.host_bytes import allocated_terms, drawn_terms, stage_host_bytes
from mist.symbolic.level_cost import LevelCost, converted_cost, level_costs, plain_levels
from mist.symbolic.memory_terms import (
    block_memory_terms,
    forward_terms,
    level_memory_terms,
    memory_terms,
)
from mist.symbolic.stage_memory import stage_memory
from mist.symbolic.stage_time import (
    block_time_terms,
    level_time_terms,
    stage_seconds,
    transfer_terms,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Named expressions: `costs` of blocks and `terms` of costs, both of the strategy; `stage`.

    A `term_x` in `stage` is the term x, a `cost_x` in `terms` is the cost x. `levels`: the memory
    levels that are priced, in the order of the table of levels.
    """

    num_kinds: int
    levels: tuple[MemoryLevel, ...]
    costs: Mapping[str, Expr]
    terms: Mapping[str, Expr]
    stage: Mapping[str, Expr]


ConvertedBlocks = Mapping[MemoryLevel, Sequence[Block]]
"""The blocks of a model, traced again as a memory level converts them."""

NOT_CONVERTED: Final[ConvertedBlocks] = MappingProxyType({})

Heads = Mapping[HeadMode, Block]
"""The head of a model, traced again as it runs in a mode."""

NO_HEADS: Final[Heads] = MappingProxyType({})


def stage_cost(
    graph: ModelGraph,
    setting: CostSetting,
    converted: ConvertedBlocks = NOT_CONVERTED,
    heads: Heads = NO_HEADS,
    more: Collection[MemoryLevel] = (),
) -> StageCost:
    """Build the expressions of any stage of `graph`, a traced model, under a setting.

    `converted`: its blocks at the levels that convert them; `heads`: its head in other modes;
    `more`: levels to price beside the usual ones, which convert nothing.
    """
    runtime = setting.runtime
    traced = {str(kind): block for kind, block in enumerate(graph.blocks)}
    blocks = {name: layer_cost(block, setting) for name, block in traced.items()}
    traced |= {"embed": graph.embed, "head": graph.head}
    blocks["embed"] = embed_cost(graph.embed, setting)
    blocks["head"] = any_head_cost({HeadMode.NONE: graph.head, **heads}, setting)
    costs = {
        "sent_bytes": _sent_bytes(graph, setting),
        "shared_bytes": kept_bytes(graph.shared, graph.shared_single, setting),
    }
    terms, forward = dict[str, Expr](), dict[str, Expr]()
    named: dict[str, BlockCost] = {}
    for name, cost in blocks.items():
        values, named[name] = cost.named(name)
        costs |= values
        is_layer = name.isdigit()
        terms |= block_memory_terms(name, named[name], traced[name])
        terms |= block_time_terms(name, named[name], setting, traced[name])
        levels = level_costs(named[name], runtime, is_layer=is_layer, more=more)
        if is_layer:
            again = {level: blocks_at[int(name)] for level, blocks_at in converted.items()}
            values, others = _converted_costs(name, traced[name], again, named[name], setting)
            costs |= values
            levels += others
        for level in levels:
            prefix = f"{name}_{level.name}"
            terms |= level_time_terms(prefix, named[name], level, setting, traced[name])
            terms |= level_memory_terms(prefix, level, runtime if is_layer else None)
            forward[prefix] = level.forward_bytes
    every = (named[str(kind)].trainable_params for kind in graph.layer_kinds())
    terms |= memory_terms(graph, setting) | transfer_terms(graph, setting) | forward_terms(forward)
    terms |= drawn_terms(graph, runtime) | allocated_terms(graph, setting)
    terms["all_layers_params"] = sympy.Add(*every)
    priced = {*plain_levels(runtime, more), *converted}
    order = tuple(level for level in MemoryLevel if level in priced)
    rows = stage_blocks(graph.layer_kinds(), order, terms)
    return StageCost(
        num_kinds=len(graph.blocks),
        levels=order,
        costs=costs,
        terms=terms,
        stage={
            **stage_seconds(rows, runtime),
            **stage_memory(rows, runtime, setting.numerics),
            "host_bytes": stage_host_bytes(rows, runtime),
            "drawn_bytes": max_over(rows.every, "{x}_drawn_bytes"),
        },
    )


def _converted_costs(
    name: str,
    traced: Block,
    again: Mapping[MemoryLevel, Block],
    plain: BlockCost,
    setting: CostSetting,
) -> tuple[dict[str, Expr], tuple[LevelCost, ...]]:
    """The levels that convert a block, and the costs of what it becomes that they name."""
    values: dict[str, Expr] = {}
    levels = []
    for level, block in again.items():
        costs, cost = layer_cost(block, setting).named(f"{name}_{level.column}")
        more = max(len(block.ops) - len(traced.ops), 0)
        ratio = more / max(len(forward_ops(traced)), 1)
        found = converted_cost(level, plain, cost, launched_ratio=ratio)
        levels.append(found)
        # Each cost is a column that every strategy pays for: only those that the level reads.
        read = {getattr(found, item.name) for item in fields(found)}
        names = {str(s) for each in read if isinstance(each, Expr) for s in each.free_symbols}
        values |= {each: costs[each] for each in costs if f"cost_{each}" in names}
    return values, tuple(levels)


def _sent_bytes(graph: ModelGraph, setting: CostSetting) -> Expr:
    """What a stage sends to the next: the largest input of any layer."""
    inputs = {block.boundary_bytes + block.carried_bytes for block in graph.blocks}
    # Sorted, because the order of a set would change the text of the program.
    return sym.larger(*sorted(inputs, key=str)) / setting.sequence_shards
