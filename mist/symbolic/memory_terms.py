"""Terms of memory: bytes of each block at each level, and bytes per parameter by ZeRO level.

`stage_memory.py` sums them over the layers of a stage.
"""

from collections.abc import Mapping

import sympy
from sympy import Expr

from mist.model.graph import Block, ModelGraph
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import BlockCost, rank_params
from mist.symbolic.cost_setting import CostSetting
from mist.symbolic.host_bytes import hosted_terms
from mist.symbolic.level_cost import LevelCost
from mist.symbolic.optimizer_memory import step_bytes
from mist.symbolic.state_bytes import (
    bytes_by_zero,
    gathered_bytes,
    gradient_terms,
    state_bytes,
)


def block_memory_terms(name: str, cost: BlockCost, traced: Block) -> dict[str, Expr]:
    """Parameters and bytes of one block that do not depend on its memory level."""
    return {
        f"{name}_params": cost.params,
        f"{name}_trainable_params": cost.trainable_params,
        f"{name}_hosted_params": cost.hosted_params,
        f"{name}_buffer_bytes": sympy.Integer(traced.buffer_bytes),
        f"{name}_backward_params": cost.params * int(traced.goes_back),
        f"{name}_without_gradient": sympy.Integer(int(not traced.flows)),
        f"{name}_largest_params": cost.largest_params,
        f"{name}_input_bytes": cost.input_bytes,
        f"{name}_early_bytes": cost.early_bytes,
        f"{name}_awaited_bytes": cost.awaited_bytes,
        f"{name}_made_bytes": cost.made_bytes,
    }


def level_memory_terms(prefix: str, level: LevelCost, offloads: Runtime | None) -> dict[str, Expr]:
    """Bytes of a block at a level: on the device, in host memory, and on their way.

    `prefix`: block and level. `offloads`: None for the embedding and the head, whose activations
    stay on the device.
    """
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


def forward_terms(forward: Mapping[str, Expr]) -> dict[str, Expr]:
    """What the forward pass holds, of blocks that may hold more then than in their backward pass.

    `forward`: by block and level. Others have no such term.
    """
    return {f"{prefix}_forward_bytes": size for prefix, size in forward.items() if size != 0}


def _lone_copies(runtime: Runtime) -> dict[str, Expr]:
    """What a reduction copies on a rank whose gradients are not divided; whether it does."""
    copies = runtime.transients.lone_copies_bytes_per_param
    alone = sympy.Integer(int(copies is not None))
    alone = sympy.Piecewise((alone, sym.ZERO < 1), (alone, sym.SHARD < 2), (0, True))
    size = sympy.Float(0.0 if copies is None else copies.value)
    return {"copies_alone": alone, "lone_copies_bytes_per_param": alone * size}


def memory_terms(graph: ModelGraph, setting: CostSetting) -> dict[str, Expr]:
    """Terms that belong to no block: bytes per parameter by ZeRO level, tied and shared tensors."""
    runtime, numerics = setting.runtime, setting.numerics
    compute, reduced = numerics.compute, numerics.gradients
    tied = [param for param in graph.head.params if param.tied]
    return {
        "tied_params": rank_params(tied),
        "tied_trainable_params": rank_params(param for param in tied if param.trainable),
        "shared_bytes": sympy.Symbol("cost_shared_bytes", real=True),
        "state_bytes_per_param": state_bytes(setting),
        "frozen_bytes_per_param": state_bytes(setting, frozen=True),
        **hosted_terms(setting),
        "step_bytes_per_param": step_bytes(graph, runtime),
        "gathered_bytes_per_param": gathered_bytes(setting),
        "compute_bytes_per_param": sympy.Float(compute.num_bytes),
        "fp32_bytes_per_param": sympy.Float(reduced.num_bytes),
        **gradient_terms(setting),
        # ZeRO-3 gathers a copy in compute precision for each pass; below it the copy stays.
        "zero3_copy_bytes_per_param": bytes_by_zero(compute, at_least=3),
        "resident_copy_bytes_per_param": bytes_by_zero(compute, at_least=0, below=3),
        # What a group is gathered into: for each pass from ZeRO-3 on, once a step below it.
        "gathered_group_bytes_per_param": bytes_by_zero(compute, at_least=1),
        # From ZeRO-2 on every micro-batch reduces its gradients, through a buffer in fp32.
        "reduce_buffer_bytes_per_param": bytes_by_zero(reduced, at_least=2),
        "reduces": sym.zero_at_least(2),
        **_lone_copies(runtime),
    }
