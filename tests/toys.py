"""Small models and platforms made by hand: the rooms after trace are tested without torch."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray

from mist.model.graph import (
    GATHER_COPY,
    GATHERS,
    SCATTER_COPY,
    B,
    Block,
    ModelGraph,
    Op,
    OpKind,
    Param,
    Phase,
    Q,
    S,
    SavedTensor,
    T,
    TensorLayout,
)
from mist.model.summary import LayerRun, TpLimit, Traffic
from mist.plans.numerics import NUMERICS
from mist.plans.workload import (
    Attention,
    HeadMode,
    MemoryLevel,
    Optimizer,
    Precision,
    Workload,
)
from mist.platform import Platform, Runtime, load_platform
from mist.platform.profiles import load_cluster, load_device, load_runtime
from mist.symbolic.compile import compile_model
from mist.symbolic.cost_setting import CostSetting
from mist.symbolic.job import Job, make_job
from mist.symbolic.program import ModelPrograms

ELEMENT_BYTES = 2


def gemm(phase: Phase, rows: sympy.Expr, columns: sympy.Expr, inner: sympy.Expr) -> Op:
    """A matrix product of the toy."""
    return Op(
        name="aten.mm.default",
        kind=OpKind.GEMM,
        phase=phase,
        module="mlp",
        dims=(sympy.Integer(1), rows, columns, inner),
        causal=False,
        traffic=Traffic.POINTWISE,
        layout=TensorLayout.SHARDED,
        flop=2 * rows * columns * inner,
        shape=(rows, columns),
        dtype="bfloat16",
        read_bytes=ELEMENT_BYTES * (columns * inner + rows * inner),
        written_bytes=ELEMENT_BYTES * rows * columns,
    )


def pointwise(phase: Phase, traffic_bytes: sympy.Expr) -> Op:
    """A memory-bound operation of the toy that every tensor-parallel rank does whole."""
    return Op(
        name="aten.add.Tensor",
        kind=OpKind.MEMORY,
        phase=phase,
        module="norm",
        dims=(),
        causal=False,
        traffic=Traffic.POINTWISE,
        layout=TensorLayout.REPLICATED,
        flop=sympy.Integer(0),
        shape=(),
        dtype="bfloat16",
        read_bytes=traffic_bytes / 2,
        written_bytes=traffic_bytes / 2,
    )


def kept(layout: TensorLayout, num_bytes: sympy.Expr) -> SavedTensor:
    """A saved tensor of the toy."""
    return SavedTensor(
        bytes=num_bytes, shape=(), dtype="bfloat16", op="linear", module="mlp", layout=layout
    )


def param(name: str, numel: int, *, sharded: bool, tied: bool = False) -> Param:
    return Param(
        name=name, numel=numel, num_reals=numel, sharded=sharded, tied=tied, trainable=True
    )


def mlp_block(name: str, hidden: int, wide: int) -> Block:
    """Two matrices, hidden -> wide -> hidden, column-parallel and row-parallel."""
    tokens, width = B * S, sympy.Integer(wide) / T
    saved = (
        kept(TensorLayout.REPLICATED, ELEMENT_BYTES * tokens * hidden),
        kept(TensorLayout.GATHERED, ELEMENT_BYTES * tokens * hidden),
        kept(TensorLayout.SHARDED, ELEMENT_BYTES * tokens * width),
    )
    amid = tokens * (3 / Q + GATHERS / Q + GATHER_COPY + SCATTER_COPY)
    return Block(
        name=name,
        params=(
            param("up", hidden * wide, sharded=True),
            param("down", hidden * wide, sharded=True),
            param("norm", hidden, sharded=False),
        ),
        ops=(
            pointwise("forward", 4 * tokens * hidden),
            gemm("forward", tokens, width, sympy.Integer(hidden)),
            gemm("forward", tokens, sympy.Integer(hidden), width),
            gemm("backward", tokens, sympy.Integer(hidden), width),
            gemm("backward", sympy.Integer(hidden), width, tokens),
            gemm("backward", tokens, width, sympy.Integer(hidden)),
            gemm("backward", width, sympy.Integer(hidden), tokens),
            pointwise("backward", 6 * tokens * hidden),
        ),
        saved=saved,
        saved_single=saved,
        early=saved,
        awaited=(
            kept(TensorLayout.REPLICATED, ELEMENT_BYTES * tokens * hidden),
            kept(TensorLayout.SHARDED, ELEMENT_BYTES * tokens * width),
            kept(TensorLayout.GATHERED, ELEMENT_BYTES * tokens * hidden),
        ),
        keeps_input=False,
        made_bytes=(ELEMENT_BYTES * tokens * (2 * width + hidden / Q),),
        forward_bytes=(),
        boundary_bytes=ELEMENT_BYTES * tokens * hidden,
        transient_bytes=(ELEMENT_BYTES * tokens * width, ELEMENT_BYTES * amid * hidden),
        transient_with_grads_bytes=(
            ELEMENT_BYTES * (tokens + hidden) * width,
            ELEMENT_BYTES * (amid * hidden + 2 * hidden * width + hidden),
        ),
        transient_adding_bytes=(
            ELEMENT_BYTES * (tokens + hidden) * width,
            ELEMENT_BYTES * (amid * hidden + hidden * width + hidden),
        ),
        carried_bytes=sympy.Integer(0),
        flows=name != "embed",
        tp_bytes=ELEMENT_BYTES * tokens * hidden,
        num_entries=1,
        num_exits=1,
        num_entries_back=1,
        num_exits_back=1,
        other_entries_back=(),
        norm_sums=(),
        norm_sums_back=(),
        num_whole=1,
        num_recomputed_ops=2,  # the second matrix saves only its input
        domain=(),
        buffer_bytes=0,
    )


def end_block(name: str, hidden: int, vocab: int, *, tied: bool) -> Block:
    """An embedding or a head: one vocabulary matrix."""
    tokens, width = B * S, sympy.Integer(vocab) / T
    return Block(
        name=name,
        params=(param("weight", hidden * vocab, sharded=True, tied=tied),),
        ops=(
            gemm("forward", tokens, width, sympy.Integer(hidden)),
            gemm("backward", tokens, sympy.Integer(hidden), width),
        ),
        saved=(kept(TensorLayout.SHARDED, 4 * tokens * width),),
        saved_single=(kept(TensorLayout.SHARDED, 4 * tokens * width),),
        early=(kept(TensorLayout.GATHERED, ELEMENT_BYTES * tokens * hidden),),
        awaited=(kept(TensorLayout.SHARDED, ELEMENT_BYTES * tokens * width),),
        keeps_input=True,
        made_bytes=(8 * tokens * width,),
        forward_bytes=(),
        boundary_bytes=ELEMENT_BYTES * tokens * hidden,
        transient_bytes=(4 * tokens * (width + hidden / Q),),
        transient_with_grads_bytes=(
            4 * tokens * (width + hidden / Q),
            ELEMENT_BYTES * (tokens * width + hidden * width),
        ),
        transient_adding_bytes=(
            4 * tokens * (width + hidden / Q),
            ELEMENT_BYTES * (tokens * width + hidden * width),
        ),
        carried_bytes=sympy.Integer(0),
        flows=name != "embed",
        tp_bytes=ELEMENT_BYTES * tokens * hidden,
        num_entries=int(name == "head"),
        num_exits=int(name == "embed"),
        num_entries_back=int(name == "head"),
        num_exits_back=int(name == "embed"),
        other_entries_back=(),
        norm_sums=(),
        norm_sums_back=(),
        num_whole=0,
        num_recomputed_ops=1,
        domain=(),
        buffer_bytes=0,
    )


def toy_graph(
    counts: tuple[int, ...] = (8,), hidden: int = 1024, vocab: int = 32000, *, tied: bool = False
) -> ModelGraph:
    """Runs of MLP layers, each run twice as wide as the one before."""
    blocks = tuple(mlp_block(f"layer{i}", hidden, 4 * hidden * 2**i) for i in range(len(counts)))
    embed = end_block("embed", hidden, vocab, tied=False)
    head = end_block("head", hidden, vocab, tied=tied)
    layers = tuple(LayerRun(block=i, count=count) for i, count in enumerate(counts))
    num_params = embed.num_params + head.num_params
    num_params += sum(run.count * blocks[run.block].num_params for run in layers)
    return ModelGraph(
        name="toy",
        num_params=num_params,
        num_trainable=num_params,
        blocks=blocks,
        layers=layers,
        embed=embed,
        shared=(kept(TensorLayout.GATHERED, ELEMENT_BYTES * S * hidden),),
        shared_single=(kept(TensorLayout.GATHERED, ELEMENT_BYTES * S * hidden),),
        head=head,
        tied=tied,
        max_seq_len=None,
        tp_limits=(TpLimit(label="MLP width", size=4 * hidden),),
        sequential=True,
        precision="bf16",
        fingerprint="sha256:toy",
        notes=(),
    )


def converted_blocks(graph: ModelGraph) -> dict[MemoryLevel, tuple[Block, ...]]:
    """The layers of a toy as if converted: one level faster and smaller, one smaller still."""

    def lighter(block: Block, num_saved: int, *, again: bool) -> Block:
        saved, norm = block.saved[-num_saved:], block.ops[0]
        more = (replace(norm, phase="backward"),) * again
        # The pointwise operation of the forward pass is taken to be part of the matrix behind it.
        return replace(block, saved=saved, saved_single=saved, ops=(*block.ops[1:], *more))

    return {
        MemoryLevel.DROP_ACTIVATION: tuple(lighter(b, 2, again=False) for b in graph.blocks),
        MemoryLevel.DROP_NORM: tuple(lighter(b, 1, again=True) for b in graph.blocks),
    }


def lean_heads(graph: ModelGraph) -> dict[HeadMode, Block]:
    """The head of a toy as if it ran by parts: once more backward, or with its gradients kept."""
    head, product = graph.head, graph.head.ops[0]
    lean = replace(
        head,
        transient_bytes=tuple(size / 16 for size in head.transient_bytes),
        transient_with_grads_bytes=tuple(size / 16 for size in head.transient_with_grads_bytes),
        transient_adding_bytes=tuple(size / 16 for size in head.transient_adding_bytes),
    )
    kept_rows, weight = (
        (kept(TensorLayout.GATHERED, size),)
        for size in (head.boundary_bytes, ELEMENT_BYTES * head.num_params)
    )
    again = (*head.ops, replace(product, phase="backward"))
    accumulated = (*head.ops, pointwise("backward", sympy.Integer(8 * head.num_params)))
    return {
        HeadMode.CHECKPOINTED: replace(lean, ops=again, saved=kept_rows, saved_single=kept_rows),
        HeadMode.IN_FORWARD: replace(lean, ops=accumulated, saved=weight, saved_single=weight),
    }


@cache
def toy_platform(num_gpus: int = 8, gpu: str = "h100-sxm", runtime: str = "torch") -> Platform:
    """Some GPUs of shipped profiles, as they are before whole runs are fitted.

    Formulas are held against the laws alone: scales that runs say would hide a wrong one.
    """
    found = load_platform(num_gpus=num_gpus, gpu=gpu, cluster=None, runtime=runtime)
    hashes = {k: v for k, v in found.hashes.items() if k != f"{runtime}-{found.device.name}"}
    return replace(
        found,
        device=load_device(found.device.name).profile,
        cluster=load_cluster(found.cluster.name).profile,
        runtime=load_runtime(runtime).profile,
        calibration=None,
        hashes=hashes,
    )


def toy_workload(seq_len: int = 2048, global_batch: int = 64) -> Workload:
    """A bf16 AdamW workload."""
    return Workload(
        seq_len=seq_len,
        global_batch=global_batch,
        precision=Precision.BF16,
        optimizer=Optimizer.ADAMW,
        attention=Attention.FLASH,
        compile=False,
    )


def adamw_setting(runtime: Runtime, precision: Precision = Precision.BF16) -> CostSetting:
    """What costs are built for: AdamW under a runtime."""
    return CostSetting(runtime=runtime, numerics=NUMERICS[precision], optimizer=Optimizer.ADAMW)


@cache
def toy_programs(
    graph: ModelGraph,
    runtime: str = "torch",
    *,
    converts: bool = False,
    heads: bool = False,
    more: tuple[MemoryLevel, ...] = (),
) -> ModelPrograms:
    """The compiled costs of a graph under a runtime in bf16, once for all tests."""
    profile = load_runtime(runtime).profile
    levels = converted_blocks(graph) if converts else {}
    own = lean_heads(graph) if heads else {}
    return compile_model(graph, adamw_setting(profile), levels, own, more)


def toy_job(
    graph: ModelGraph | None = None,
    num_gpus: int = 8,
    gpu: str = "h100-sxm",
    runtime: str = "torch",
    *,
    converts: bool = False,
    heads: bool = False,
    **workload: int,
) -> Job:
    """A toy model on a few GPUs; `converts`: its layers may be converted; `heads`: so its head."""
    platform = toy_platform(num_gpus, gpu, runtime)
    programs = toy_programs(graph or toy_graph(), runtime, converts=converts, heads=heads)
    return make_job(programs, platform, toy_workload(**workload))


def count_columns(
    job: Job, first: ArrayLike, counts: Sequence[ArrayLike]
) -> dict[str, NDArray[np.int64]]:
    """Layers by kind and level from `first` on; `counts`: layers at each level, in their order.

    Those at the last level come first.
    """
    start = np.asarray(first)
    columns = {}
    # The layers that keep least come first in a stage (decision 11): memory is then convex.
    for level, count in reversed([*zip(job.levels, counts, strict=True)]):
        stop = start + np.asarray(count)
        for kind, prefix in enumerate(job.kind_prefix):
            columns[f"{level.column}_{kind}"] = prefix[stop] - prefix[start]
        start = stop
    return columns
