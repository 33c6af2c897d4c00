"""A second cost model, written as a plain simulation: one layer, one slot, one number at a time.

It shares no expression with `mist.symbolic`: it walks the layers of a concrete stage, sizes every
tensor with Python numbers and asks the platform's laws for each operation by itself.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from sympy import Expr

from mist.model.graph import B, Block, ModelGraph, Op, OpKind, S, SavedTensor, T, TensorLayout
from mist.model.summary import Traffic
from mist.plans.numerics import NUMERICS
from mist.plans.workload import Workload
from mist.platform import OpCosts, Platform
from tests.tokens import tokens


@dataclass(frozen=True)
class Rank:
    """One rank's share of the work, and where its stage stands."""

    platform: Platform
    workload: Workload
    micro_batch: int
    tp: int
    dp: int
    zero: int
    stage: int
    num_stages: int
    num_micro_batches: int
    first_device: int
    offload: dict[str, float] = field(default_factory=dict)  # share of each state on the host
    copies: int = 1  # of the states that ZeRO divides

    def share(self, state: str) -> float:
        return self.offload.get(state, 0.0)

    @property
    def laws(self) -> OpCosts:
        p = self.platform
        return OpCosts(
            device=p.device, cluster=p.cluster, runtime=p.runtime, numerics=NUMERICS["bf16"]
        )

    @property
    def sharers(self) -> int:
        """Data-parallel ranks that one copy of divided states is spread over."""
        return self.dp // self.copies

    @property
    def share_group(self) -> tuple[int, int]:
        """They, and how many of them are on one node: every tp-th rank in a row."""
        ranks = [share * self.tp for share in range(self.sharers)]
        return self.sharers, sum(rank < self.platform.gpus_per_node for rank in ranks) or 1

    @property
    def sum_group(self) -> tuple[int, int]:
        """Ranks that add up the same gradients: one of each copy; without ZeRO all of them."""
        apart = self.tp * (self.sharers if self.zero else 1)
        ranks = range(0, self.dp * self.tp, apart)
        return len(ranks), sum(rank < self.platform.gpus_per_node for rank in ranks) or 1

    def own_bytes(self, grads: float) -> float:
        """What of gradients that are summed whole without ZeRO a rank sums with other copies."""
        return grads / self.sharers if self.zero else grads

    def number(self, expr: Expr) -> float:
        return number(expr, self.micro_batch, self.workload.seq_len, self.tp)


@cache
def number(expr: Expr, micro_batch: int, seq_len: int, tp: int) -> float:
    return float(expr.subs({B: micro_batch, S: seq_len, T: tp} | tokens(tp, micro_batch)))


def op_seconds(rank: Rank, block: Block, phase: str) -> float:
    """Every operation of a pass by itself (launch times of memory-bound classes add up)."""
    total = 0.0
    for op in block.ops:
        if op.phase != phase:
            continue
        if op.kind == OpKind.GEMM:
            total += float(rank.laws.gemm_s(*(rank.number(dim) for dim in op.dims)))
        elif op.kind == OpKind.ATTENTION:
            law = (
                rank.laws.attention_forward_s
                if phase == "forward"
                else rank.laws.attention_backward_s
            )
            total += float(law(*(rank.number(dim) for dim in op.dims), int(op.causal)))
        else:
            shares = shares_of_traffic(rank, op)
            if math.isfinite(shares):
                size = rank.number(op.traffic_bytes) / shares
                total += float(rank.laws.memory_s(size, 1, op.traffic))
    return total


def shares_of_traffic(rank: Rank, op: Op) -> float:
    """How many ranks share what an operation moves; no rank moves what one matrix makes."""
    joint = rank.platform.runtime.kernels.joint_columns
    if joint and op.layout == TensorLayout.PARTIAL:
        return math.inf
    # Megatron adds biases to a rank's own tokens, and so sums their gradients over these.
    of_weight = B not in op.written_bytes.free_symbols and op.traffic == Traffic.REDUCTION
    of_bias = of_weight and op.phase == "backward" and op.layout == TensorLayout.GATHERED
    return rank.tp if op.layout == TensorLayout.REPLICATED or (joint and of_bias) else 1


