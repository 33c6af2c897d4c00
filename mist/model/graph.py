"""What a traced model is, without torch: blocks, operations and what they keep, as expressions.

Every size is an expression in three symbols: `B` micro-batch (samples per data-parallel rank),
`S` sequence length (tokens), `T` tensor-parallel degree. Bytes are bytes of the traced precision.
Transient bytes have more: `Q`, how many ways sequence parallelism divides what is replicated (T, or
1 without); `GATHERS`, 1 where it does and so gathers and scatters, else 0; `GATHER_COPY` and
`SCATTER_COPY`, 1 where it does that through a whole copy, else 0.
An expression holds where the block's `domain` holds. `trace` writes these types, `symbolic` reads
them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final, Literal

import sympy
from sympy import Expr

from mist.model.summary import ModelFacts, Traffic

# Positive integers, so that sympy simplifies Max, floor and Mod of them.
B, S, T, Q = sympy.symbols("b s t q", positive=True, integer=True)
GATHERS, GATHER_COPY, SCATTER_COPY = sympy.symbols(
    "gathers gather_copy scatter_copy", nonnegative=True, integer=True
)

Phase = Literal["forward", "backward"]


class OpKind(StrEnum):
    """Which law prices an operation."""

    GEMM = "gemm"
    ATTENTION = "attention"
    MEMORY = "memory"


NUM_DIMS: Final = {OpKind.GEMM: 4, OpKind.ATTENTION: 5, OpKind.MEMORY: 0}


class TensorLayout(StrEnum):
    """What a tensor-parallel rank holds of a tensor.

    SHARDED: 1/t, already in the expression. GATHERED: all of it, even under sequence parallelism
    (input of a column-parallel matrix, random state of a kernel). REPLICATED: all of it, or 1/t
    under sequence parallelism. PARTIAL: all of it, too, as a part of a sum over the ranks that is
    not taken yet: gradients of one input by several column-parallel matrices, which are added up.
    """

    SHARDED = "sharded"
    GATHERED = "gathered"
    REPLICATED = "replicated"
    PARTIAL = "partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One dispatched operation.

    `dims`: GEMM (batch, m, n, k); ATTENTION (batch, heads, seq_q, seq_k, head_dim); MEMORY ().
    `flop` counts a multiply-add as 2, attention without causal skipping (torch's convention).
    `shape` and `dtype` are those of the (first) result; each tensor is read and written once.
    """

    name: str
    kind: OpKind
    phase: Phase
    module: str
    dims: tuple[Expr, ...]
    causal: bool
    traffic: Traffic
    layout: TensorLayout
    flop: Expr
    shape: tuple[Expr, ...]
    dtype: str
    read_bytes: Expr
    written_bytes: Expr

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that are not those of its kind."""
        if len(self.dims) != NUM_DIMS[self.kind]:
            raise ValueError(f"{self.name} has {len(self.dims)} sizes, of {NUM_DIMS[self.kind]}")

    @property
    def traffic_bytes(self) -> Expr:
        """What is read plus what is written."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """One storage kept from forward to backward (parameters and buffers excluded)."""

    bytes: Expr
    shape: tuple[Expr, ...]
    dtype: str
    op: str
    module: str
    layout: TensorLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter of a block. `numel` is of the whole tensor; `sharded`: a rank holds numel / t.

    `num_reals`: the real numbers that it holds, twice `numel` where it is complex. `tied` marks a
    second use of a parameter that an earlier block already owns. Without `trainable` it has no
    gradient (`requires_grad=False`).
    """

    name: str
    numel: int
    num_reals: int
    sharded: bool
    tied: bool
    trainable: bool


CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallelCollective:
    """`count` collectives of a tensor-parallel group; `bytes` is the whole buffer of each."""

    kind: CollectiveKind
    phase: Phase
    bytes: Expr
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A distinct layer, the embedding, or the head with the loss.

    `buffer_bytes`: what every rank holds of it as it is, buffers and weights that are stored as
    codes. `saved` holds for b >= 2, `saved_single` for b = 1 (a size-1 dimension changes which
    copies are made). Where the backward pass is split, what waits for the gradients of parameters
    (`trace.recording.split_backward`) is `early`, saved by the last operation that reads a
    parameter and by those before it, and `awaited`, the gradients of the results of all that read
    one. `boundary_bytes`: the input activation, which is all that full checkpointing keeps;
    `keeps_input`: whether it is among what is saved anyway; `flows`: whether it has a gradient,
    which goes back through the block; `carried_bytes`: what else with a gradient comes from
    earlier layers (an encoder's result); `tp_bytes`: the activation that tensor-parallel ranks
    exchange.
    `transient_bytes`: live bytes beyond `saved` in the backward pass, at each instant that is the
    worst for some (b, s, t); the peak is their maximum. `transient_with_grads_bytes`: the same with
    the gradients of parameters that were made so far; `transient_adding_bytes`: with those of the
    node that runs, the others being added to what is held of them; `made_bytes`: of
    `transient_bytes` what the backward pass
    made, without these gradients. Of a block without a backward pass these are of its forward pass,
    input included. `forward_bytes`: live bytes beyond `saved` in the forward pass, input included,
    at the instants where they may be above all `transient_bytes`. `num_entries`, `num_exits`: how
    often the
    activation enters and leaves what tensor parallelism divides (2 and 2 in a transformer layer);
    `num_entries_back`, `num_exits_back`: those of them that a gradient goes back through;
    `other_entries_back`: bytes of those that are of another size than the activation;
    `norm_sums`: bytes of each sum over the ranks within norms over what they divide;
    `norm_sums_back`: of those that gradients need;
    `num_whole`: what needs all tokens but divides nothing. `num_recomputed_ops`: how many of the
    forward operations (they come first in `ops`) checkpointing runs again: up to the last one that
    saves something, where torch stops early. `domain`: relations under which all this holds.
    """

    name: str
    params: tuple[Param, ...]
    buffer_bytes: int
    ops: tuple[Op, ...]
    saved: tuple[SavedTensor, ...]
    saved_single: tuple[SavedTensor, ...]
    early: tuple[SavedTensor, ...]
    awaited: tuple[SavedTensor, ...]
    keeps_input: bool
    boundary_bytes: Expr
    carried_bytes: Expr
    flows: bool
    tp_bytes: Expr
    transient_bytes: tuple[Expr, ...]
    transient_with_grads_bytes: tuple[Expr, ...]
    transient_adding_bytes: tuple[Expr, ...]
    made_bytes: tuple[Expr, ...]
    forward_bytes: tuple[Expr, ...]
    num_entries: int
    num_exits: int
    num_entries_back: int
    num_exits_back: int
    other_entries_back: tuple[Expr, ...]
    norm_sums: tuple[Expr, ...]
    norm_sums_back: tuple[Expr, ...]
    num_whole: int
    num_recomputed_ops: int
    domain: tuple[sympy.Basic, ...]

    @property
    def num_params(self) -> int:
        """Parameters that this block owns (a tied second use counts where it is owned)."""
        # A tied parameter is stored once.
        return sum(param.numel for param in self.params if not param.tied)

    @property
    def is_frozen(self) -> bool:
        """Whether it has parameters but none that is trained."""
        return bool(self.params) and not any(param.trainable for param in self.params)

    @property
    def goes_back(self) -> bool:
        """Whether it has a backward pass: something in it or before it is trained."""
        # A frozen block that gradients pass through has a backward pass, too; of one that only
        # shows its input in another shape nothing is seen.
        return not self.ops or any(op.phase == "backward" for op in self.ops)

    def collectives(self, *, sequence_parallel: bool) -> tuple[TensorParallelCollective, ...]:
        """What t ranks exchange in one pass each way (Korthikanti et al. 2022, figures 4 and 5).

        Backward, an exit does what an entry does forward, and the other way round, where there is
        a gradient. What needs all tokens but divides nothing is gathered; each rank keeps its own
        part of the result.
        """
        # A gather in the forward pass is a scatter in the backward pass, and the other way round.
        into, out, whole = self.num_entries, self.num_exits, self.num_whole
        into_back, out_back = self.num_entries_back, self.num_exits_back
        if sequence_parallel:
            rows: tuple[tuple[CollectiveKind, Phase, int], ...] = (
                ("all_gather", "forward", into + whole),
                ("reduce_scatter", "forward", out),
                ("all_gather", "backward", out_back + whole * self.goes_back),
                ("reduce_scatter", "backward", into_back),
            )
        else:
            into_back -= len(self.other_entries_back)
            rows = (("all_reduce", "forward", out), ("all_reduce", "backward", into_back))
        found = tuple(
            TensorParallelCollective(kind=kind, phase=phase, bytes=self.tp_bytes, count=count)
            for kind, phase, count in rows
            if count
        )
        others = () if sequence_parallel else self.other_entries_back
        back = _sums("backward", (*others, *self.norm_sums_back))
        return (*found, *_sums("forward", self.norm_sums), *back)

    def flop(self, phase: Phase) -> Expr:
        """Matrix and attention FLOPs of one pass, per tensor-parallel rank."""
        return sympy.Add(*(op.flop for op in self.ops if op.phase == phase))


def _sums(phase: Phase, sizes: Iterable[Expr]) -> Iterator[TensorParallelCollective]:
    """Sums over the ranks of buffers of these sizes."""
    for size, count in Counter(sizes).items():
        yield TensorParallelCollective(kind="all_reduce", phase=phase, bytes=size, count=count)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGraph(ModelFacts):
    """A traced model: its facts, its distinct blocks, and the two ends.

    `shared`: what layers save but do not own (rotary tables, masks), once for all of them; every
    pipeline stage keeps it. `shared_single`: the same for b = 1.
    """

    blocks: tuple[Block, ...]
    embed: Block
    head: Block
    shared: tuple[SavedTensor, ...]
    shared_single: tuple[SavedTensor, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for counts that no model has."""
        ModelFacts.__post_init__(self)
        if len(self.blocks) != self.num_kinds:
            raise ValueError(f"{len(self.blocks)} blocks, of {self.num_kinds}")

    @property
    def facts(self) -> ModelFacts:
        """The facts alone."""
        return ModelFacts(**{item.name: getattr(self, item.name) for item in fields(ModelFacts)})
