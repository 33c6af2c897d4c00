"""Stage cost: time and memory of a pipeline stage as expressions (docs/cost-model.md).

Two levels, so that a search pays for each only where it varies:

*terms*, functions of the strategy (b, t, dp, zero, copies, offload ratios, in-node shares of the
data-parallel groups): for each block x and memory level, seconds of one micro-batch by part, bytes;
*stage*, functions of the terms and of the layout (layers of each kind and level, position):

    stable_s = sum over layers of their slots (`slots.py`) + ends + p2p
    lone_s   = the same in the first forward and last backward + exposed collectives + optimizer
    weight_s = what of a micro-batch computes gradients of weights, which may wait
    peak     = states + kept * in_flight + working set of the worst block + gathered + buffers
    host     = what of states and kept activations lives in host memory

Formulas: Mist (EuroSys'25) section 4; bytes and collectives by ZeRO level from profiles/runtimes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy
from sympy import Expr

from mist.graph import ModelGraph, T
from mist.platform.runtime import Runtime
from mist.spec import MemoryLevel, Precision
from mist.symbolic import symbols as sym
from mist.symbolic.block import BlockCost, Setting, embed_cost, head_cost, kept_bytes, layer_cost
from mist.symbolic.pipelined import UNMADE_RATIO, SplitBackward, either, kept_outputs, last
from mist.symbolic.program import TIME_PARTS
from mist.symbolic.slots import (
    Level,
    at_least,
    ends_seconds,
    hosted_bytes,
    levels,
    optimizer_seconds,
    slots,
)
from mist.symbolic.states import bucket_params, from_level, gathered_bytes, unmade_terms

_ONE = sympy.Integer(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Named expressions: `costs` of blocks and `terms` of costs, both of the strategy; `stage`.

    A `term_x` in `stage` is the term x, a `cost_x` in `terms` is the cost x.
    """

    num_kinds: int
    costs: Mapping[str, Expr]
    terms: Mapping[str, Expr]
    stage: Mapping[str, Expr]


def stage_cost(graph: ModelGraph, runtime: Runtime, precision: Precision) -> StageCost:
    """Build the expressions of any stage of `graph`.

    Args:
        graph: the traced model.
        runtime: the framework whose behaviour is predicted.
        precision: compute precision of the workload.
    """
    setting = Setting(runtime=runtime, precision=precision)
    blocks = {str(kind): layer_cost(block, setting) for kind, block in enumerate(graph.blocks)}
    blocks["embed"] = embed_cost(graph.embed, setting)
    blocks["head"] = head_cost(graph.head, setting)
    costs = {
        "sent_bytes": _sent_bytes(graph, setting),
        "shared_bytes": kept_bytes(graph.shared, graph.shared_single, setting),
    }
    terms: dict[str, Expr] = {}
    named: dict[str, BlockCost] = {}
    for name, cost in blocks.items():
        values, named[name] = cost.named(name)
        costs |= values
        terms |= _block_terms(name, named[name], setting)
    terms |= _stage_terms(graph, setting)
    every = (named[str(kind)].params for kind in graph.layer_kinds())
    terms["all_layers_params"] = sympy.Add(*every)
    return StageCost(
        num_kinds=len(graph.blocks),
        costs=costs,
        terms=terms,
        stage=_stage(len(graph.blocks), runtime, precision),
    )


def _block_terms(name: str, cost: BlockCost, setting: Setting) -> dict[str, Expr]:
    """Terms of one block; the embedding and the head are never recomputed or offloaded."""
    is_layer, runtime = name.isdigit(), setting.runtime
    terms = {
        f"{name}_params": cost.params,
        f"{name}_largest_params": cost.largest_params,
        f"{name}_optimizer_s": optimizer_seconds(cost.params, runtime, is_layer=is_layer),
        f"{name}_ends_s": ends_seconds(cost, runtime),
        f"{name}_weight_s": cost.weight_s,
        f"{name}_input_bytes": cost.input_bytes,
        f"{name}_early_bytes": cost.early_bytes,
        f"{name}_awaited_bytes": cost.awaited_bytes,
        f"{name}_made_bytes": cost.made_bytes,
    }
    for level in levels(cost, runtime, is_layer=is_layer):
        prefix = f"{name}_{level.name}"
        times = slots(cost, level, setting, is_layer=is_layer)
        for part in TIME_PARTS[:-1]:
            terms[f"{prefix}_{part}_s"] = getattr(times, part)
        terms |= {f"{prefix}_stable_s": times.stable(), f"{prefix}_lone_s": times.lone()}
        terms |= _level_bytes(prefix, level, runtime if is_layer else None)
    return terms


