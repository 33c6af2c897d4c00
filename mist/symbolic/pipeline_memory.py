"""What the schedule of a pipeline adds to the memory of a stage, beside activations in flight.

A split backward pass (torch/distributed/pipelining/_backward.py), of a chunk of layers:

    F -> I: all that autograd saved
    I -> W: the same but for the loss, and the gradient of each result of what reads a parameter
    W -> next I: gradients of parameters in compute precision, which FSDP2 adds to the fp32 ones
                 layer by layer as the next backward pass leaves the layer

The first chunk of the first stage has no I: all of its backward pass runs as W.
"""

from dataclasses import dataclass

import sympy
from sympy import Expr

from mist.symbolic import symbols as sym

SEVERAL = sym.smaller(1, sym.CHUNKS - 1)  # 1 where a rank has several chunks
SPLIT = sym.SPLITS * (1 - sym.FIRST * (1 - SEVERAL))  # 1 where a chunk of the stage is split
SPLIT_RATIO = sym.SPLITS * (sym.CHUNKS - sym.FIRST) / sym.CHUNKS  # how many of its chunks are

# Share of the gradients of a stage that are not there yet when it holds most: all of them, or those
# of the chunks but the first that goes backward.
UNMADE_RATIO = sym.FORWARD_FIRST + (1 - sym.FORWARD_FIRST) * sym.ONE_ROUND * (1 - 1 / sym.CHUNKS)


def kept_outputs() -> tuple[Expr, Expr]:
    """Activations at the borders of chunks that torch's stages hold, and inputs of layers of these.

    Both live as long as what their micro-batch saved (`fwd_cache`). Beside them: a gradient that is
    received, on the last of several chunks two; with several chunks or a split backward pass an
    input ahead; and for each chunk the gradient that was sent last.
    """
    chunks = sym.CHUNKS * sym.IN_FLIGHT
    outputs = chunks - sym.LAST * (sym.HEAD_HELD + sym.CHUNKS * sym.WAITING)
    inputs = chunks - sym.FIRST * (sym.IN_FLIGHT + sym.EMBED_MORE)
    gradients = 1 - sym.LAST + 2 * SEVERAL * sym.LAST
    ahead = sym.larger(SEVERAL, sym.SPLITS * (1 - sym.FIRST))
    sent = (1 - sym.FORWARD_FIRST) * (sym.CHUNKS - sym.FIRST)
    return outputs + gradients + ahead + sent, inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitBackward:
    """Bytes of a stage whose backward pass is split, or part of it.

    `loss`, `layer`: what I makes in the loss and in the worst layer; `awaited`: gradients of
    results that a micro-batch leaves in all layers, `head_awaited` in the head; `largest`: the
    largest parameter of a layer. In compute precision, the gradients of all `layers`, of one
    (`one`) and of the `head`. `other`: what a stage with a whole backward pass holds as it begins;
    `streamed`: by the optimizer.
    """

    loss: Expr
    layer: Expr
    awaited: Expr
    head_awaited: Expr
    largest: Expr
    layers: Expr
    one: Expr
    head: Expr
    other: Expr
    streamed: Expr

    def begin(self) -> Expr:
        """As I begins, beside gradients of the W before; if there is none, as the first W ends.

        Of what was saved W frees the inputs of products only, until it ends.
        """
        made = sym.larger(sym.FIRST * self.other, self.loss, self.layer + self.head_awaited)
        return made + self.head + SPLIT_RATIO * self.layers

    def end(self) -> Expr:
        """As I ends, in the first layer of a chunk, then in W.

        The gradients of the head's parameters wait until the last layer has run.
        """
        made = sym.larger(self.layer, self.largest, self.streamed)
        others = (SPLIT_RATIO - 1 / sym.CHUNKS) * self.layers
        left = self.head + self.one + sym.larger(0, others)
        left *= 1 - sym.FORWARD_FIRST
        return made + self.awaited / sym.CHUNKS + self.head_awaited + left


def last(begin: Expr, *, chunks: Expr, reduced: Expr) -> Expr:
    """As the last layer of a step runs backward, or gradients are reduced: all of them are made.

    So it is of several `chunks`, and of a split backward pass behind all forward passes, whose
    gradients are `reduced` apart; of others nothing is to be said that `begin` does not say.
    """
    split = sym.SPLITS * sym.FORWARD_FIRST * (1 - SEVERAL)
    return sympy.Add(SEVERAL * chunks, split * reduced, (1 - SEVERAL - split) * begin)


def either(whole: Expr, split: Expr) -> Expr:
    """What holds of a stage with a whole backward pass, or of one where it is split."""
    return sympy.Add((1 - SPLIT) * whole, SPLIT * split)