def held_params(rank: Rank, block: Block) -> float:
    return sum(param.numel / (rank.tp if param.sharded else 1) for param in block.params)


def kept_bytes(rank: Rank, block: Block) -> float:
    return rank_bytes(rank, block.saved_single if rank.micro_batch == 1 else block.saved)


def rank_bytes(rank: Rank, saved: tuple[SavedTensor, ...]) -> float:
    return sum(
        rank.number(tensor.bytes) / (rank.tp if tensor.layout == TensorLayout.REPLICATED else 1)
        for tensor in saved
    )


def beside(compute: float, collective: float, gamma: float) -> float:
    """Both at once: compute crawls while the collective runs; whichever is longer decides."""
    overlapped = min(compute, collective)
    return max(compute + gamma * overlapped, collective)


def pass_times(
    rank: Rank, block: Block, activation_bytes: float, *, level: str, is_layer: bool
) -> tuple[float, float]:
    """Seconds of the forward and the backward pass by themselves, device or host."""
    laws, runtime = rank.laws, rank.platform.runtime
    forward, backward = op_seconds(rank, block, "forward"), op_seconds(rank, block, "backward")
    owner = rank.sharers if rank.zero >= 2 else 1
    accumulate = held_params(rank, block) * runtime.traffic.accumulation_bytes_per_param.value
    backward += float(laws.memory_s(accumulate / owner, 1, Traffic.POINTWISE))
    gather = float(laws.all_gather_s(activation_bytes, rank.tp, rank.tp))
    scatter = float(laws.reduce_scatter_s(activation_bytes, rank.tp, rank.tp))
    if rank.tp > 1 and runtime.transients.token_copies:  # of samples beside each other none
        copy_s = float(laws.memory_s(2 * activation_bytes, 1, Traffic.POINTWISE))
        scatter, gather = scatter + copy_s, gather + copy_s * (rank.micro_batch > 1)
    into, out = block.num_entries + block.num_whole, block.num_exits
    pass_s = [forward + into * gather + out * scatter]
    into, out = block.num_exits + block.num_whole, block.num_entries  # backward the other way
    pass_s.append(backward + into * gather + out * scatter)
    host_s = [0.0, 0.0]
    if is_layer:
        host = runtime.host
        launch = host.layer_launch_s.value
        launch += host.tensor_parallel_launch_s.value if rank.tp > 1 else 0.0
        host_s = [launch * host.forward_ratio.value, launch * (1 - host.forward_ratio.value)]
    if level != "none":  # up to the last product, whose result and reduction nobody needs
        again = replace(block, ops=block.ops[: block.num_recomputed_ops])
        if level == "selective":  # products are kept
            rest = tuple(op for op in again.ops if op.kind == OpKind.MEMORY)
            again = replace(again, ops=rest)
        pass_s[1] += op_seconds(rank, again, "forward")
        pass_s[1] += (block.num_entries + block.num_whole) * gather
        pass_s[1] += (block.num_exits - 1) * scatter
        host_s[1] += host_s[0]
    return max(pass_s[0], host_s[0]), max(pass_s[1], host_s[1])