def _level_bytes(prefix: str, level: Level, offloads: Runtime | None) -> dict[str, Expr]:
    """Bytes of a block at a level: on the device, in host memory, and on their way."""
    share, staged = sympy.Integer(0), 0.0
    if offloads is not None and offloads.offload is not None and offloads.offload.activations:
        share = sym.OFFLOAD["activations"]
        staged = offloads.offload.num_staged_layers.value
    return {
        f"{prefix}_kept_bytes": (1 - share) * level.kept_bytes,
        f"{prefix}_host_bytes": share * level.kept_bytes,
        f"{prefix}_staged_bytes": staged * share * level.kept_bytes,
        f"{prefix}_working_bytes": level.working_bytes,
        f"{prefix}_running_bytes": level.running_bytes,
    }


def _stage_terms(graph: ModelGraph, setting: Setting) -> dict[str, Expr]:
    """Terms that belong to no block: states per parameter, transfers, ties."""
    sent = sympy.Symbol("cost_sent_bytes", real=True)
    tied = sympy.Add(
        *(sympy.Integer(p.num_reals) / (T if p.sharded else 1) for p in graph.head.params if p.tied)
    )
    tied_bytes = tied * Precision.FP32.num_bytes
    return {
        "tied_params": tied,
        "shared_bytes": sympy.Symbol("cost_shared_bytes", real=True),
        "tied_reduce_in_node_s": sym.P2P(tied_bytes, 0),
        "tied_reduce_cross_s": sym.P2P(tied_bytes, 1),
        "state_bytes_per_param": _state_bytes(setting.runtime, setting.precision),
        **_hosted_terms(setting.runtime),
        "gathered_bytes_per_param": gathered_bytes(setting.runtime, setting.precision),
        "compute_bytes_per_param": sympy.Float(setting.precision.num_bytes),
        "fp32_bytes_per_param": sympy.Float(Precision.FP32.num_bytes),
        **unmade_terms(),
        "whole_bytes_per_param": from_level(3, setting.precision),
        "unsharded_bytes_per_param": from_level(0, setting.precision, below=3),
        "buffer_bytes_per_param": from_level(2, Precision.FP32),
        "reduces": at_least(2),
        "p2p_bytes": sent,
        "activation_bytes": sent * setting.sequence_shards,
        "p2p_in_node_s": sym.P2P(sent, 0),
        "p2p_cross_s": sym.P2P(sent, 1),
    }


def _sent_bytes(graph: ModelGraph, setting: Setting) -> Expr:
    """What a stage sends to the next: the largest input of any layer."""
    inputs = {block.boundary_bytes + block.carried_bytes for block in graph.blocks}
    return sym.larger(*sorted(inputs, key=str)) / setting.sequence_shards


def _state_bytes(runtime: Runtime, precision: Precision) -> Expr:
    """Bytes per parameter that live through the step: parameters, gradients, moments."""
    rows = {int(z): runtime.state(precision, z) for z in runtime.knobs.zero_levels}
    replicated = {zero: row.replicated_bytes_per_param.value for zero, row in rows.items()}
    sharded = {zero: row.sharded_bytes_per_param.value for zero, row in rows.items()}
    return sym.by_zero(replicated) + sym.by_zero(sharded) / sym.SHARD


