"""Stage cost: time and memory of a pipeline stage as expressions (docs/cost-model.md).

Two levels, so that a search pays for each only where it varies:

*terms*, functions of the strategy (b, t, dp, zero, in-node share of the data-parallel group): for
each block x and memory level, seconds of one micro-batch by part, and bytes;
*stage*, functions of the terms and of the layout (layers of each kind and level, position):

    stable_s = sum over layers of (compute + tp + recompute + launch + dp) + ends + p2p
    lone_s   = the same in the first forward and last backward + exposed collectives + optimizer
    peak     = states + kept * in_flight + working set of the worst block + gathered copies

Slots (first forward, other forwards, other backwards, last backward) overlap compute C with
data-parallel collectives M by the platform's law `together_s`. A layer is never faster
than the host launches it: C = max(device, host). Formulas: Mist (EuroSys'25) section 4; collectives
by ZeRO level as FSDP2 issues them (profiles/runtimes).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import sympy
from sympy import Expr

from mist.facts import Traffic
from mist.graph import ModelGraph, T
from mist.platform.runtime import Runtime
from mist.spec import Precision
from mist.symbolic import symbols as sym
from mist.symbolic.block import BlockCost, Setting, embed_cost, head_cost, kept_bytes, layer_cost
from mist.symbolic.program import TIME_PARTS

_NONE = sympy.Integer(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Named expressions: `costs` of blocks and `terms` of costs, both of the strategy; `stage`.

    A `term_x` in `stage` is the term x, a `cost_x` in `terms` is the cost x.
    """

    num_kinds: int
    costs: Mapping[str, Expr]
    terms: Mapping[str, Expr]
    stage: Mapping[str, Expr]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slots:
    """Seconds of one layer and micro-batch by part; `lone_dp` is `dp` of a lone micro-batch."""

    compute: Expr
    tp: Expr
    recompute: Expr
    launch: Expr
    dp: Expr
    lone_dp: Expr

    def stable(self) -> Expr:
        return self.compute + self.tp + self.recompute + self.launch + self.dp

    def lone(self) -> Expr:
        return self.stable() - self.dp + self.lone_dp


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
    return StageCost(
        num_kinds=len(graph.blocks),
        costs=costs,
        terms=terms,
        stage=_stage(len(graph.blocks), runtime),
    )


def _block_terms(name: str, cost: BlockCost, setting: Setting) -> dict[str, Expr]:
    """Terms of one block; the embedding and the head are never recomputed."""
    terms = {
        f"{name}_params": cost.params,
        f"{name}_saved_bytes": cost.saved_bytes,
        f"{name}_boundary_bytes": cost.boundary_bytes,
        f"{name}_eager_working_bytes": cost.transient_bytes,
        f"{name}_full_working_bytes": cost.saved_bytes + cost.transient_bytes,
        f"{name}_optimizer_s": _optimizer_seconds(cost.params, setting.runtime),
        f"{name}_ends_s": _ends_seconds(cost),
    }
    for level in ("eager", "full") if _is_layer(name) else ("eager",):
        slots = _slots(cost, setting, recompute=level == "full", hosted=_is_layer(name))
        for part in TIME_PARTS[:-1]:
            terms[f"{name}_{level}_{part}_s"] = getattr(slots, part)
        terms[f"{name}_{level}_stable_s"] = slots.stable()
        terms[f"{name}_{level}_lone_s"] = slots.lone()
    return terms


def _is_layer(name: str) -> bool:
    return name.isdigit()


def _slots(cost: BlockCost, setting: Setting, *, recompute: bool, hosted: bool) -> _Slots:
    """The four slots of a layer, summed into a stable and a lone micro-batch."""
    again = int(recompute)
    device_forward = cost.forward_s + cost.tp_forward_s
    device_backward = cost.backward_s + cost.tp_backward_s
    device_again = again * (cost.recompute_s + cost.tp_recompute_s)
    host_forward, host_backward = _host_seconds(setting.runtime) if hosted else (0, 0)
    launch_forward = sym.larger(0, host_forward - device_forward)
    device_late = device_backward + device_again
    launch_backward = sym.larger(0, host_backward + again * host_forward - device_late)
    forward, backward = device_forward + launch_forward, device_late + launch_backward
    exposed = partial(_exposed, setting.runtime)
    from_1, from_2, from_3 = (_at_least(level) for level in (1, 2, 3))
    return _Slots(
        compute=cost.forward_s + cost.backward_s,
        tp=cost.tp_forward_s + cost.tp_backward_s,
        recompute=device_again,
        launch=launch_forward + launch_backward,
        dp=exposed(forward, cost, gathers=from_3)
        + exposed(backward, cost, gathers=from_3, scatters=from_2),
        lone_dp=exposed(forward, cost, gathers=from_1)
        + exposed(backward, cost, gathers=from_3, scatters=from_1, reduces=1 - from_1),
    )