def layer_times(
    rank: Rank, block: Block, activation_bytes: float, *, level: str, is_layer: bool
) -> tuple[float, float]:
    """(stable, lone) seconds of one block: four slots, each against collectives and copies."""
    laws, runtime = rank.laws, rank.platform.runtime
    forward, backward = pass_times(rank, block, activation_bytes, level=level, is_layer=is_layer)
    group, params = rank.share_group, held_params(rank, block)
    seconds = (
        float(laws.all_gather_s(2 * params, *group)),
        float(laws.reduce_scatter_s(4 * params, *group)),
        float(laws.all_reduce_s(rank.own_bytes(4 * params), *rank.sum_group)),
    )
    copy_out = float(laws.memory_s(4 * params, 1, Traffic.POINTWISE))
    copy_in = float(laws.memory_s(6 * params, 1, Traffic.POINTWISE))
    saved = rank.share("activations") * level_bytes(rank, block, activation_bytes / rank.tp)[level]
    saved, away = (saved, rank.share("weights")) if is_layer else (0.0, 0.0)
    weights = 4 * params / (rank.sharers if rank.zero >= 1 else 1)
    grads = 4 * params / (rank.sharers if rank.zero >= 2 else 1)

    def slot(
        compute: float, ops: tuple[bool, bool, bool], saved: tuple[float, float],
        states: tuple[float, float],
    ) -> float:  # fmt: skip
        """`saved`, `states`: bytes that come and that go; those of states where they are away."""
        busy = compute + ops[0] * copy_out + ops[1] * copy_in
        collectives = sum(on * each for on, each in zip(ops, seconds, strict=True))
        base = beside(busy, collectives, runtime.overlap.compute_slowdown_ratio.value)

        def with_states(share: float) -> float:
            come, go = (mine + share * state for mine, state in zip(saved, states, strict=True))
            return max(base, come / device_in(rank), go / device_out(rank))

        return (1 - away) * with_states(0.0) + away * with_states(1.0)

    always, often, once = rank.zero == 3, rank.zero >= 2, rank.zero >= 1
    each_weights, each_grads = weights * always, grads * often
    out, back = (0.0, saved), (saved, 0.0)
    stable = slot(forward, (always, False, False), out, (each_weights, 0.0))
    states = (each_weights + each_grads, each_grads)
    again = always and is_layer  # the ends stay gathered
    stable += slot(backward, (again, often, False), back, states)
    lone = slot(forward, (once, False, False), out, (weights, 0.0))
    states = (each_weights + each_grads, grads)
    return stable, lone + slot(backward, (again, once, rank.sum_group[0] > 1), back, states)


def level_bytes(rank: Rank, block: Block, boundary_bytes: float) -> dict[str, float]:
    """What each memory level keeps of a block."""
    return {
        "none": kept_bytes(rank, block),
        "selective": boundary_bytes + products_bytes(rank, block),
        "full": boundary_bytes,
    }


def device_in(rank: Rank) -> float:
    return rank.platform.device.host_to_device_bytes_per_s.value


def device_out(rank: Rank) -> float:
    return rank.platform.device.device_to_host_bytes_per_s.value


def products_bytes(rank: Rank, block: Block) -> float:
    """Results of the matrix products of the forward pass."""
    return sum(
        rank.number(op.written_bytes)
        for op in block.ops
        if op.phase == "forward" and op.kind != OpKind.MEMORY
    )


@dataclass(frozen=True)
class Predicted:
    stable_s: float
    lone_s: float
    peak_bytes: float
    host_bytes: float


def simulate(rank: Rank, layers: list[tuple[Block, str]], graph: ModelGraph) -> Predicted:
    """One stage: `layers` with their memory level, embedding and head where the stage has them."""
    first, last = rank.stage == 0, rank.stage == rank.num_stages - 1
    activation = rank.number(layers[0][0].boundary_bytes)
    graph = replace(graph, head=_on_all_tokens(graph.head))
    embed, head = graph.embed, graph.head
    ends = ([embed] if first else []) + ([head] if last else [])
    blocks = [(block, level, True) for block, level in layers]
    blocks += [(block, "none", False) for block in ends]
    times = [
        layer_times(rank, block, activation, level=level, is_layer=is_layer)
        for block, level, is_layer in blocks
    ]
    transfers = _transfers(rank, activation / rank.tp)
    stable = sum(t for t, _ in times) + sum(transfers)
    lone = sum(u for _, u in times) + sum(transfers) + _once(rank, blocks, embed, head)
    peak, host = _peak(rank, layers, ends, graph)
    return Predicted(stable, lone, peak, host)


