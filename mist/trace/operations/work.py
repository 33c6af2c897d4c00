"""What one call computes, in the terms of the laws that price it."""

from dataclasses import dataclass

from mist.model.graph import OpKind
from mist.trace.expressions import Size


@dataclass(frozen=True, slots=True)
class Work:
    """What one call computes: dims as in `graph.Op`, and FLOPs: `flop` * log2(`log2_of`).

    A product of `groups` experts has `dims` as if they were one; dimension `split` is divided among
    them evenly.
    """

    kind: OpKind
    dims: tuple[Size, ...]
    flop: Size
    log2_of: Size = 2
    groups: int = 1
    split: int = 1


def gemm(batch: Size, m: Size, n: Size, k: Size) -> Work:
    """A product [m, k] by [k, n] for each of a batch; a multiply-add counts 2."""
    return Work(OpKind.GEMM, (batch, m, n, k), 2 * batch * m * n * k)