def _hosted_terms(runtime: Runtime) -> dict[str, Expr]:
    """Bytes per parameter in host memory, of layers and of all blocks; and on their way in a step.

    The optimizer streams a few parameters at a time, when no activation is left; those of the
    embedding and the head, large and taken whole, where all moments are in host memory.
    """
    layer, every = sympy.Integer(0), sympy.Integer(0)
    streamed, of_ends = sympy.Integer(0), sympy.Integer(0)
    for name in ("weights", "grads", "optimizer"):
        held, ratio = hosted_bytes(runtime, name, _ONE), sym.OFFLOAD[name]
        if name == "optimizer":
            every, of_ends = ratio * held, sympy.floor(ratio) * held
        else:
            layer += ratio * held
        streamed += sympy.ceiling(ratio) * held
    staged = runtime.offload.num_staged_layers.value if runtime.offload else 0.0
    return {
        "hosted_layer_bytes_per_param": layer,
        "hosted_bytes_per_param": every,
        "streamed_bytes_per_param": staged * streamed,
        "streamed_end_bytes_per_param": staged * of_ends,
        "bucket_params": bucket_params(runtime),
    }


def _stage(num_kinds: int, runtime: Runtime, precision: Precision) -> dict[str, Expr]:
    """Sums over the layers of the stage: every count and position times its term."""
    rows = list(_rows(num_kinds, runtime))
    parts = {f"{part}_s": _total(rows, f"{part}_s") for part in TIME_PARTS if part != "p2p"}
    p2p = _p2p(runtime)
    parts |= {"p2p_s": p2p}
    each = runtime.host.micro_batch_launch_s.value
    parts["launch_s"] += each
    layers = [row for row in rows if row[0].isdigit()]
    once = _worst(layers, "{x}_ends_s") + _of_blocks(rows, "optimizer_s") + _tied_reduce()
    once += runtime.host.step_s.value
    memory, instants = _memory(rows, runtime, precision)
    return {
        **parts,
        "stable_s": _total(rows, "stable_s") + p2p + each,
        "lone_s": _total(rows, "lone_s") + p2p + each + once,
        "weight_s": _of_blocks(rows, "weight_s"),
        **{f"{part}_bytes": expr for part, expr in memory.items()},
        "peak_bytes": sympy.Add(*memory.values()),
        **instants,
        "host_bytes": _host_bytes(rows),
    }


_Row = tuple[str, str, Expr]


def _rows(num_kinds: int, runtime: Runtime) -> Iterable[_Row]:
    """Every (block, level, how many of it the stage has)."""
    for kind in range(num_kinds):
        for level in MemoryLevel:
            if level is not MemoryLevel.SELECTIVE or runtime.selective is not None:
                yield str(kind), level.value, sym.layer_count(level.value, kind)
    yield "embed", "eager", sym.FIRST
    yield "head", "eager", sym.LAST


def _term(name: str) -> sympy.Symbol:
    """The symbol by which a stage formula names a term."""
    return sympy.Symbol(f"term_{name}", real=True)


def _of_blocks(rows: Iterable[_Row], name: str) -> Expr:
    """Sum over the blocks of the stage of a term that does not depend on the memory level."""
    return sympy.Add(*(count * _term(f"{x}_{name}") for x, _, count in rows))


def _total(rows: Iterable[_Row], name: str) -> Expr:
    return sympy.Add(*(count * _term(f"{x}_{level}_{name}") for x, level, count in rows))


def _p2p(runtime: Runtime) -> Expr:
    """Each chunk sends its output forward and its input's gradient back, once per micro-batch."""
    more = runtime.overlap.chunk_transfer_ratio.value * (sym.CHUNKS - 1)
    in_node, cross = _term("p2p_in_node_s"), _term("p2p_cross_s")
    to_next = in_node + sym.NEXT_CROSSES * (cross - in_node)
    to_prev = in_node + sym.PREV_CROSSES * (cross - in_node)
    return (1 - sym.LAST + more) * to_next + (1 - sym.FIRST + more) * to_prev


def _tied_reduce() -> Expr:
    """A tied embedding on two stages exchanges its gradient once per step."""
    in_node, cross = _term("tied_reduce_in_node_s"), _term("tied_reduce_cross_s")
    at_one_end = sym.FIRST + sym.LAST - 2 * sym.FIRST * sym.LAST
    return at_one_end * (in_node + sym.SPANS_NODES * (cross - in_node))