def _transfers(rank: Rank, sent_bytes: float) -> list[float]:
    node = rank.platform.gpus_per_node
    edges = []
    if rank.stage > 0:
        edges.append(rank.first_device)
    if rank.stage < rank.num_stages - 1:
        edges.append(rank.first_device + rank.dp * rank.tp)
    return [float(rank.laws.p2p_s(sent_bytes, int(edge % node == 0))) for edge in edges]


def _once(rank: Rank, blocks: list[tuple[Block, str, bool]], embed: Block, head: Block) -> float:
    """Per step: the ends of the collectives that nothing covers, the optimizer, tied gradients."""
    laws, traffic = rank.laws, rank.platform.runtime.traffic
    group = rank.share_group
    total = 0.0
    for params in {held_params(rank, block) for block, _, is_layer in blocks if is_layer}:
        gather = float(laws.all_gather_s(2 * params, *group))
        scatter = float(laws.reduce_scatter_s(4 * params, *group))
        reduce = float(laws.all_reduce_s(rank.own_bytes(4 * params), *rank.sum_group))
        total = max(total, gather + scatter + reduce if rank.zero else reduce)
    for block, _, is_layer in blocks:
        held = held_params(rank, block)
        owned = held / rank.sharers if rank.zero else held
        moved = owned * traffic.optimizer_sharded_bytes_per_param.value
        if rank.zero < 3:
            moved += held * traffic.optimizer_replicated_bytes_per_param.value
        total += _update(rank, held, float(laws.memory_s(moved, 1, Traffic.POINTWISE)), is_layer)
    tied = sum(param.numel for param in head.params if param.tied) / rank.tp
    if tied and rank.num_stages > 1 and rank.stage in (0, rank.num_stages - 1):
        total += float(laws.p2p_s(4 * tied, int(rank.platform.num_nodes > 1)))
    return total


def _update(rank: Rank, held: float, update_s: float, is_layer: bool) -> float:
    """The optimizer's step of a block, with the states that come and go beside it."""
    owned = held / rank.sharers if rank.zero else held
    grads = 4 * held / (rank.sharers if rank.zero >= 2 else 1)
    moments = rank.share("optimizer") * 8 * owned

    def streamed(come: float, go: float) -> float:
        return max(update_s, come / device_in(rank), go / device_out(rank))

    here = streamed(moments, moments)
    if not is_layer:
        return here
    away = rank.share("weights")
    return (1 - away) * here + away * streamed(moments + 4 * owned + grads, moments + 4 * owned)


def _divided_loss_bytes(rank: Rank, head: Block) -> float:
    """What torch's loss over a divided vocabulary holds more: 4 bytes for each logit of a rank."""
    if rank.tp == 1 or not any(param.sharded for param in head.params):
        return 0.0
    product = [op for op in head.ops if op.kind == OpKind.GEMM and op.phase == "forward"][-1]
    return 4 * math.prod(rank.number(dim) for dim in product.dims[:3])