def _at_least(level: int) -> Expr:
    """1 from this ZeRO level on, else 0."""
    return sympy.Piecewise((1, sym.ZERO >= level), (0, True))


def _exposed(  # noqa: PLR0913 - three kinds of collectives
    runtime: Runtime,
    compute: Expr,
    cost: BlockCost,
    *,
    gathers: Expr = _NONE,
    scatters: Expr = _NONE,
    reduces: Expr = _NONE,
) -> Expr:
    """What data-parallel collectives (each 0 or 1 times) add to the compute of a slot.

    Copies out of and into their buffers are work of the device; the collectives themselves overlap
    with it, overlap(C, M) - C, or stand alone where the runtime runs nothing beside them.
    """
    copies = gathers * cost.gather_copy_s + scatters * cost.scatter_copy_s
    overlap = runtime.overlap
    rows = (
        (gathers * cost.gather_s, overlap.zero_all_gather_ratio.value),
        (scatters * cost.scatter_s, overlap.zero_reduce_scatter_ratio.value),
        (reduces * cost.reduce_s, overlap.gradient_all_reduce_ratio.value),
    )
    beside = sympy.Add(*(ratio * seconds for seconds, ratio in rows if ratio))
    alone = sympy.Add(*((1 - ratio) * seconds for seconds, ratio in rows if ratio < 1))
    busy = compute + copies
    return copies + alone + (sym.TOGETHER(busy, beside) - busy if beside != 0 else 0)


def _host_seconds(runtime: Runtime) -> tuple[Expr, Expr]:
    """Seconds in which the host launches a layer forward and backward; more with t > 1."""
    host = runtime.host
    across = host.pipeline_launch_s.value * T**host.pipeline_launch_exponent.value
    launch = host.tensor_parallel_launch_s.value + sym.PIPELINED * across
    extra = sympy.Piecewise((launch, T > 1), (0, True))
    layer = host.layer_launch_s.value + extra
    forward = host.forward_ratio.value
    return forward * layer, (1 - forward) * layer


def _ends_seconds(cost: BlockCost) -> Expr:
    """At the two ends of a step the collectives of one block have nothing to run beside."""
    sharded = _at_least(1)
    return sharded * (cost.gather_s + cost.scatter_s) + (1 - sharded) * cost.reduce_s


def _optimizer_seconds(params: Expr, runtime: Runtime) -> Expr:
    """Adam reads and writes its states once per step, divided among ranks from ZeRO-1 on.

    The unsharded copy that it also writes is gone under ZeRO-3.
    """
    traffic = runtime.traffic
    owned = sympy.Piecewise((params, sym.ZERO < 1), (params / sym.DP, True))
    moved = (
        owned * traffic.optimizer_sharded_bytes_per_param.value
        + params * traffic.optimizer_replicated_bytes_per_param.value * (1 - _at_least(3))
    )
    return sym.MEMORY[Traffic.POINTWISE](moved, 1)


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
        "gathered_bytes_per_param": _gathered_bytes(setting.runtime, setting.precision),
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
    return sym.by_zero(replicated) + sym.by_zero(sharded) / sym.DP


def _gathered_bytes(runtime: Runtime, precision: Precision) -> Expr:
    """Bytes per parameter of one group in passing: gathered copies, gradients being reduced."""
    reducing = runtime.reduce_bytes[precision].value
    gathered = runtime.transients.num_gathered_groups.value * precision.num_bytes
    by_level = {int(z): reducing + (gathered if z == 3 else 0) for z in runtime.knobs.zero_levels}
    return sym.by_zero(by_level)