def _memory(
    rows: list[_Row], runtime: Runtime, precision: Precision
) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """Peak bytes by part, which sum to the peak; and bytes as backward passes begin, end, and last.

    The peak is the largest of these, and each is a straight line in the numbers of layers.
    """
    own = runtime.memory.fixed_bytes.value
    own += runtime.memory.buffer_ratio.value * _term("activation_bytes")
    own += _worst(rows, "{x}_{level}_staged_bytes")
    states = _params(rows) * _term("state_bytes_per_param") - _hosted_bytes(rows)
    if runtime.transients.root_group:
        instants, gathered = _of_groups(rows, precision)
        states -= UNMADE_RATIO * _gradients(rows)
    else:
        streamed = _term("streamed_bytes_per_param") * _worst(rows, "{x}_params")
        instants = (sym.larger(_worst(rows, "{x}_{level}_working_bytes"), streamed),) * 3
        gathered = _term("gathered_bytes_per_param") * _worst(rows, "{x}_params")
    others = {
        "states": states,
        "activations": _activations(rows),
        "gathered": gathered,
        "buffers": _exchanged(rows, runtime) + own,
    }
    overhead = runtime.memory.allocator_overhead_ratio.value
    held, working = sympy.Add(*others.values()), sym.larger(*dict.fromkeys(instants))
    parts = {name: others[name] for name in ("states", "activations")} | {"working": working}
    parts |= {name: others[name] for name in ("gathered", "buffers")}
    parts["allocator"] = overhead * (held + working)
    names = ("begin_bytes", "end_bytes", "last_bytes")
    return parts, {
        name: (1 + overhead) * (held + more) for name, more in zip(names, instants, strict=True)
    }


def _activations(rows: list[_Row]) -> Expr:
    """What is kept of the micro-batches in flight, and of those that wait for W."""
    layers = [row for row in rows if row[0].isdigit()]
    embed, head = (_term(f"{end}_eager_kept_bytes") for end in ("embed", "head"))
    kept = sym.IN_FLIGHT * (_total(layers, "kept_bytes") + sym.CHUNKS * _term("shared_bytes"))
    kept += sym.FIRST * (sym.IN_FLIGHT + sym.EMBED_MORE) * embed + sym.LAST * sym.HEAD_HELD * head
    of_head = sym.LAST * sym.CHUNKS * (_term("head_early_bytes") + _term("head_awaited_bytes"))
    return kept + sym.WAITING * (_of_blocks(layers, "awaited_bytes") + of_head)


def _exchanged(rows: list[_Row], runtime: Runtime) -> Expr:
    """Bytes that a stage receives into, and of those it sent that it still holds."""
    if not runtime.memory.keeps_outputs:
        return (2 * sym.CHUNKS - sym.LAST - sym.FIRST) * _term("p2p_bytes")
    eager = [row for row in rows if row[0].isdigit() and row[1] == MemoryLevel.EAGER]
    deeper = [row for row in rows if row[0].isdigit() and row[1] != MemoryLevel.EAGER]
    # Layers that keep least, and among that their input, come first.
    alone = 1 - sym.smaller(1, sympy.Add(*(count for _, _, count in deeper)))
    borders, inputs = kept_outputs()
    return borders * _term("p2p_bytes") + inputs * alone * _worst(eager, "{x}_input_bytes")


