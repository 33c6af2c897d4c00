"""What a step of the optimizer makes for a while, and what it streams from host memory.

A fused kernel makes nothing. torch's own AdamW makes the root of the second moments for all of a
rank's parameters at once, DeepSpeed for one flat partition at a time.
"""

from collections.abc import Iterable

import sympy
from sympy import Expr

from mist.model.graph import ModelGraph, Param
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import rank_params
from mist.symbolic.block_sums import StageBlocks, sum_over, term


def step_bytes(graph: ModelGraph, runtime: Runtime) -> Expr:
    """Bytes on the device; nothing of what the host's processor updates.

    Under ZeRO-3 those of a group of parameters at most. The share of a group is taken of the whole
    model, so that the bytes are in proportion to a stage's parameters.
    """
    made = sympy.Float(runtime.transients.optimizer_bytes_per_param.value) / sym.SHARD
    if runtime.offload is not None and runtime.offload.optimizer_on_host:
        made *= 1 - sym.OFFLOAD["optimizer"]
    group = runtime.transients.optimizer_group_params
    if group is None:
        return made
    share = sym.smaller(1, group.value * sym.SHARD / _model_params(graph))
    return made * sympy.Piecewise((share, sym.ZERO > 2), (1, True))


def _model_params(graph: ModelGraph) -> Expr:
    """Trained parameters of the whole model on a tensor-parallel rank, a tied one once."""

    def trained(params: Iterable[Param]) -> Expr:
        return rank_params(param for param in params if param.trainable)

    layers = (run.count * trained(graph.blocks[run.block].params) for run in graph.layers)
    tied = trained(param for param in graph.head.params if param.tied)
    return trained(graph.embed.params) + trained(graph.head.params) + sum(layers) - tied


def stream_bytes(blocks: StageBlocks) -> Expr:
    """What the optimizer has on its way between host and device, in bytes of one rank.

    Buckets of offloaded states, which large parameters go through in pieces. Never more than what
    is in host memory: taken of all layers of the model, not of the stage's, so that memory stays a
    straight line in the numbers of layers.
    """
    stream = term("stream_bytes_per_param") * term("bucket_params")
    layers = term("all_layers_params")
    of_layers = term("hosted_weights_bytes_per_param") + term("hosted_grads_bytes_per_param")
    every = layers + sum_over(blocks.ends, "{x}_trainable_params")
    return sym.smaller(stream, every * term("hosted_moments_bytes_per_param") + layers * of_layers)