def _instants(
    rank: Rank,
    layers: list[tuple[Block, str]],
    ends: list[Block],
    working: list[float],
    kept: list[float],
) -> tuple[list[float], list[float], float, float]:
    """Bytes beyond states and kept activations: as a backward pass begins, as it ends; gathered.

    And in the last one of a lone rank, but for what is kept. `working`: with gradients, of layers
    and ends. `kept`: of layers. Those as it ends: at the first layer, then when no layer runs. A
    layer runs when those behind it are gone: of what they kept, the largest, less what this one
    keeps, is not there for certain. Those are of its kind, or of a kind that lies behind all of its
    kind, less the gradients that one leaves.
    """
    left = _left_bytes_per_param(rank)
    gone = [
        max(
            [
                0.0,
                *(kept[j] - kept[i] for j in range(i + 1, len(layers)) if layers[j][0] is block),
                *(
                    kept[j] - left * held_params(rank, layers[j][0]) - kept[i]
                    for j in _all_behind(layers, block)
                ),
            ]
        )
        for i, (block, _) in enumerate(layers)
    ]
    made = max(size - less for size, less in zip(working, gone, strict=False))
    layer = max(held_params(rank, block) for block, _ in layers)
    root = sum(held_params(rank, end) for end in ends)
    if len(ends) == 2:
        root -= sum(param.numel for param in ends[1].params if param.tied) / rank.tp
    head = held_params(rank, ends[-1]) if last_stage(rank) else 0.0
    lone = rank.num_micro_batches == 1
    whole = 2 if rank.zero == 3 else 0
    held = 4 * layer if rank.zero >= 2 or lone else 0.0
    copied = max(6 if rank.zero >= 2 or _forward_first(rank) else 2, _lone_copies(rank))
    boundary = rank.number(layers[0][0].boundary_bytes)

    def running(buffer: float, gone: float = 0.0, behind: float = 0.0) -> float:
        most = max(made + max(held - gone, buffer), copied * layer - behind)
        return most + 2 * head + whole * layer

    def begins(buffer: float) -> list[float]:
        left = _left_bytes_per_param(rank) * layer
        first = running(buffer, max(0.0, min(kept) - left), max(0.0, min(kept) - boundary))
        if not last_stage(rank):
            return [0.0, first]
        loss = working[-1] + buffer
        return [0.0, first - kept_bytes(rank, ends[-1]), loss]

    buffer = 4 * root if rank.zero >= 2 else 0.0
    early = 0.0 if _forward_first(rank) else buffer
    none = [copied * root - whole * layer]
    if _forward_first(rank) and not lone:
        none += begins(buffer)
    end = [running(early, behind=max(0.0, max(kept) - boundary)) + max(kept), max(none)]
    # The last backward pass of a lone rank: its first layer is reduced, its second one runs.
    reduced = 8 * layer + 2 * head - max(0.0, min(kept) - boundary)
    last = max(reduced, running(4 * layer) - min(kept))
    last -= 2 * min(held_params(rank, block) for block, _ in layers)
    return begins(early), end, whole * (root + layer), last


def _all_behind(layers: list[tuple[Block, str]], block: Block) -> list[int]:
    """Layers of the kinds of which all come behind all of this one."""
    last = max(i for i, (each, _) in enumerate(layers) if each is block)
    before = {id(each) for each, _ in layers[: last + 1]}
    return [j for j, (each, _) in enumerate(layers) if id(each) not in before]


def _alone(rank: Rank) -> bool:
    return rank.zero == 0 or rank.sharers == 1


def _lone_copies(rank: Rank) -> float:
    """Input, quotient and output of a reduction over one rank, less what states count or drop."""
    if not _alone(rank):
        return 0.0
    if rank.zero >= 2:
        return 12.0
    if rank.num_micro_batches == 1:
        return 10.0
    return 6.0 if last_stage(rank) and not _forward_first(rank) else 0.0


def _reducing_level(rank: Rank) -> int:
    """The lowest ZeRO level at which the first backward pass of a step leaves shards."""
    return 1 if rank.num_micro_batches == 1 else 2


def _left_bytes_per_param(rank: Rank) -> float:
    """Gradients of a layer behind the first backward pass, where states do not count them."""
    if not _forward_first(rank):
        return 0.0
    shard = rank.sharers if rank.zero >= _reducing_level(rank) else 1
    return (1 - rank.share("grads")) * 4 / shard


def _working(rank: Rank, block: Block, level: str, graph: ModelGraph) -> float:
    """What its backward pass makes, and makes again."""
    most = max(rank.number(expr) for expr in block.transient_with_grads_bytes)
    if block is graph.head:
        most += _divided_loss_bytes(rank, block)
    if level == "selective":
        boundary = rank.number(block.boundary_bytes) / rank.tp
        most -= level_bytes(rank, block, boundary)["selective"]
    return most + (0.0 if level == "none" else kept_bytes(rank, block))