def _of_groups(rows: list[_Row], precision: Precision) -> tuple[tuple[Expr, ...], Expr]:
    """What FSDP2 and a backward pass hold for a while: as it begins, ends, last; what is gathered.

    Groups of parameters: P of a layer, R of both ends (the root). Under ZeRO-3 the root and a layer
    are gathered at all instants, and the next layer beside the one that runs. A layer that runs
    makes gradients in compute precision, beside what the reduction before holds in fp32 (the
    root's: of the micro-batch before; other chunks of the rank hold theirs, too); all of them are
    copied to fp32 when it has run. Gradients of the head wait for those of the embedding. While a
    layer runs backward nothing of the head is kept; at the first layer nothing of others, when the
    root is reduced and when the optimizer streams its states nothing at all.

    Where all forward passes come first there is no gradient when the first backward pass begins;
    all the others hold a micro-batch less, and begin later than it ends. The last one drops the
    gathered parameters of each layer that has run.
    """
    layers = [row for row in rows if row[0].isdigit()]
    root = _of_blocks([row for row in rows if not row[0].isdigit()], "params")
    root -= sym.FIRST * sym.LAST * _term("tied_params")
    every, layer = _of_blocks(layers, "params"), _worst(layers, "{x}_params")
    buffer = _term("buffer_bytes_per_param") * root
    early = (1 - sym.FORWARD_FIRST) * buffer
    first = _running(layers, early, precision) + _worst(layers, "{x}_{level}_kept_bytes")
    reduced = _copied(precision) * root - _next_layer(layers)
    again = sym.FORWARD_FIRST * (1 - _lone()) * _begins(layers, buffer, precision)
    left = _left("layer_") - sym.FORWARD_FIRST * _lone() * _term("unsharded_bytes_per_param")
    done = sym.larger(reduced, _streamed(rows), again) + _left("") * root
    end = sym.larger(first - left * layer, done) + left * every / sym.CHUNKS
    ends = [row for row in rows if not row[0].isdigit()]
    end -= _total(layers, "kept_bytes") / sym.CHUNKS + _total(ends, "kept_bytes")
    end -= _term("shared_bytes")
    begin = _begins(layers, early, precision)
    split = _split(rows, begin)
    others = (sym.CHUNKS - 1) * _term("buffer_bytes_per_param") * layer
    amid = (1 - sym.FORWARD_FIRST) * (1 - sym.ONE_ROUND) * others
    begin = either(begin + amid, split.begin())
    made = UNMADE_RATIO * _gradients(rows) - _activations(rows)
    fp32 = _term("fp32_bytes_per_param") * layer
    chunks = first + others + (1 - sym.FORWARD_FIRST) * (1 - _term("reduces")) * fp32
    reduced = 2 * fp32 - _term("unsharded_bytes_per_param") * (every + root)
    final = last(begin, chunks=made + chunks, reduced=made + reduced)
    gathered = _term("whole_bytes_per_param") * (root + layer)
    return (begin, either(end + amid, split.end()), final), gathered


def _split(rows: list[_Row], begin: Expr) -> SplitBackward:
    """What a split backward pass holds."""
    layers = [row for row in rows if row[0].isdigit()]
    compute = _term("compute_bytes_per_param")
    return SplitBackward(
        loss=sym.LAST * _term("head_made_bytes"),
        layer=_worst(layers, "{x}_made_bytes"),
        awaited=_of_blocks(layers, "awaited_bytes"),
        head_awaited=sym.LAST * _term("head_awaited_bytes"),
        largest=compute * _worst(layers, "{x}_largest_params"),
        layers=compute * _of_blocks(layers, "params"),
        one=compute * _worst(layers, "{x}_params"),
        head=compute * sym.LAST * _term("head_params"),
        other=begin,
        streamed=_streamed(rows),
    )


def _next_layer(layers: list[_Row]) -> Expr:
    """Bytes of the layer that is gathered ahead."""
    return _term("whole_bytes_per_param") * _worst(layers, "{x}_params")


def _begins(layers: list[_Row], buffer: Expr, precision: Precision) -> Expr:
    """What a backward pass holds as it begins: in the loss, then in the first layer it runs."""
    apart = _apart(precision)
    loss = _made_in([("head", "eager", sym.LAST)], apart) + sym.LAST * buffer
    no_head = sym.LAST * _term("head_eager_kept_bytes")
    return sym.larger(0, loss, _running(layers, buffer, precision) - no_head)


def _running(layers: list[_Row], buffer: Expr, precision: Precision) -> Expr:
    """What the worst layer that runs backward holds, then its gradients as they are copied."""
    params, apart = _worst(layers, "{x}_params"), _apart(precision)
    fp32 = _term("fp32_bytes_per_param")
    reduces = sym.larger(_term("buffer_bytes_per_param"), _lone() * fp32)
    runs = _made_in(layers, apart) + sym.larger(reduces * params, buffer)
    wait = apart * _term("compute_bytes_per_param") * sym.LAST * _term("head_params")
    return sym.larger(runs, _copied(precision) * params) + wait + _next_layer(layers)


