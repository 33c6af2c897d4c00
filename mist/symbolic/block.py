"""What one block costs one rank, as expressions in the strategy columns (docs/cost-model.md).

Device time of a pass is the sum over its operations of the platform's laws on the sharded shapes:

    pass_s = sum gemm_s(batch, m, n, k) + sum attention_s(...) + sum over classes memory_s(bytes, n)

Under sequence parallelism a tensor that a tensor-parallel rank would hold whole is held 1/t, and
the operations outside the matrix pairs touch 1/t of their bytes; the gathered input of a
column-parallel matrix stays whole, as torch keeps it for the weight gradient. So do gradients of
that input, a part of a sum over the ranks by each matrix, until they are added up.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Final

import sympy
from sympy import Expr

from mist.model.graph import (
    GATHER_COPY,
    GATHERS,
    SCATTER_COPY,
    B,
    Block,
    CollectiveKind,
    Op,
    OpKind,
    Param,
    Q,
    S,
    SavedTensor,
    T,
    TensorLayout,
    TensorParallelCollective,
)
from mist.model.summary import Traffic
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.cost_setting import CostSetting, figure
from mist.symbolic.state_bytes import frozen_weight_ratio

IN_KERNELS: Final = "mist."  # operations that stand for kernels of other packages (scans)
ROWS_DIMS: Final = 3  # [samples, tokens, hidden]
COLLECTIVES: Final = MappingProxyType(
    {
        "all_gather": sym.ALL_GATHER,
        "reduce_scatter": sym.REDUCE_SCATTER,
        "all_reduce": sym.ALL_REDUCE,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """Seconds of one micro-batch and bytes of one rank.

    `params` counts parameters of the rank, `trainable_params` those with a gradient,
    `largest_params` those of the largest tensor of the latter; `hosted_params`: as many trained
    ones take as much host memory. `gather_s`, `scatter_s`, `reduce_s`: all-gather of the parameters
    and reduce-scatter of the gradients over the ranks that share states, all-reduce of a rank's
    part over the copies of them;
    `gather_copy_s`, `scatter_copy_s`: the copies out of and into their flat buffers. `pointwise_s`:
    what `recompute_s` holds beside products and attention kernels; `products_s`,
    `half_products_s`: all products of it, and every other one from the first on. `kernels_bytes`,
    `products_bytes`, `half_products_bytes`: the results of attention kernels, of all products and
    of every other one;
    `weight_s`: the products of the backward pass that give gradients of weights. `attention_s`,
    `attention_ratio`, `scores_bytes`: core attention forward, its share of the forward operations,
    and what is saved inside it beyond queries, keys and values.
    `input_bytes`: the input of the block where it does not save it. `early_bytes`, `awaited_bytes`,
    `made_bytes`, `forward_bytes`: of what `Block` lists under these names.
    """

    forward_s: Expr
    backward_s: Expr
    recompute_s: Expr
    pointwise_s: Expr
    products_s: Expr
    half_products_s: Expr
    attention_s: Expr
    attention_ratio: Expr
    weight_s: Expr
    tp_forward_s: Expr
    tp_backward_s: Expr
    tp_recompute_s: Expr
    params: Expr
    trainable_params: Expr
    hosted_params: Expr
    largest_params: Expr
    gather_s: Expr
    scatter_s: Expr
    reduce_s: Expr
    gather_copy_s: Expr
    scatter_copy_s: Expr
    saved_bytes: Expr
    saved_allocated_bytes: Expr
    kernels_bytes: Expr
    products_bytes: Expr
    half_products_bytes: Expr
    scores_bytes: Expr
    boundary_bytes: Expr
    transient_bytes: Expr
    transient_with_grads_bytes: Expr
    transient_adding_bytes: Expr
    input_bytes: Expr
    early_bytes: Expr
    awaited_bytes: Expr
    made_bytes: Expr
    forward_bytes: Expr

    def named(self, block: str) -> tuple[dict[str, Expr], "BlockCost"]:
        """The fields under names of their own, and the same cost in terms of these names.

        The formulas above read the names, so that each expression is compiled once.
        """
        names = {item.name: f"{block}_{item.name}" for item in fields(self)}
        values = {name: getattr(self, item) for item, name in names.items()}
        symbols = {item: sympy.Symbol(f"cost_{name}", real=True) for item, name in names.items()}
        # Most blocks have none of these: their formulas leave them out.
        if self.forward_bytes == 0:
            symbols["forward_bytes"] = sympy.Integer(0)
        return values, BlockCost(**symbols)


def layer_cost(block: Block, setting: CostSetting) -> BlockCost:
    """Cost of a pipeline layer, which may be recomputed."""
    return BlockCost(
        **device_cost(block, setting),
        **collective_cost(block, setting, recomputed_exits=recomputed_exits(block)),
        # Whole-layer checkpointing keeps the input, if there is anything to compute again.
        boundary_bytes=block.boundary_bytes * int(bool(block.saved)) / setting.sequence_shards,
    )


def collective_cost(
    block: Block, setting: CostSetting, *, recomputed_exits: int
) -> dict[str, Expr]:
    """Seconds of the tensor-parallel collectives of each pass, with the copies around them."""
    runtime = setting.runtime
    rows = collectives(block, sequence_parallel=runtime.knobs.sequence_parallel)
    seconds = {
        phase: sympy.Add(
            *(c.count * _exchange_s(c.kind, c.bytes, runtime) for c in rows if c.phase == phase)
        )
        for phase in ("forward", "backward")
    }
    if runtime.kernels.gathers_input_again and runtime.knobs.sequence_parallel:
        seconds["backward"] += block.num_entries_back * _exchange_s(
            "all_gather", block.tp_bytes, runtime
        )
    spared = block.num_exits - recomputed_exits
    leaving: CollectiveKind = "reduce_scatter" if runtime.knobs.sequence_parallel else "all_reduce"
    again = seconds["forward"] - spared * _exchange_s(leaving, block.tp_bytes, runtime)
    again *= int(block.num_recomputed_ops > 0)
    return {
        "tp_forward_s": seconds["forward"],
        "tp_backward_s": seconds["backward"],
        "tp_recompute_s": again,
    }


def _exchange_s(kind: CollectiveKind, num_bytes: Expr, runtime: Runtime) -> Expr:
    """Seconds of a tensor-parallel collective on a buffer, and of the copy that it needs.

    Where collectives act on the first dimension (`token_copies`), a whole copy puts tokens in order
    before each scatter, and behind each gather of several samples. A sum is made in a copy, too.
    """
    paid = figure(runtime, "overlap.tensor_parallel_time_scale")
    exchange_s = paid * COLLECTIVES[kind](num_bytes, T, sym.TP_PER_NODE)
    if not runtime.transients.token_copies:
        return exchange_s
    scale = figure(runtime, "kernels.memory_time_scale")
    copy_s = scale * sym.MEMORY[Traffic.POINTWISE](2 * num_bytes, 1)  # read and written
    copies = sympy.And(T > 1, B > 1) if kind == "all_gather" else T > 1
    return exchange_s + sympy.Piecewise((copy_s, copies), (0, True))


def collectives(block: Block, *, sequence_parallel: bool) -> tuple[TensorParallelCollective, ...]:
    """What t ranks exchange for a block in one pass each way.

    An embedding whose rows are changed before the first layer (positions are added) is summed whole
    and then divided, where its rows alone would be scattered; a table may scale them itself. Rows
    that are widened behind it (a factorised embedding) are summed before.
    """
    rows = block.collectives(sequence_parallel=sequence_parallel)
    sums = [op for op in forward_ops(block) if len(op.shape) == ROWS_DIMS and op.shape[0] == B]
    if not sums or "embedding" not in sums[0].name:
        return rows
    if all(op.module == sums[0].module for op in sums):
        return rows
    looked_up = sums[0].written_bytes
    return tuple(
        replace(row, kind="all_reduce", bytes=looked_up)
        if row.phase == "forward" and row.kind in ("reduce_scatter", "all_reduce")
        else row
        for row in rows
    )


def recomputed_exits(block: Block) -> int:
    """Reductions that recomputation repeats: not the last where it stops before that product."""
    rest = forward_ops(block)[block.num_recomputed_ops :]
    stops_early = any(op.kind == OpKind.GEMM for op in rest)
    return max(block.num_exits - int(stops_early), 0)


def device_cost(block: Block, setting: CostSetting) -> dict[str, Expr]:
    """What a rank computes, moves and holds of a block, by the names of `BlockCost`."""
    params, traffic = rank_params(block.params), setting.runtime.traffic
    trained = [param for param in block.params if param.trainable]
    frozen = [param for param in block.params if not param.trainable]
    trainable, ratio = rank_params(trained), frozen_weight_ratio(setting)
    accumulated = trainable * traffic.accumulation_bytes_per_param.value
    gathered = params * traffic.gather_copy_bytes_per_param[setting.numerics.compute].value
    scattered = trainable * traffic.scatter_copy_bytes_per_param[setting.numerics.compute].value
    gather, scatter, reduce = _dp_collectives(params, trainable, setting)
    if block.is_frozen:
        scatter = reduce = sympy.Integer(0)
    forward = forward_ops(block)
    again, backward = block.ops[: block.num_recomputed_ops], block.ops[len(forward) :]
    core = [op for op in forward if _is_core_attention(op)]
    return {
        "forward_s": _pass_seconds(forward, setting),
        "backward_s": _pass_seconds(backward, setting)
        + _gradient_kernel_seconds(_accumulation_bytes(accumulated), block),
        "recompute_s": _pass_seconds(again, setting),
        "pointwise_s": _pass_seconds(
            [op for op in again if op.kind != OpKind.ATTENTION and not _is_product(op)], setting
        ),
        "products_s": _pass_seconds(_products(again), setting),
        "half_products_s": _pass_seconds(_products(again)[::2], setting),
        "attention_s": _pass_seconds(core, setting),
        "attention_ratio": sympy.Rational(len(core), max(len(forward), 1)),
        "weight_s": _pass_seconds([op for op in backward if _is_weight_gradient(op)], setting),
        "params": params,
        "trainable_params": trainable,
        "hosted_params": trainable + ratio * rank_params(frozen),
        "largest_params": sym.larger(0, *dict.fromkeys(map(rank_numbers, trained))),
        "gather_s": gather,
        "scatter_s": scatter,
        "reduce_s": reduce,
        "gather_copy_s": sym.MEMORY[Traffic.POINTWISE](gathered, 1),
        "scatter_copy_s": _gradient_kernel_seconds(scattered, block),
        "saved_bytes": saved_bytes(block, setting),
        "saved_allocated_bytes": _allocated_bytes(block, setting),
        "kernels_bytes": _results_bytes(block, _attention_kernels(forward), setting),
        "products_bytes": _results_bytes(block, _products(forward), setting),
        "half_products_bytes": _results_bytes(block, _products(forward)[::2], setting),
        "scores_bytes": _scores_bytes(block, core, setting),
        "transient_bytes": _largest(block.transient_bytes, setting),
        "transient_with_grads_bytes": _largest(block.transient_with_grads_bytes, setting),
        "transient_adding_bytes": _largest(block.transient_adding_bytes, setting),
        "input_bytes": int(not block.keeps_input) * block.boundary_bytes / setting.sequence_shards,
        "early_bytes": _rank_bytes(block.early, setting),
        "awaited_bytes": _rank_bytes(block.awaited, setting),
        "made_bytes": _largest(block.made_bytes, setting),
        "forward_bytes": _largest(block.forward_bytes, setting),
    }


def _gradient_kernel_seconds(num_bytes: Expr, block: Block) -> Expr:
    """Seconds of one kernel on the gradients of a block; there is none where all is frozen."""
    if block.is_frozen:
        return sympy.Integer(0)
    return sym.MEMORY[Traffic.POINTWISE](num_bytes, 1)


def _largest(transients: Iterable[Expr], setting: CostSetting) -> Expr:
    """The most of a rank's transient bytes at any instant."""
    gathers = sympy.Piecewise((1, setting.sequence_shards > 1), (0, True))
    copies = int(setting.runtime.transients.token_copies) * gathers
    values = {
        Q: setting.sequence_shards,
        GATHERS: gathers,
        SCATTER_COPY: copies,
        GATHER_COPY: copies * sympy.Piecewise((1, B > 1), (0, True)),
    }
    return sym.larger(0, *dict.fromkeys(size.subs(values) for size in transients))


