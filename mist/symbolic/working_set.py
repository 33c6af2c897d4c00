"""What blocks of a stage make as they run, on top of all that is kept (`stage_memory`).

A layer runs forward before those behind it keep anything, and backward when these are gone. So on
top of all that layers keep count less, where another kind of layer or another level lies behind.
"""

from collections.abc import Sequence

import sympy
from sympy import Expr

from mist.plans.numerics import Numerics
from mist.symbolic import symbols as sym
from mist.symbolic.block_sums import Row, StageBlocks, max_over, term


def layers_working_set(blocks: StageBlocks, numerics: Numerics) -> Expr:
    """The most that a layer makes as it runs, counted on top of all that layers keep.

    max over the levels that the stage has of ( working set - what was freed before )
    """
    return working_set(blocks.layers, numerics, freed(blocks, blocks.layers))


def working_set(rows: Sequence[Row], numerics: Numerics, gone: Sequence[Expr] = ()) -> Expr:
    """The most that the backward pass of a block makes, gradients of parameters included.

    Where autograd adds them in place to those of the micro-batch before, only those just made.
    `gone`: what is taken off for each row.
    """
    fresh = fresh_gradients(numerics)
    running = max_over(rows, "{x}_{level}_running_bytes", less=gone)
    if fresh == 1:
        return running
    return fresh * running + (1 - fresh) * max_over(rows, "{x}_{level}_adding_bytes", less=gone)


def freed(blocks: StageBlocks, rows: Sequence[Row]) -> list[Expr]:
    """What is gone of all that layers keep, as the first layer of each of these rows runs backward.

    Of its kind those at the levels before it in the table are gone, and all layers of the kinds
    behind it: at least one of these that the stage has, less the gradients that another kind leaves
    and less what one of this row keeps, for it goes next. The least that was freed, so that
    instants stay linear in the numbers of layers. Nothing is sure of several chunks: one that has
    no such layer may run while another one keeps some.
    """
    return [(1 - sym.SEVERAL_CHUNKS) * _kept_more(blocks, row) for row in rows]


def _kept_more(blocks: StageBlocks, row: Row) -> Expr:
    """How much more one of the layers that are gone kept than one of this row, at least 0."""
    kind, level, _ = row
    before = blocks.layers[: blocks.layers.index(row)]
    own, left = term(f"{kind}_{level}_kept_bytes"), first_gradients("layer_")
    same = [(other, term(f"{kind}_{other[1]}_kept_bytes")) for other in before if other[0] == kind]
    others = [
        (
            other,
            term(f"{other[0]}_{other[1]}_kept_bytes") - left * term(f"{other[0]}_trainable_params"),
        )
        for other in blocks.layers
        if other[0] in blocks.behind[kind]
    ]
    more = (sym.smaller(1, other[2]) * (kept - own) for other, kept in (*same, *others))
    return sym.larger(0, *more)


def first_gradients(prefix: str) -> Expr:
    """Bytes per parameter of the gradients that the first backward pass adds to the states.

    If it is also the last one it reduces them. Nothing but with F: the states have them already.
    """
    lone, others = (term(f"{prefix}{name}_bytes_per_param") for name in ("last_grads", "grads"))
    return sym.FORWARD_FIRST * (sym.LONE * lone + (1 - sym.LONE) * others)


def fresh_gradients(numerics: Numerics) -> Expr:
    """1 where gradients of a micro-batch are tensors apart from those of the one before.

    In fp32 autograd adds to `.grad` in place, unless a reduction took it, or there is none yet. In
    lower precision FSDP2 keeps the sum as an fp32 tensor (`unsharded_accumulated_grad`).
    """
    if numerics.compute is not numerics.gradients:
        return sympy.Integer(1)
    return sym.larger(term("reduces"), sym.FORWARD_FIRST)


def forward_pass(blocks: StageBlocks) -> Expr:
    """In the last forward pass before a backward pass, of the blocks that may be the peak there.

    max( a layer that runs forward - what the head will keep; the end of the model )

    A layer runs before those behind it keep anything, as in its backward pass.
    """
    name = "{x}_{level}_forward_bytes"
    most = [sympy.S.Zero]
    if layers := [row for row in blocks.layers if row in blocks.forward]:
        head_kept = sym.LAST * term("head_none_kept_bytes")
        most.append(max_over(layers, name, less=freed(blocks, layers)) - head_kept)
    if ends := [row for row in blocks.ends if row in blocks.forward]:
        most.append(max_over(ends, name))
    return sym.larger(*most)