def _made_in(rows: list[_Row], apart: Expr) -> Expr:
    """What the backward pass of the worst block makes, gradients included.

    Where they are added to those of the micro-batch before at once, one tensor's at a time.
    """
    running = _worst(rows, "{x}_{level}_running_bytes")
    if apart == 1:
        return running
    added = _term("compute_bytes_per_param") * _worst(rows, "{x}_largest_params")
    return apart * running + (1 - apart) * (_worst(rows, "{x}_{level}_working_bytes") + added)


def _apart(precision: Precision) -> Expr:
    """1 where a layer's gradients are not added at once to those of the micro-batch before.

    They are where both are fp32 and no reduction takes them.
    """
    if precision is not Precision.FP32:
        return _ONE
    return sym.larger(_term("reduces"), sym.FORWARD_FIRST)


def _copied(precision: Precision) -> Expr:
    """Bytes per parameter of gradients and of the fp32 copy that a reduction or a sum begins with.

    Later micro-batches add to that copy where nothing is reduced.
    """
    copies = sym.larger(_term("reduces"), sym.FORWARD_FIRST) * _term("fp32_bytes_per_param")
    return _apart(precision) * _term("compute_bytes_per_param") + copies


def _left(which: str) -> Expr:
    """Bytes per parameter of gradients that the first backward pass leaves on the device."""
    left, amid = (_term(f"{which}{name}_bytes_per_param") for name in ("left", "grads"))
    return sym.FORWARD_FIRST * (_lone() * left + (1 - _lone()) * amid)


def _streamed(rows: list[_Row]) -> Expr:
    """What the optimizer has on its way: buckets, of one parameter at least; no more than there is.

    That is taken of all layers of the model, so that memory stays a straight line in the stage's.
    """
    layers = [row for row in rows if row[0].isdigit()]
    ends = [row for row in rows if not row[0].isdigit()]
    bucket = sym.larger(_term("bucket_params"), _worst(layers, "{x}_largest_params"))
    streamed = sym.larger(
        _term("streamed_bytes_per_param") * bucket,
        _term("streamed_end_bytes_per_param") * _worst(ends, "{x}_largest_params"),
    )
    hosted = (_term("all_layers_params") + _of_blocks(ends, "params")) * _term(
        "hosted_bytes_per_param"
    )
    hosted += _term("all_layers_params") * _term("hosted_layer_bytes_per_param")
    return sym.smaller(streamed, hosted)


def _lone() -> Expr:
    """1 where a step has one micro-batch, else 0."""
    return 1 - sym.smaller(1, sym.NUM_MICRO_BATCHES - 1)


def _gradients(rows: list[_Row]) -> Expr:
    """Bytes of gradients on the device amid a step."""
    layers = _of_blocks([row for row in rows if row[0].isdigit()], "params")
    ends = _params(rows) - layers
    return layers * _term("layer_grads_bytes_per_param") + ends * _term("grads_bytes_per_param")


def _params(rows: list[_Row]) -> Expr:
    """Parameters of the stage on a rank; a tied one that both ends have counts once."""
    return _of_blocks(rows, "params") - sym.FIRST * sym.LAST * _term("tied_params")


def _hosted_bytes(rows: list[_Row]) -> Expr:
    """States in host memory: weights and gradients of layers, optimizer states of all blocks."""
    layers = _of_blocks([row for row in rows if row[0].isdigit()], "params")
    return layers * _term("hosted_layer_bytes_per_param") + _params(rows) * _term(
        "hosted_bytes_per_param"
    )


def _host_bytes(rows: list[_Row]) -> Expr:
    """What one rank keeps in host memory."""
    return _hosted_bytes(rows) + sym.IN_FLIGHT * _total(rows, "host_bytes")


def _worst(rows: Iterable[_Row], template: str) -> Expr:
    """The largest of a term over the blocks that the stage has at all."""
    present = [
        sym.smaller(1, count) * _term(template.format(x=x, level=level)) for x, level, count in rows
    ]
    return sym.larger(*present)