def _is_weight_gradient(op: Op) -> bool:
    """Whether a product of the backward pass sums over samples, as gradients of weights do."""
    return op.kind == OpKind.GEMM and op.dims[3].has(B)


def _is_bias_gradient(op: Op) -> bool:
    """Whether an operation sums the gathered gradient of what a row-parallel matrix gives."""
    sums = op.phase == "backward" and op.traffic == Traffic.REDUCTION
    return sums and op.layout == TensorLayout.GATHERED and not op.written_bytes.has(B)


def _products(ops: Iterable[Op]) -> list[Op]:
    return [op for op in ops if _is_product(op)]


def _is_product(op: Op) -> bool:
    """Whether torch's checkpointing sees a matrix product: not those in kernels of packages."""
    return op.kind == OpKind.GEMM and not op.name.startswith(IN_KERNELS)


def _attention_kernels(ops: Iterable[Op]) -> list[Op]:
    return [op for op in ops if op.kind == OpKind.ATTENTION]


def _results_bytes(block: Block, ops: Iterable[Op], setting: CostSetting) -> Expr:
    """Bytes of the results of operations on a rank; a block that saves nothing keeps none."""
    shards = {TensorLayout.REPLICATED: setting.sequence_shards}
    results = (op.written_bytes / shards.get(op.layout, 1) for op in ops if block.saved)
    return sympy.expand(sympy.Add(*results))