def _in_flight(rank: Rank) -> int:
    return min(rank.num_stages - rank.stage, rank.num_micro_batches)


def _forward_first(rank: Rank) -> bool:
    return _in_flight(rank) == rank.num_micro_batches


def _on_all_tokens(head: Block) -> Block:
    """A head as torch runs it: sequence parallelism ends with the last layer."""

    def whole(rows: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            replace(row, layout=TensorLayout.GATHERED)
            if row.layout == TensorLayout.REPLICATED
            else row
            for row in rows
        )

    return replace(
        head,
        ops=whole(head.ops),
        saved=whole(head.saved),
        saved_single=whole(head.saved_single),
        transient_with_grads_bytes=tuple(
            size.subs(tokens(1, 1)) for size in head.transient_with_grads_bytes
        ),
    )


def last_stage(rank: Rank) -> bool:
    return rank.stage == rank.num_stages - 1


def _all_hosted(
    rank: Rank, ends: list[Block], graph: ModelGraph, streams: dict[str, float]
) -> float:
    """Bytes of states in host memory, were all layers of the model on this stage."""
    kinds = [graph.blocks[kind] for kind in graph.layer_kinds()]
    of_layers = sum(held_params(rank, block) for block in kinds)
    rest = sum(held_params(rank, block) for block in ends)
    bytes_of = {state: size * rank.share(state) for state, size in streams.items()}
    return of_layers * sum(bytes_of.values()) + rest * bytes_of["optimizer"]


def _num_exchanged(rank: Rank, layers: list[tuple[Block, str]]) -> int:
    """Activations at the borders of a stage that it holds.

    Outputs in flight and a gradient received; inputs in flight, and the gradient sent last.
    """
    num = 0 if last_stage(rank) else _in_flight(rank) + 1
    if rank.stage > 0:
        num += 0 if _forward_first(rank) else 1
        if all(level == "none" and not block.keeps_input for block, level in layers):
            num += _in_flight(rank)
    return num


def _state_bytes(rank: Rank) -> float:
    """Bytes per parameter of runtime torch in bf16, as design.md has them."""
    d = rank.sharers
    return (18.0, 12 / d + 2 + 4, 16 / d + 2, 16 / d)[rank.zero]