def _stage(num_kinds: int, runtime: Runtime) -> dict[str, Expr]:
    """Sums over the layers of the stage: every count and position times its term."""
    rows = list(_rows(num_kinds))
    parts = {f"{part}_s": _total(rows, f"{part}_s") for part in TIME_PARTS if part != "p2p"}
    parts |= {"p2p_s": _p2p()}
    each = runtime.host.micro_batch_launch_s.value
    parts["launch_s"] += each
    optimizer = sympy.Add(*(count * _term(f"{x}_optimizer_s") for x, _, count in rows))
    layers = [row for row in rows if _is_layer(row[0])]
    lone_end = _worst(layers, "{x}_ends_s") + optimizer + _tied_reduce()
    lone_end += runtime.host.step_s.value
    memory = _memory(rows, runtime)
    return {
        **parts,
        "stable_s": _total(rows, "stable_s") + _p2p() + each,
        "lone_s": _total(rows, "lone_s") + _p2p() + each + lone_end,
        **{f"{part}_bytes": expr for part, expr in memory.items()},
        "peak_bytes": sympy.Add(*memory.values()),
    }


_Row = tuple[str, str, Expr]


def _rows(num_kinds: int) -> Iterable[_Row]:
    """Every (block, level, how many of it the stage has)."""
    for kind in range(num_kinds):
        yield str(kind), "eager", sym.eager_count(kind)
        yield str(kind), "full", sym.full_count(kind)
    yield "embed", "eager", sym.FIRST
    yield "head", "eager", sym.LAST


def _term(name: str) -> sympy.Symbol:
    """The symbol by which a stage formula names a term."""
    return sympy.Symbol(f"term_{name}", real=True)


def _total(rows: Iterable[_Row], name: str) -> Expr:
    return sympy.Add(*(count * _term(f"{x}_{level}_{name}") for x, level, count in rows))


def _p2p() -> Expr:
    """Each stage sends its output forward and its input's gradient back, once per micro-batch."""
    in_node, cross = _term("p2p_in_node_s"), _term("p2p_cross_s")
    to_next = in_node + sym.NEXT_CROSSES * (cross - in_node)
    to_prev = in_node + sym.PREV_CROSSES * (cross - in_node)
    return (1 - sym.LAST) * to_next + (1 - sym.FIRST) * to_prev


def _tied_reduce() -> Expr:
    """A tied embedding on two stages exchanges its gradient once per step."""
    in_node, cross = _term("tied_reduce_in_node_s"), _term("tied_reduce_cross_s")
    at_one_end = sym.FIRST + sym.LAST - 2 * sym.FIRST * sym.LAST
    return at_one_end * (in_node + sym.SPANS_NODES * (cross - in_node))


def _memory(rows: list[_Row], runtime: Runtime) -> dict[str, Expr]:
    """Peak bytes by part; the parts sum to the peak.

    Torch's PipelineStage allocates the receive buffers of every micro-batch, both ways, and keeps
    the outputs of those in flight; others receive into one buffer each way.
    """
    params = sympy.Add(*(count * _term(f"{x}_params") for x, _, count in rows))
    params -= sym.FIRST * sym.LAST * _term("tied_params")
    kept = sympy.Add(*(count * _term(_kept_name(x, level)) for x, level, count in rows))
    ahead = runtime.memory.receives_all_ahead
    received = (1 - sym.FIRST) + (1 - sym.LAST)
    received *= sym.NUM_MICRO_BATCHES if ahead else 1
    sent = sym.IN_FLIGHT * (1 - sym.LAST) if ahead else _NONE
    own = runtime.memory.fixed_bytes.value
    own += runtime.memory.buffer_ratio.value * _term("activation_bytes")
    parts = {
        "states": params * _term("state_bytes_per_param"),
        "activations": sym.IN_FLIGHT * (kept + _term("shared_bytes")),
        "working": _worst(rows, "{x}_{level}_working_bytes"),
        "gathered": _term("gathered_bytes_per_param") * _worst(rows, "{x}_params"),
        "buffers": (received + sent) * _term("p2p_bytes") + own,
    }
    overhead = runtime.memory.allocator_overhead_ratio.value
    return parts | {"allocator": overhead * sympy.Add(*parts.values())}


def _kept_name(name: str, level: str) -> str:
    return f"{name}_boundary_bytes" if level == "full" else f"{name}_saved_bytes"


def _worst(rows: Iterable[_Row], template: str) -> Expr:
    """The largest of a term over the blocks that the stage has at all."""
    present = [
        sym.smaller(1, count) * _term(template.format(x=x, level=level)) for x, level, count in rows
    ]
    return sym.larger(*present)
