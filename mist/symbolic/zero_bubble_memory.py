"""Memory of a stage whose backward pass is split (torch/distributed/pipelining/_backward.py).

A backward pass of a chunk of layers has two parts: I, gradients of activations, and W, gradients of
weights, which may run later and fill a bubble of the pipeline (zero bubble, Qi et al. 2024).

    time            F ......... I ......... W ......... I of the next micro-batch
    autograd saved  ############################.       W frees inputs of products until it ends
    loss            ############.                       let go as I begins
    awaited         ............<###############.       gradients of results of what reads a weight
    W's gradients   ............................<####>. compute precision; as the next I leaves a
                                                        layer, FSDP2 adds them to the fp32 ones

(# lives, < grows, > shrinks). The first chunk of the first stage has no I: nothing
before it needs the gradient of its input, so all of its backward pass runs as W.
"""

import sympy
from sympy import Expr

from mist.symbolic import symbols as sym
from mist.symbolic.block_sums import StageBlocks, max_over, sum_over, term
from mist.symbolic.optimizer_memory import stream_bytes

# 1 where a chunk of the stage has a split backward pass: all, but for the first of the model.
SPLIT = sym.SPLITS * (1 - sym.FIRST * (1 - sym.SEVERAL_CHUNKS))
# How many of its chunks have one.
SPLIT_RATIO = sym.SPLITS * (sym.CHUNKS - sym.FIRST) / sym.CHUNKS


def split_or_whole(split: Expr, whole: Expr) -> Expr:
    """`split` where the backward pass of the stage is split, else `whole`."""
    return sympy.Add((1 - SPLIT) * whole, SPLIT * split)


def input_gradients_begin(blocks: StageBlocks, whole_begin: Expr) -> Expr:
    """Bytes as I begins: its working set, and the gradients that the W before it made.

    `whole_begin`: the same where the backward pass is whole, as in the first chunk of the model.
    """
    loss = sym.LAST * term("head_made_bytes")
    # The head has run: its gradients of results wait for W while the last layer runs.
    layer = max_over(blocks.layers, "{x}_made_bytes") + sym.LAST * term("head_awaited_bytes")
    working = sym.larger(sym.FIRST * whole_begin, loss, layer)
    gradients = sym.LAST * term("head_trainable_params")
    gradients += SPLIT_RATIO * sum_over(blocks.layers, "{x}_trainable_params")
    return working + term("compute_bytes_per_param") * gradients


def input_gradients_end(blocks: StageBlocks) -> Expr:
    """Bytes as I ends in the first layer of a chunk, then in W.

    FSDP2 added the gradients of this chunk to the fp32 ones as I left each layer; it has not left
    the first one yet. Gradients of other chunks wait, and so do those of the head, which the root
    adds behind all layers. The first backward pass of a step meets none of these.
    """
    compute = term("compute_bytes_per_param")
    working = sym.larger(
        max_over(blocks.layers, "{x}_made_bytes"),  # I
        compute * max_over(blocks.layers, "{x}_largest_params"),  # W makes one gradient at a time
        stream_bytes(blocks),
    )
    awaited = sum_over(blocks.layers, "{x}_awaited_bytes") / sym.CHUNKS
    awaited += sym.LAST * term("head_awaited_bytes")
    layer = max_over(blocks.layers, "{x}_trainable_params")
    other_chunks = (SPLIT_RATIO - 1 / sym.CHUNKS) * sum_over(blocks.layers, "{x}_trainable_params")
    gradients = sym.LAST * term("head_trainable_params") + layer + sym.larger(0, other_chunks)
    return working + awaited + (1 - sym.FORWARD_FIRST) * compute * gradients
