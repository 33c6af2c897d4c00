"""What a memory level does to a block: what it keeps, repeats and works in."""

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from sympy import Expr

from mist.plans.memory_levels import KEEPS_ALL, LEVELS, OWN_PART, PLAIN, USUAL
from mist.plans.workload import MemoryLevel
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import BlockCost
from mist.symbolic.host_bytes import allocated_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelCost:
    """What a memory level does to a block.

    `recompute_s`: device seconds that it runs again, collectives included;
    `recompute_launch_ratio`: share of the forward launches that the host repeats; `kept_bytes`:
    what stays from forward to backward; `working_bytes`: what the backward pass holds beyond that;
    `running_bytes`: with the gradients of parameters made so far, `adding_bytes`: with those just
    made; `allocated_bytes`: what is kept, as host memory is allocated for it; `forward_bytes`: what
    the forward pass holds beyond what is kept, where that may be above all of these.
    """

    name: str
    recompute_s: Expr
    recompute_launch_ratio: Expr | float
    kept_bytes: Expr
    working_bytes: Expr
    running_bytes: Expr
    adding_bytes: Expr
    allocated_bytes: Expr
    forward_bytes: Expr


def plain_levels(runtime: Runtime, more: Iterable[MemoryLevel]) -> tuple[MemoryLevel, ...]:
    """The levels of a runtime that convert nothing: the usual ones, and of `more` those it has."""
    priced = {*USUAL, *more}.intersection(PLAIN)
    return tuple(level for level in runtime.levels if level in priced)


def level_costs(
    cost: BlockCost, runtime: Runtime, *, is_layer: bool, more: Iterable[MemoryLevel] = ()
) -> tuple[LevelCost, ...]:
    """The levels of a plain block, from most kept to least; the ends of a model keep everything.

    `more`: those that are priced beside the usual ones.

    Those that convert it are priced from the trace of what it becomes (`converted_cost`).
    """
    levels = plain_levels(runtime, more) if is_layer else (KEEPS_ALL,)
    return tuple(_cost_of(level, cost, runtime) for level in levels)


def converted_cost(
    level: MemoryLevel, plain: BlockCost, converted: BlockCost, *, launched_ratio: float
) -> LevelCost:
    """A level that converts the block: what it does is in the trace of the converted one.

    `launched_ratio`: operations that it launches beyond those of the plain block, over the forward
    ones of that. The seconds beyond the plain block's may be negative, where kernels are fused.
    """
    again_s = converted.forward_s + converted.backward_s - plain.forward_s - plain.backward_s
    return LevelCost(
        name=level.column,
        recompute_s=again_s,
        recompute_launch_ratio=launched_ratio,
        kept_bytes=converted.saved_bytes,
        working_bytes=converted.transient_bytes,
        running_bytes=converted.transient_with_grads_bytes,
        adding_bytes=converted.transient_adding_bytes,
        allocated_bytes=converted.saved_allocated_bytes,
        forward_bytes=converted.forward_bytes,
    )


def _none(level: MemoryLevel, cost: BlockCost, runtime: Runtime) -> LevelCost:
    """Everything is kept."""
    return LevelCost(
        name=level.column,
        recompute_s=sympy.Integer(0),
        recompute_launch_ratio=0.0,
        kept_bytes=cost.saved_bytes,
        working_bytes=cost.transient_bytes,
        running_bytes=cost.transient_with_grads_bytes,
        adding_bytes=cost.transient_adding_bytes,
        allocated_bytes=cost.saved_allocated_bytes,
        forward_bytes=cost.forward_bytes,
    )


def _full(level: MemoryLevel, cost: BlockCost, runtime: Runtime) -> LevelCost:
    """The input is kept, and the whole block runs again: forward, then backward."""

    def again(transient: Expr) -> Expr:
        if cost.forward_bytes == 0:
            return cost.saved_bytes + transient
        return cost.saved_bytes + sym.larger(transient, cost.forward_bytes)

    return LevelCost(
        name=level.column,
        recompute_s=cost.recompute_s + cost.tp_recompute_s,
        recompute_launch_ratio=1.0,
        kept_bytes=cost.boundary_bytes,
        working_bytes=again(cost.transient_bytes),
        running_bytes=again(cost.transient_with_grads_bytes),
        adding_bytes=again(cost.transient_adding_bytes),
        allocated_bytes=allocated_bytes(runtime, cost.boundary_bytes),
        forward_bytes=sympy.Integer(0),
    )


def _own_part(level: MemoryLevel, cost: BlockCost, runtime: Runtime) -> LevelCost:
    """The part that the runtime itself runs again."""
    meaning = runtime.selective
    assert meaning is not None
    if meaning.recomputes_attention:
        return _part(
            level,
            _full(level, cost, runtime),
            kept_bytes=cost.saved_bytes - cost.scores_bytes,
            recompute_s=cost.attention_s,
            launch_ratio=cost.attention_ratio,
        )
    return _but_results(level, cost, runtime, stride=2 if meaning.keeps_half_products else 1)


def _but_results(
    level: MemoryLevel, cost: BlockCost, runtime: Runtime, *, stride: int
) -> LevelCost:
    """All but attention kernels and every n-th product; the host launches the rest once more."""
    kept_bytes, kept_s = {
        0: (sympy.Integer(0), sympy.Integer(0)),
        1: (cost.products_bytes, cost.products_s),
        2: (cost.half_products_bytes, cost.half_products_s),
    }[stride]
    return _part(
        level,
        _full(level, cost, runtime),
        kept_bytes=cost.boundary_bytes + cost.kernels_bytes + kept_bytes,
        recompute_s=cost.pointwise_s + cost.products_s - kept_s + cost.tp_recompute_s,
        launch_ratio=1.0,
    )


def _part(
    level: MemoryLevel,
    full: LevelCost,
    *,
    kept_bytes: Expr,
    recompute_s: Expr,
    launch_ratio: Expr | float,
) -> LevelCost:
    """A level that keeps more than `full`: as a layer runs backward, both hold the same."""
    return LevelCost(
        name=level.column,
        recompute_s=recompute_s,
        recompute_launch_ratio=launch_ratio,
        kept_bytes=kept_bytes,
        working_bytes=full.working_bytes - kept_bytes,
        running_bytes=full.running_bytes - kept_bytes,
        adding_bytes=full.adding_bytes - kept_bytes,
        allocated_bytes=kept_bytes,  # torch, which rounds, does not offload what it keeps here
        forward_bytes=sympy.Integer(0),
    )


def _cost_of(level: MemoryLevel, cost: BlockCost, runtime: Runtime) -> LevelCost:
    """What a level that converts nothing costs a block under a runtime that has it."""
    if level is OWN_PART:
        return _own_part(level, cost, runtime)
    stride = LEVELS[level].product_stride
    if stride is not None:
        return _but_results(level, cost, runtime, stride=stride)
    return {"nothing": _none, "all": _full}[LEVELS[level].repeats](level, cost, runtime)
