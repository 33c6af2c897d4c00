"""What a memory level does to a block: what it keeps, repeats and works in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import sympy
from sympy import Expr

from mist.plans.memory_levels import KEEPS_ALL, levels_that
from mist.plans.workload import MemoryLevel
from mist.platform.runtime import Runtime
from mist.symbolic.block import BlockCost
from mist.symbolic.host_bytes import allocated_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelCost:
    """What a memory level does to a block.

    `recompute_s`: device seconds that it runs again, collectives included;
    `recompute_launch_ratio`: share of the forward launches that the host repeats; `kept_bytes`:
    what stays from forward to backward; `working_bytes`: what the backward pass holds beyond that;
    `running_bytes`: with the gradients of parameters made so far, `adding_bytes`: with those just
    made; `allocated_bytes`: what is kept, as host memory is allocated for it.
    """

    name: str
    recompute_s: Expr
    recompute_launch_ratio: Expr | float
    kept_bytes: Expr
    working_bytes: Expr
    running_bytes: Expr
    adding_bytes: Expr
    allocated_bytes: Expr


def plain_levels(runtime: Runtime) -> tuple[MemoryLevel, ...]:
    """The levels of a runtime at which layers are as the model has them."""
    return levels_that(lambda row: not row.converts, runtime.levels)


def level_costs(cost: BlockCost, runtime: Runtime, *, is_layer: bool) -> tuple[LevelCost, ...]:
    """The levels of a plain block, from most kept to least; the ends of a model keep everything.

    Those that convert it are priced from the trace of what it becomes (`converted_cost`).
    """
    levels = plain_levels(runtime) if is_layer else (KEEPS_ALL,)
    return tuple(LEVEL_COSTS[level](cost, runtime) for level in levels)


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
    )


def _none(cost: BlockCost, runtime: Runtime) -> LevelCost:
    """Everything is kept."""
    return LevelCost(
        name=MemoryLevel.NONE.value,
        recompute_s=sympy.Integer(0),
        recompute_launch_ratio=0.0,
        kept_bytes=cost.saved_bytes,
        working_bytes=cost.transient_bytes,
        running_bytes=cost.transient_with_grads_bytes,
        adding_bytes=cost.transient_adding_bytes,
        allocated_bytes=cost.saved_allocated_bytes,
    )


def _full(cost: BlockCost, runtime: Runtime) -> LevelCost:
    """The input is kept, and the whole block runs again."""
    return LevelCost(
        name=MemoryLevel.FULL.value,
        recompute_s=cost.recompute_s + cost.tp_recompute_s,
        recompute_launch_ratio=1.0,
        kept_bytes=cost.boundary_bytes,
        working_bytes=cost.saved_bytes + cost.transient_bytes,
        running_bytes=cost.saved_bytes + cost.transient_with_grads_bytes,
        adding_bytes=cost.saved_bytes + cost.transient_adding_bytes,
        allocated_bytes=allocated_bytes(runtime, cost.boundary_bytes),
    )


def _selective(cost: BlockCost, runtime: Runtime) -> LevelCost:
    """Selective recomputation as the runtime means it."""
    meaning, full = runtime.selective, _full(cost, runtime)
    assert meaning is not None
    ratio: Expr | float
    if meaning.recomputes_attention:
        recompute_s, ratio = cost.attention_s, cost.attention_ratio
        kept_bytes = cost.saved_bytes - cost.scores_bytes
    elif meaning.kept_ratio is None or meaning.recomputed_ratio is None:
        recompute_s, ratio = cost.pointwise_s + cost.tp_recompute_s, 1.0
        kept_bytes = cost.boundary_bytes + cost.products_bytes
    else:
        ratio = meaning.recomputed_ratio.value
        recompute_s = ratio * full.recompute_s
        kept_bytes = meaning.kept_ratio.value * cost.saved_bytes
    return LevelCost(
        name=MemoryLevel.SELECTIVE.value,
        recompute_s=recompute_s,
        recompute_launch_ratio=ratio,
        kept_bytes=kept_bytes,
        working_bytes=full.working_bytes - kept_bytes,
        running_bytes=full.running_bytes - kept_bytes,
        adding_bytes=full.adding_bytes - kept_bytes,
        allocated_bytes=kept_bytes,  # torch, which rounds, does not offload what it keeps here
    )


LEVEL_COSTS: Final[Mapping[MemoryLevel, Callable[[BlockCost, Runtime], LevelCost]]] = (
    MappingProxyType(
        {
            MemoryLevel.NONE: _none,
            MemoryLevel.SELECTIVE: _selective,
            MemoryLevel.FULL: _full,
        }
    )
)
"""What each memory level costs a block under a runtime that has it."""
