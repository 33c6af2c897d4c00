"""What streams of FSDP keep apart: bytes that are reserved for them and serve nothing else.

torch's caching allocator keeps what a stream freed for that stream (c10/cuda/CUDACachingAllocator).
FSDP allocates on streams of its own (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py):

    reduce-scatter  the gradients that a reduction leaves (`gradient_pool`). `zero_grad` drops them,
                    and the next forward pass cannot have that memory
    all-gather      the flat buffer that a group is gathered into (`gather_pool`). It is copied to
                    the parameters, which are of the default stream. As large as the largest group

Of tensors that live the first are part of a step's second half only, and the second are not counted
at all, except for the layer that is gathered ahead (it is still on its way). So of what is reserved

    begin   + gradients behind the last backward pass, where they are not counted as live
    end     + the same below ZeRO-2, where whole gradients wait in the default stream's memory
    all     + largest group in compute precision - [ZeRO-3] the layer gathered ahead

Published peaks of both kinds (torchtitan, Llama-3-8B on 8 H100): 41.17 GiB active, 49.59 reserved;
here 40.98 live and 49.05 reserved. `tests/symbolic/test_stream_pools.py` has each byte.
"""

import sympy
from sympy import Expr

from mist.platform.runtime import Transients
from mist.symbolic import symbols as sym
from mist.symbolic.block_sums import StageBlocks, max_over, params_of, sum_over, term


def idle_bytes(
    blocks: StageBlocks, transients: Transients, pending_bytes: Expr
) -> tuple[Expr, Expr, Expr]:
    """Reserved bytes without a tensor as a backward pass begins, as it ends, and at any time.

    `pending_bytes`: gradients on the device that exist between micro-batches, but not yet as the
    fullest backward pass begins.
    """
    begin = end = whole = sympy.Integer(0)
    if transients.gradient_pool:
        reduced = _reduced_bytes(blocks)
        below = 1 - term("reduces")
        begin = term("reduces") * pending_bytes + below * reduced
        end = below * (1 - sym.LONE) * reduced
    if transients.gather_pool:
        group = sym.larger(params_of(blocks.ends), max_over(blocks.layers, "{x}_params"))
        ahead = term("zero3_copy_bytes_per_param") * max_over(blocks.layers, "{x}_backward_params")
        whole = term("gathered_group_bytes_per_param") * group - ahead
    return begin, end, whole


def _reduced_bytes(blocks: StageBlocks) -> Expr:
    """Gradients on the device behind the last backward pass of a step."""
    layers = sum_over(blocks.layers, "{x}_trainable_params")
    ends = params_of(blocks.every, "trainable_params") - layers
    on_device = layers * term("layer_last_grads_bytes_per_param")
    return on_device + ends * term("last_grads_bytes_per_param")