def _accumulation_bytes(accumulated: Expr) -> Expr:
    """Gradients are accumulated whole below ZeRO-2, and by shard from there on."""
    return sympy.Piecewise((accumulated, sym.ZERO < 2), (accumulated / sym.SHARD, True))


def rank_params(params: Iterable[Param]) -> Expr:
    """These parameters (real numbers) on one rank of t, tied second uses included."""
    return sympy.Add(*map(rank_numbers, params))


def rank_numbers(param: Param) -> Expr:
    """Real numbers of a parameter on one rank of t."""
    return sympy.Integer(param.num_reals) / (T if param.sharded else 1)


def saved_bytes(block: Block, setting: CostSetting) -> Expr:
    """Activation bytes kept for the backward pass; b = 1 is a case of its own where it differs."""
    return kept_bytes(block.saved, block.saved_single, setting)


def kept_bytes(
    saved: Iterable[SavedTensor], saved_single: Iterable[SavedTensor], setting: CostSetting
) -> Expr:
    """Bytes of saved tensors on a rank, for b >= 2 and for b = 1."""
    many, single = _rank_bytes(saved, setting), _rank_bytes(saved_single, setting)
    if sympy.expand(many.subs(B, 1) - single) == 0:
        return many
    return sympy.Piecewise((single, sympy.Eq(B, 1)), (many, True))


