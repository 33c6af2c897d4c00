"""The symbols of the stage formulas, and the platform's functions; b, s, t: `mist.model.graph`.

Strategy columns say how a stage is trained; layout columns say which stage it is.
Functions are opaque to sympy: each is one of the platform's laws (or tables), bound at compile.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Final

import sympy

from mist.model.summary import Traffic
from mist.symbolic import program

SHARD = sympy.Symbol("dp_shard", positive=True, integer=True)
"""Data-parallel ranks that share one copy of the states: 1 at ZeRO-0."""
SHARD_PER_NODE = sympy.Symbol("dp_shard_per_node", positive=True, integer=True)
"""How many of them share a node."""
COPIES = sympy.Symbol("copies", positive=True, integer=True)
"""Copies of the states over which gradients are summed: every data-parallel rank at ZeRO-0."""
COPIES_PER_NODE = sympy.Symbol("copies_per_node", positive=True, integer=True)
"""How many ranks with the same part of the states share a node."""
TP_PER_NODE = sympy.Symbol("tp_per_node", positive=True, integer=True)
"""Members of one tensor-parallel group that share a node."""
PIPELINED = sympy.Symbol("pipelined", nonnegative=True, integer=True)
"""1 when there are several stages on several nodes."""
ZERO = sympy.Symbol("zero", nonnegative=True, integer=True)
"""ZeRO level, 0 to 3."""
HEAD = sympy.Symbol("head", nonnegative=True, integer=True)
"""How the last matrix and the loss run: the number of a `HeadMode`."""
OFFLOAD: Final = {
    name: sympy.Symbol(f"offload_{name}", nonnegative=True)
    for name in ("weights", "grads", "optimizer", "activations")
}
"""Share of each state that lives in host memory, 0 to 1."""
IN_FLIGHT = sympy.Symbol("in_flight", positive=True, integer=True)
"""Micro-batches whose layers' activations the stage holds at once, by
`mist.plans.schedules.held`."""
LAYERS_MORE = sympy.Symbol("layers_more", nonnegative=True)
"""Micro-batches in flight in an average layer beyond `IN_FLIGHT`: of unequal chunks."""
EMBED_MORE = sympy.Symbol("embed_more", real=True)
"""Micro-batches in flight in the embedding beyond `IN_FLIGHT`: chunks of a rank are not alike."""
HEAD_HELD = sympy.Symbol("head_held", positive=True, integer=True)
"""Micro-batches whose logits the last stage holds at once."""
SPLITS = sympy.Symbol("splits", nonnegative=True, integer=True)
"""1 where gradients of weights are computed later than those of activations (zero bubble)."""
ONE_ROUND = sympy.Symbol("one_round", nonnegative=True, integer=True)
"""1 where several chunks run one round: when a stage holds most, only one of them went backward."""
WAITING = sympy.Symbol("waiting", nonnegative=True)
"""Micro-batches that wait for their gradients of weights as another one begins backward."""
CHUNKS = sympy.Symbol("chunks", positive=True, integer=True)
"""v, runs of layers that a stage takes in turn."""
NUM_MICRO_BATCHES = sympy.Symbol("num_micro_batches", positive=True, integer=True)
"""G, micro-batches per step."""
FORWARD_FIRST = sympy.Symbol("forward_first", nonnegative=True, integer=True)
"""1 where all forward passes of a step run before its first backward pass."""
SPANS_NODES = sympy.Symbol("spans_nodes", nonnegative=True, integer=True)
"""1 when the job has more than one node."""
FIRST = sympy.Symbol("is_first", nonnegative=True, integer=True)
LAST = sympy.Symbol("is_last", nonnegative=True, integer=True)
PREV_CROSSES = sympy.Symbol("prev_crosses_node", nonnegative=True, integer=True)
NEXT_CROSSES = sympy.Symbol("next_crosses_node", nonnegative=True, integer=True)

GEMM = sympy.Function("gemm_s")
ATTENTION_FORWARD = sympy.Function("attention_forward_s")
ATTENTION_BACKWARD = sympy.Function("attention_backward_s")
ALL_GATHER = sympy.Function("all_gather_s")
REDUCE_SCATTER = sympy.Function("reduce_scatter_s")
ALL_REDUCE = sympy.Function("all_reduce_s")
P2P = sympy.Function("p2p_s")
TO_DEVICE = sympy.Function("to_device_s")
TO_HOST = sympy.Function("to_host_s")
PINNED = sympy.Function("pinned_bytes")
"""Host bytes of a tensor, which is pinned where the device is a GPU."""
TOGETHER = sympy.Function("together_s")
MEMORY: Final = {traffic: sympy.Function(f"memory_{traffic}_s") for traffic in Traffic}
FIGURES: Final = {
    path: sympy.Function(program.figure_name(path), positive=True)() for path in program.FIGURES
}
"""Figures of the runtime, by path: laws of no arguments."""

_MAXIMUM = sympy.Function("maximum")
_MINIMUM = sympy.Function("minimum")


def larger(*values: sympy.Expr | float) -> sympy.Expr:
    """The largest value. Not sympy's Max, which takes seconds trying to order its arguments."""
    return reduce(_MAXIMUM, values)


def smaller(*values: sympy.Expr | float) -> sympy.Expr:
    """The smallest value."""
    return reduce(_MINIMUM, values)


def by_zero(values: Mapping[int, float | sympy.Expr]) -> sympy.Expr:
    """A value that depends on the ZeRO level; the highest level given also stands for any other."""
    *lower, top = sorted(values)
    exprs = {
        level: value if isinstance(value, sympy.Expr) else sympy.Float(value)
        for level, value in values.items()
    }
    rows = [(exprs[level], sympy.Eq(ZERO, level)) for level in lower]
    return sympy.Piecewise(*rows, (exprs[top], True))


def by_head(values: Sequence[sympy.Expr]) -> sympy.Expr:
    """A value that depends on how the head runs; of each `HeadMode` in order."""
    if len(set(values)) == 1:
        return values[0]
    rows = [(value, sympy.Eq(HEAD, number)) for number, value in enumerate(values)]
    return sympy.Piecewise(*rows[:-1], (values[-1], True))


def zero_at_least(level: int) -> sympy.Expr:
    """1 from this ZeRO level on, else 0."""
    return sympy.Piecewise((1, ZERO >= level), (0, True))


def layer_count(level: str, kind: int) -> sympy.Symbol:
    """Layers of block `kind` in the stage at a memory level."""
    return sympy.Symbol(f"{level}_{kind}", nonnegative=True, integer=True)


SEVERAL_CHUNKS = smaller(1, CHUNKS - 1)
"""1 where a rank has several chunks, else 0."""
LONE = 1 - smaller(1, NUM_MICRO_BATCHES - 1)
"""1 where a step has one micro-batch (G = 1), else 0."""
