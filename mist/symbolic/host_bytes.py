"""Bytes in host memory, by block: offloaded states, on their way in a step, parameters as drawn.

See `mist.plans.host_memory`.
"""

from collections.abc import Sequence

import sympy
from sympy import Expr

from mist.model.graph import ModelGraph, Param
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import CostSetting, rank_numbers
from mist.symbolic.overlap import hosted_by_tensor, hosted_bytes
from mist.symbolic.state_bytes import bucket_params, frozen_weight_ratio

_NONE, _ONE = sympy.Integer(0), sympy.Integer(1)


def hosted_terms(runtime: Runtime) -> dict[str, Expr]:
    """Bytes per parameter in host memory, by state; and on their way in a step.

    Weights and gradients are those of layers, moments those of all blocks.

    The optimizer streams a few parameters at a time, when no activation is left; those of the
    embedding and the head, large and taken whole, where all moments are in host memory.
    """
    weights, grads, every = _NONE, _NONE, _NONE
    streamed, of_ends = sympy.Integer(0), sympy.Integer(0)
    for name in ("weights", "grads", "optimizer"):
        held, ratio = hosted_bytes(runtime, name, _ONE), sym.OFFLOAD[name]
        if name == "optimizer":
            every, of_ends = ratio * held, sympy.floor(ratio) * held
        elif name == "grads":
            grads = ratio * held
        else:
            weights = ratio * held
        streamed += sympy.ceiling(ratio) * held
    staged = 0.0
    if runtime.offload is not None and not runtime.offload.optimizer_on_host:
        staged = runtime.offload.num_staged_layers.value
    return {
        "hosted_weights_bytes_per_param": weights,
        "hosted_grads_bytes_per_param": grads,
        "hosted_bytes_per_param": every,
        "streamed_bytes_per_param": staged * streamed,
        "streamed_end_bytes_per_param": staged * of_ends,
        "bucket_params": bucket_params(runtime),
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
        held = (sym.OFFLOAD[name] * _held(setting, name, params) for name in states)
        terms[f"{x}_allocated_bytes"] = sympy.Add(*held)
    return terms


def _held(setting: CostSetting, state: str, params: Sequence[Param]) -> Expr:
    trained = hosted_by_tensor(setting.runtime, state, [p for p in params if p.trainable])
    if state != "weights":
        return trained
    frozen = hosted_by_tensor(setting.runtime, state, [p for p in params if not p.trainable])
    return trained + frozen_weight_ratio(setting.runtime, setting.precision) * frozen


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