def _peak(
    rank: Rank,
    layers: list[tuple[Block, str]],
    ends: list[Block],
    graph: ModelGraph,
) -> tuple[float, float]:
    runtime = rank.platform.runtime
    in_flight = _in_flight(rank)
    blocks = [block for block, _ in layers] + ends
    params = sum(held_params(rank, block) for block in blocks)
    if len(ends) == 2:
        params -= sum(param.numel for param in ends[1].params if param.tied) / rank.tp
    of_layers = sum(held_params(rank, block) for block, _ in layers)
    shard, grad_shard = (rank.sharers if rank.zero >= level else 1 for level in (1, 2))
    hosted = of_layers * rank.share("weights") * 4 / shard
    hosted += of_layers * rank.share("grads") * 4 / grad_shard
    hosted += params * rank.share("optimizer") * 8 / shard
    states = params * _state_bytes(rank) - hosted
    boundary = rank.number(layers[0][0].boundary_bytes) / rank.tp
    sizes = [level_bytes(rank, block, boundary)[level] for block, level in layers]
    away = rank.share("activations")
    kept = sum((1 - away) * size for size in sizes)
    kept += sum(kept_bytes(rank, block) for block in ends) + rank_bytes(rank, graph.shared)
    working = [_working(rank, block, level, graph) for block, level in layers]
    working += [_working(rank, end, "none", graph) for end in ends]
    streams = {"weights": 4 / shard, "grads": 4 / grad_shard, "optimizer": 8 / shard}
    streamed = 2 * 2**24 * shard * sum(size for s, size in streams.items() if rank.share(s))
    streamed = min(streamed, _all_hosted(rank, ends, graph, streams))
    stays = 1 - rank.share("grads")
    rest = params - of_layers
    amid = left_layers = left_rest = 0.0
    if _forward_first(rank):
        each = 4 / (rank.sharers if rank.zero >= 2 else 1)
        amid = each * (stays * of_layers + rest)
        left_layers = _left_bytes_per_param(rank)
        left_rest = 4 / (rank.sharers if rank.zero >= _reducing_level(rank) else 1) * rest
        if rank.num_micro_batches == 1 and rank.zero < 3:
            left_layers -= 2
    states -= amid
    on_device = [(1 - away) * size for size in sizes]
    begin, (first, none), gathered, last = _instants(rank, layers, ends, working, on_device)
    biggest = max(held_params(rank, block) for block, _ in layers)
    first += left_layers * (of_layers - biggest)
    none = max(none, streamed) + left_layers * of_layers + left_rest
    idle, waiting = _idle(rank, stays * of_layers + rest)
    flat = 2 * max(rest, biggest) if rank.zero >= 1 else 0.0
    flat -= 2 * biggest if rank.zero == 3 else 0.0  # the layer gathered ahead counts as gathered
    instants = [*(size + idle for size in begin), max(first, none) - kept + waiting]
    if _alone(rank) and rank.zero < 2 and rank.num_micro_batches > 1:
        # In the last backward pass of a step all gradients are there: of its first two layers, then
        # as it ends, without activations.
        head = kept_bytes(rank, ends[-1]) if last_stage(rank) else 0.0
        ends_with = 8 * max(biggest, rest) - 2 * of_layers - in_flight * kept - gathered
        instants += [amid + ends_with, amid + last - head - (in_flight - 1) * kept]
    exchanged = boundary * _num_exchanged(rank, layers)
    buffers = exchanged + 2 * away * max(sizes)
    total = states + in_flight * kept + max(instants) + flat + gathered + buffers
    host = _host(rank, layers, ends, in_flight)
    return total * (1 + runtime.memory.allocator_overhead_ratio.value), host


def _idle(rank: Rank, params: float) -> tuple[float, float]:
    """Reduced gradients, of the step before at least, as a backward pass begins and ends."""
    reduced = 4 / (rank.sharers if rank.zero >= 1 else 1) * params
    begin = reduced if rank.zero < 2 or _forward_first(rank) else 0.0
    return begin, reduced if rank.zero < 2 and rank.num_micro_batches > 1 else 0.0


def pinned(num_bytes: float) -> float:
    """The block that torch's pinned allocator takes for a tensor."""
    return float(1 << (math.ceil(num_bytes) - 1).bit_length())


def _host(rank: Rank, layers: list[tuple[Block, str]], ends: list[Block], in_flight: int) -> float:
    """Host memory, tensor by tensor."""
    shard, grad_shard = (rank.sharers if rank.zero >= level else 1 for level in (1, 2))
    boundary = rank.number(layers[0][0].boundary_bytes) / rank.tp
    total = 0.0
    for block in [block for block, _ in layers] + ends:
        for param in block.params:
            if param.tied and len(ends) == 2:
                continue
            own = 4 * param.numel / (rank.tp if param.sharded else 1)
            total += rank.share("optimizer") * 2 * own / shard
            if block not in ends:
                total += rank.share("weights") * pinned(own / shard)
                total += rank.share("grads") * pinned(own / grad_shard)
    for block, level in layers:
        saved = block.saved_single if rank.micro_batch == 1 else block.saved
        kept = {
            "none": sum(pinned(rank_bytes(rank, (tensor,))) for tensor in saved),
            "selective": level_bytes(rank, block, boundary)["selective"],
            "full": pinned(boundary),
        }
        total += in_flight * rank.share("activations") * kept[level]
    return total
