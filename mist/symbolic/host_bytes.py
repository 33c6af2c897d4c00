"""Bytes in host memory, by block: offloaded states, on their way in a step, parameters as drawn.

See `mist.plans.host_memory`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import sympy
from sympy import Expr

from mist.model.graph import ModelGraph, Param
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import rank_numbers
from mist.symbolic.block_sums import StageBlocks, params_of, sum_over, term
from mist.symbolic.cost_setting import CostSetting
from mist.symbolic.state_bytes import (
    bucket_params,
    frozen_weight_ratio,
    hosted_bytes,
    hosted_bytes_per_param,
)

_NONE, _ONE = sympy.Integer(0), sympy.Integer(1)


def hosted_by_tensor(setting: CostSetting, state: str, params: Iterable[Param]) -> Expr:
    """Bytes of one state of these parameters in host memory, as its tensors are allocated there.

    Each is of fp32: a state of 8 bytes per parameter is two tensors of each. Moments, which stay
    there for good, are pinned as they are, and not by torch's allocator.
    """
    copies = hosted_bytes_per_param(setting, state) / setting.numerics.parameters.num_bytes
    if not copies:
        return _NONE
    total = _NONE
    for numbers, count in Counter(map(rank_numbers, params)).items():
        each = hosted_bytes(setting, state, numbers) / copies
        size = each if state == "optimizer" else allocated_bytes(setting.runtime, each)
        total += count * copies * size
    return total


def allocated_bytes(runtime: Runtime, num_bytes: Expr) -> Expr:
    """What a tensor in host memory takes there."""
    offload = runtime.offload
    return sym.PINNED(num_bytes) if offload and offload.pins_each_tensor else num_bytes


def hosted_terms(setting: CostSetting) -> dict[str, Expr]:
    """Bytes per parameter in host memory, by state; and on their way in a step.

    Weights and gradients are those of layers, moments those of all blocks.

    The optimizer streams a few parameters at a time, when no activation is left.
    """
    names, offload = ("weights", "grads", "optimizer"), setting.runtime.offload
    whole = {name: hosted_bytes(setting, name, _ONE) for name in names}
    # Anything offloaded of a state makes its stream as wide as if all of it were.
    stream = sympy.Add(*(sympy.ceiling(sym.OFFLOAD[name]) * size for name, size in whole.items()))
    num_buffers = 0.0
    if offload is not None and not offload.optimizer_on_host:
        num_buffers = offload.num_staged_layers.value
    return {
        "hosted_weights_bytes_per_param": sym.OFFLOAD["weights"] * whole["weights"],
        "hosted_grads_bytes_per_param": sym.OFFLOAD["grads"] * whole["grads"],
        "hosted_moments_bytes_per_param": sym.OFFLOAD["optimizer"] * whole["optimizer"],
        "stream_bytes_per_param": num_buffers * stream,
        "bucket_params": bucket_params(setting),
    }


def allocated_terms(graph: ModelGraph, setting: CostSetting) -> dict[str, Expr]:
    """Bytes of the offloaded states of each block in host memory, tensor by tensor.

    Of the ends only the optimizer's states go there. A tied parameter has them once. What is not
    trained has no gradients and no moments.
    """
    layers = {str(kind): block.params for kind, block in enumerate(graph.blocks)}
    blocks = layers | {"embed": graph.embed.params, "head": graph.head.params}
    blocks |= {"tied": tuple(param for param in graph.head.params if param.tied)}
    terms = {}
    for x, params in blocks.items():
        states = ("weights", "grads", "optimizer") if x in layers else ("optimizer",)
        each = (sym.OFFLOAD[name] * _state_by_tensor(setting, name, params) for name in states)
        terms[f"{x}_allocated_bytes"] = sympy.Add(*each)
    return terms


def _state_by_tensor(setting: CostSetting, state: str, params: Sequence[Param]) -> Expr:
    """Bytes of a state in host memory; a frozen parameter has weights only."""
    trained = hosted_by_tensor(setting, state, [p for p in params if p.trainable])
    if state != "weights":
        return trained
    frozen = hosted_by_tensor(setting, state, [p for p in params if not p.trainable])
    return trained + frozen_weight_ratio(setting) * frozen


def drawn_terms(graph: ModelGraph, runtime: Runtime) -> dict[str, Expr]:
    """Bytes of what a rank draws at a time: its part of the largest parameter of each block."""
    ends = {"embed": graph.embed, "head": graph.head}
    blocks = ends | {str(kind): block for kind, block in enumerate(graph.blocks)}
    each = runtime.loading.part_bytes_per_param.value if runtime.loading else 0.0
    return {
        f"{x}_drawn_bytes": each
        * sym.larger(0, *dict.fromkeys(map(rank_numbers, block.params)))
        / sym.SHARD
        for x, block in blocks.items()
    }


def offloaded_bytes(blocks: StageBlocks) -> Expr:
    """States that leave the device: weights and gradients of layers, moments of all blocks."""
    return (
        sum_over(blocks.layers, "{x}_hosted_params") * term("hosted_weights_bytes_per_param")
        + sum_over(blocks.layers, "{x}_trainable_params") * term("hosted_grads_bytes_per_param")
        + params_of(blocks.every, "trainable_params") * term("hosted_moments_bytes_per_param")
    )


def stage_host_bytes(blocks: StageBlocks, runtime: Runtime) -> Expr:
    """What one rank of a stage keeps in host memory, as it is allocated there."""
    overhead = runtime.offload.host_overhead_ratio if runtime.offload else None
    states = sum_over(blocks.every, "{x}_allocated_bytes")
    # A stage that is both ends has a tied matrix once, but both of its blocks count it.
    states -= sym.FIRST * sym.LAST * term("tied_allocated_bytes")
    states *= 1 + overhead.value if overhead else 1
    return states + (sym.IN_FLIGHT + sym.LAYERS_MORE) * sum_over(
        blocks.every, "{x}_{level}_host_bytes"
    )