def _rank_bytes(saved: Iterable[SavedTensor], setting: CostSetting) -> Expr:
    total: dict[TensorLayout, Expr] = defaultdict(lambda: sympy.Integer(0))
    again = setting.runtime.kernels.gathers_input_again
    for tensor in saved:
        input_again = again and tensor.layout == TensorLayout.GATHERED and tensor.bytes.free_symbols
        total[TensorLayout.REPLICATED if input_again else tensor.layout] += tensor.bytes
    whole = total[TensorLayout.REPLICATED] / setting.sequence_shards
    return sympy.expand(total[TensorLayout.SHARDED] + total[TensorLayout.GATHERED] + whole)


def _allocated_bytes(block: Block, setting: CostSetting) -> Expr:
    """Host bytes of the saved tensors, where each is pinned by itself; else their bytes."""
    offload = setting.runtime.offload
    if offload is None or not offload.pins_each_tensor:
        return saved_bytes(block, setting)
    many, single = (
        sympy.Add(*(sym.PINNED(_rank_bytes([tensor], setting)) for tensor in saved))
        for saved in (block.saved, block.saved_single)
    )
    return (
        many
        if many.subs(B, 1) == single
        else sympy.Piecewise((single, sympy.Eq(B, 1)), (many, True))
    )


def forward_ops(block: Block) -> tuple[Op, ...]:
    """The forward operations of a block, in order; they come before the others."""
    return tuple(op for op in block.ops if op.phase == "forward")


def _pass_seconds(ops: Sequence[Op], setting: CostSetting) -> Expr:
    runtime = setting.runtime
    scale, scores_scale = (
        figure(runtime, f"kernels.{name}_time_scale") for name in ("memory", "scores")
    )
    matrix = Counter(_matrix_seconds(op, runtime) for op in ops if op.kind != OpKind.MEMORY)
    memory = [op for op in ops if op.kind == OpKind.MEMORY]
    scores = [op for op in memory if _is_on_scores(op)]
    others = [op for op in memory if not _is_on_scores(op)]
    return sympy.Add(
        *(count * seconds for seconds, count in matrix.items()),
        *(scale * each for each in _memory_seconds(others, setting)),
        *(scores_scale * each for each in _memory_seconds(scores, setting)),
    )


def _is_on_scores(op: Op) -> bool:
    """Whether an operation moves attention scores, of which there are s^2."""
    return _is_square(op.traffic_bytes)


def _is_core_attention(op: Op) -> bool:
    """Whether an operation is of core attention: its kernel, or one that makes or reads scores."""
    if op.kind == OpKind.GEMM:
        _, m, n, k = op.dims
        return _is_square(m * n) or _is_square(m * k)
    return op.kind == OpKind.ATTENTION or _is_on_scores(op)


def _is_square(size: Expr) -> bool:
    """Whether a size grows with the square of the tokens."""
    return bool(sympy.expand(size).has(S**2))


def _scores_bytes(block: Block, core: Sequence[Op], setting: CostSetting) -> Expr:
    """What is saved inside core attention, less the queries, keys and values that it begins with.

    Without a kernel of its own attention saves the operands of both products, and of what lies
    between them all that has a score for each pair of tokens.
    """
    products = [op for op in core if op.kind == OpKind.GEMM]
    readers = {(op.name, op.module) for op in products}
    saved, single = (
        [each for each in tensors if _is_square(each.bytes) or (each.op, each.module) in readers]
        for tensors in (block.saved, block.saved_single)
    )
    inputs = sympy.Add(*(_operands(op) for op in products)) * setting.numerics.compute.num_bytes
    return kept_bytes(saved, single, setting) - inputs


def _operands(product: Op) -> Expr:
    """Elements of queries and keys, or of values: the operands that are no scores."""
    batch, m, n, k = product.dims
    return batch * (k * (m + n) if _is_square(m * n) else k * n)


def _matrix_seconds(op: Op, runtime: Runtime) -> Expr:
    if op.kind == OpKind.GEMM:
        return sym.GEMM(*op.dims)
    law = sym.ATTENTION_FORWARD if op.phase == "forward" else sym.ATTENTION_BACKWARD
    return figure(runtime, "kernels.attention_time_scale") * law(*op.dims, int(op.causal))


def _memory_seconds(ops: Iterable[Op], setting: CostSetting) -> Iterable[Expr]:
    """One law call per class of operation: bytes and kernels add up."""
    traffic: dict[Traffic, Expr] = defaultdict(lambda: sympy.Integer(0))
    kernels: Counter[Traffic] = Counter()
    joint = setting.runtime.kernels.joint_columns
    for op in ops:
        if joint and op.layout == TensorLayout.PARTIAL:
            continue  # one matrix makes the whole sum
        divided = op.layout == TensorLayout.REPLICATED or (joint and _is_bias_gradient(op))
        shards = setting.sequence_shards if divided else 1
        traffic[op.traffic] += op.traffic_bytes / shards
        kernels[op.traffic] += 1
    for name, total in traffic.items():
        yield sym.MEMORY[name](sympy.expand(total), kernels[name])


def _dp_collectives(params: Expr, trainable: Expr, setting: CostSetting) -> tuple[Expr, Expr, Expr]:
    """All-gather of compute-precision parameters, scatter of gradients, their sum over copies.

    Ranks with the same part of the states sum that part (FSDP2: `foreach_reduce`). A collective
    that carries several layers costs each of them its part.
    """
    group = (sym.SHARD, sym.SHARD_PER_NODE)
    together = sympy.nsimplify(setting.runtime.overlap.layers_per_collective.value)
    reduced = setting.runtime.traffic.reduced_bytes_per_param
    each_bytes = sympy.nsimplify(reduced.value) if reduced else setting.numerics.gradients.num_bytes
    gradient_bytes = together * trainable * each_bytes
    return (
        sym.ALL_GATHER(together * params * setting.numerics.compute.num_bytes, *group) / together,
        sym.REDUCE_SCATTER(gradient_bytes, *group) / together,
        sym.ALL_REDUCE(gradient_bytes / sym.SHARD, sym.COPIES, sym.COPIES_PER_NODE) / together,
    )
