"""Time of a layer and micro-batch: four slots, each of streams that run at once.

A slot is the first forward, any other forward, any other backward or the last backward of a step.
With compute C (device or host, whichever is longer), data-parallel collectives M, copies to the
device I and to the host O, a slot takes

    alone + together_s(C + copies of flat buffers, M, I, O)

where `alone` are collectives that the runtime runs beside nothing. Which collectives a slot has
follows from the ZeRO level; what is copied, from the offload ratios: weights come before their
gather, gradients go after their reduction (and come again to be added to), activations go forward
and come back backward. Mist (EuroSys'25) section 4; collectives as FSDP2 issues them.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import sympy
from sympy import Expr

from mist.model.graph import Param, T
from mist.model.summary import Traffic
from mist.plans.workload import Precision
from mist.platform.runtime import HostedState, Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import BlockCost, CostSetting, rank_numbers

_NONE = sympy.Integer(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What a memory level does to a block.

    `again_s`: device seconds that it runs again, collectives included; `again_ratio`: share of the
    forward launches that the host repeats; `kept_bytes`: what stays from forward to backward;
    `working_bytes`: what the backward pass holds beyond that; `running_bytes`: with the gradients
    of parameters made so far, `adding_bytes`: with those just made; `allocated_bytes`: what is
    kept, as host memory is allocated for it.
    """

    name: str
    again_s: Expr
    again_ratio: Expr | float
    kept_bytes: Expr
    working_bytes: Expr
    running_bytes: Expr
    adding_bytes: Expr
    allocated_bytes: Expr


def levels(cost: BlockCost, runtime: Runtime, *, is_layer: bool) -> tuple[Level, ...]:
    """The levels of a block, from most kept to least; the ends of a model keep everything."""
    eager = Level(
        name="none",
        again_s=_NONE,
        again_ratio=0.0,
        kept_bytes=cost.saved_bytes,
        working_bytes=cost.transient_bytes,
        running_bytes=cost.transient_with_grads_bytes,
        adding_bytes=cost.transient_adding_bytes,
        allocated_bytes=cost.saved_allocated_bytes,
    )
    full = Level(
        name="full",
        again_s=cost.recompute_s + cost.tp_recompute_s,
        again_ratio=1.0,
        kept_bytes=cost.boundary_bytes,
        working_bytes=cost.saved_bytes + cost.transient_bytes,
        running_bytes=cost.saved_bytes + cost.transient_with_grads_bytes,
        adding_bytes=cost.saved_bytes + cost.transient_adding_bytes,
        allocated_bytes=allocated_bytes(runtime, cost.boundary_bytes),
    )
    if not is_layer:
        return (eager,)
    return (eager, *_selective(cost, runtime, full), full)


def _selective(cost: BlockCost, runtime: Runtime, full: Level) -> tuple[Level, ...]:
    """Selective recomputation as the runtime means it; nothing where it has none."""
    meaning = runtime.selective
    if meaning is None:
        return ()
    ratio: Expr | float
    if meaning.recomputes_attention:
        again_s, ratio = cost.attention_s, cost.attention_ratio
        kept_bytes = cost.saved_bytes - cost.scores_bytes
    elif meaning.kept_ratio is None or meaning.recomputed_ratio is None:
        again_s, ratio = cost.pointwise_s + cost.tp_recompute_s, 1.0
        kept_bytes = cost.boundary_bytes + cost.products_bytes
    else:
        ratio = meaning.recomputed_ratio.value
        again_s = ratio * full.again_s
        kept_bytes = meaning.kept_ratio.value * cost.saved_bytes
    return (
        Level(
            name="selective",
            again_s=again_s,
            again_ratio=ratio,
            kept_bytes=kept_bytes,
            working_bytes=full.working_bytes - kept_bytes,
            running_bytes=full.running_bytes - kept_bytes,
            adding_bytes=full.adding_bytes - kept_bytes,
            allocated_bytes=kept_bytes,  # torch, which rounds, does not offload what it keeps here
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Seconds of one block and micro-batch by part; `lone_*`: of a lone micro-batch."""

    compute: Expr
    tp: Expr
    recompute: Expr
    launch: Expr
    dp: Expr
    offload: Expr
    lone_dp: Expr
    lone_offload: Expr

    def stable(self) -> Expr:
        """Seconds of one micro-batch amid others."""
        return self.compute + self.tp + self.recompute + self.launch + self.dp + self.offload

    def lone(self) -> Expr:
        """Seconds of a micro-batch that is both the first and the last of a step."""
        return self.stable() - self.dp - self.offload + self.lone_dp + self.lone_offload


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Seconds of compute, and how often (0 or 1) each other thing happens beside it."""

    compute: Expr
    gathers: Expr = _NONE
    scatters: Expr = _NONE
    reduces: Expr = _NONE
    weights_come: Expr = _NONE
    grads_come: Expr = _NONE
    grads_go: Expr = _NONE
    saved_come: int = 0
    saved_go: int = 0


def slots(
    cost: BlockCost, level: Level, setting: CostSetting, *, is_layer: bool, goes_back: bool
) -> Slots:
    """The four slots of a block, summed into a stable and a lone micro-batch.

    Without a backward pass (`goes_back`) the host launches none, and gathers nothing for it.
    """
    runtime = setting.runtime
    device_forward = cost.forward_s + cost.tp_forward_s
    device_backward = cost.backward_s + cost.tp_backward_s + level.again_s
    host_forward, host_backward = _host_seconds(runtime) if is_layer else (_NONE, _NONE)
    late = (host_backward + level.again_ratio * host_forward) * int(goes_back)
    ahead = sympy.nsimplify(runtime.host.launch_ahead_ratio.value)
    launch_forward = sym.larger(0, host_forward - ahead * device_forward)
    launch_backward = sym.larger(0, late - ahead * device_backward)
    timed = _Timed(cost=cost, level=level, runtime=runtime, is_layer=is_layer)
    stays = not goes_back or (runtime.transients.root_group and not is_layer)
    stable, lone = sequence(
        device_forward + launch_forward,
        device_backward + launch_backward,
        runtime,
        stays_gathered=stays,
    )
    return Slots(
        compute=cost.forward_s + cost.backward_s,
        tp=cost.tp_forward_s + cost.tp_backward_s,
        recompute=level.again_s,
        launch=launch_forward + launch_backward,
        dp=sympy.Add(*map(timed.exposed, stable)),
        offload=sympy.Add(*map(timed.copied, stable)),
        lone_dp=sympy.Add(*map(timed.exposed, lone)),
        lone_offload=sympy.Add(*map(timed.copied, lone)),
    )


def sequence(
    forward: Expr, backward: Expr, runtime: Runtime, *, stays_gathered: bool
) -> tuple[tuple[Slot, Slot], tuple[Slot, Slot]]:
    """Forward and backward of a micro-batch amid others, and of a lone one.

    `stays_gathered`: what is gathered for the forward pass serves the backward pass too, if there
    is one.
    """
    from_1, from_2, from_3 = (at_least(zero) for zero in (1, 2, 3))
    again = _NONE if stays_gathered else from_3
    weights, grads = _moves_each(runtime, "weights"), _moves_each(runtime, "grads")
    stable = (
        Slot(compute=forward, gathers=from_3, weights_come=weights, saved_go=1),
        Slot(
            compute=backward,
            gathers=again,
            scatters=from_2,
            weights_come=weights,
            grads_come=grads,
            grads_go=grads,
            saved_come=1,
        ),
    )
    lone = (
        Slot(compute=forward, gathers=from_1, weights_come=sympy.Integer(1), saved_go=1),
        Slot(
            compute=backward,
            gathers=again,
            scatters=from_1,
            reduces=sympy.Integer(1),
            weights_come=weights,
            grads_come=grads,
            grads_go=sympy.Integer(1),
            saved_come=1,
        ),
    )
    return stable, lone


def _moves_each(runtime: Runtime, state: str) -> Expr:
    """1 where an offloaded state moves in every micro-batch, else 0."""
    hosted = hosted_state(runtime, state)
    if hosted is None or hosted.each_micro_batch_from is None:
        return _NONE
    return at_least(hosted.each_micro_batch_from)


def hosted_state(runtime: Runtime, state: str) -> HostedState | None:
    """Figures of "weights", "grads" or "optimizer" in host memory; None where they never are."""
    return getattr(runtime.offload, state) if runtime.offload else None


def hosted_bytes(runtime: Runtime, state: str, params: Expr) -> Expr:
    """Bytes of one state of `params` parameters that a rank can keep in host memory."""
    hosted = hosted_state(runtime, state)
    if hosted is None:
        return _NONE
    whole = params * hosted.bytes_per_param.value
    return sympy.Piecewise((whole, sym.ZERO < hosted.sharded_from), (whole / sym.SHARD, True))


def hosted_by_tensor(runtime: Runtime, state: str, params: Iterable[Param]) -> Expr:
    """Bytes of one state of these parameters in host memory, as its tensors are allocated there.

    Each is of fp32: a state of 8 bytes per parameter is two tensors of each. Moments, which stay
    there for good, are pinned as they are, and not by torch's allocator.
    """
    hosted = hosted_state(runtime, state)
    if hosted is None:
        return _NONE
    copies = hosted.bytes_per_param.value / Precision.FP32.num_bytes
    total = _NONE
    for numbers, count in Counter(map(rank_numbers, params)).items():
        own = hosted_bytes(runtime, state, numbers)
        each = own / copies
        total += count * copies * (each if state == "optimizer" else allocated_bytes(runtime, each))
    return total


def allocated_bytes(runtime: Runtime, num_bytes: Expr) -> Expr:
    """What a tensor in host memory takes there."""
    offload = runtime.offload
    return sym.PINNED(num_bytes) if offload and offload.pins_each_tensor else num_bytes


def by_ratio(runtime: Runtime, seconds: Callable[[Expr, Expr], Expr]) -> Expr:
    """`seconds` of the shares of weights and gradients in host memory.

    Where whole layers are offloaded: the mean of those that are and those that are not.
    """
    weights, grads = sym.OFFLOAD["weights"], sym.OFFLOAD["grads"]
    if runtime.offload is None:
        return _NONE
    if not runtime.offload.by_layer:
        return seconds(weights, grads)
    one = sympy.Integer(1)
    return (1 - weights) * seconds(_NONE, _NONE) + weights * seconds(one, one)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """What times the slots of one block at one level."""

    cost: BlockCost
    level: Level
    runtime: Runtime
    is_layer: bool

    def exposed(self, slot: Slot) -> Expr:
        """What data-parallel collectives add to the compute of a slot.

        Copies out of and into their buffers are work of the device; the collectives themselves
        overlap with it, or stand alone where the runtime runs nothing beside them.
        """
        busy, beside, alone = self._streams(slot)
        overlapped = sym.TOGETHER(busy, beside) - busy if beside != 0 else _NONE
        return busy - slot.compute + alone + overlapped

    def copied(self, slot: Slot) -> Expr:
        """What copies between device and host add to that."""
        if not self.is_layer or self.runtime.offload is None:
            return _NONE
        busy, beside, _ = self._streams(slot)
        without = sym.TOGETHER(busy, beside) if beside != 0 else busy
        return by_ratio(
            self.runtime,
            lambda weights, grads: (
                sym.TOGETHER(busy, beside, *self._copies(slot, weights, grads)) - without
            ),
        )

    def _streams(self, slot: Slot) -> tuple[Expr, Expr, Expr]:
        """Seconds of the device, of collectives beside it, and of collectives that stand alone."""
        cost, overlap = self.cost, self.runtime.overlap
        rows = (
            (slot.gathers * cost.gather_s, overlap.zero_all_gather_ratio.value),
            (slot.scatters * cost.scatter_s, overlap.zero_reduce_scatter_ratio.value),
            (slot.reduces * cost.reduce_s, overlap.gradient_all_reduce_ratio.value),
        )
        copies = slot.gathers * cost.gather_copy_s + slot.scatters * cost.scatter_copy_s
        beside = sympy.Add(*(ratio * seconds for seconds, ratio in rows if ratio))
        alone = sympy.Add(*((1 - ratio) * seconds for seconds, ratio in rows if ratio < 1))
        return slot.compute + copies, beside, alone

    def _copies(self, slot: Slot, weights: Expr, grads: Expr) -> tuple[Expr, Expr]:
        """Seconds of copies to the device and to the host, by these shares in host memory."""
        cost = self.cost
        weight_bytes = weights * hosted_bytes(self.runtime, "weights", cost.hosted_params)
        grad_bytes = grads * hosted_bytes(self.runtime, "grads", cost.trainable_params)
        saved_bytes = sym.OFFLOAD["activations"] * self.level.kept_bytes
        come = slot.weights_come * weight_bytes + slot.grads_come * grad_bytes
        go = slot.grads_go * grad_bytes
        return (
            sym.TO_DEVICE(come + slot.saved_come * saved_bytes),
            sym.TO_HOST(go + slot.saved_go * saved_bytes),
        )


def at_least(level: int) -> Expr:
    """1 from this ZeRO level on, else 0."""
    return sympy.Piecewise((1, sym.ZERO >= level), (0, True))


def _host_seconds(runtime: Runtime) -> tuple[Expr, Expr]:
    """Seconds in which the host launches a layer forward and backward; more with t > 1."""
    host = runtime.host
    across = host.pipeline_launch_s.value * T**host.pipeline_launch_exponent.value
    launch = host.tensor_parallel_launch_s.value + sym.PIPELINED * across
    extra = sympy.Piecewise((launch, T > 1), (0, True))
    layer = host.layer_launch_s.value + extra
    forward = host.forward_ratio.value
    return forward * layer, (1 - forward) * layer


def ends_seconds(cost: BlockCost, runtime: Runtime) -> Expr:
    """At the two ends of a step the collectives of one block have nothing to run beside.

    Those that the runtime lets nothing run beside stand alone in their slots already.
    """
    overlap, sharded = runtime.overlap, at_least(1)
    gather_s = overlap.zero_all_gather_ratio.value * cost.gather_s
    scatter_s = overlap.zero_reduce_scatter_ratio.value * cost.scatter_s
    reduce_s = overlap.gradient_all_reduce_ratio.value * cost.reduce_s
    return sharded * (gather_s + scatter_s) + reduce_s


def optimizer_seconds(params: Expr, runtime: Runtime, *, is_layer: bool) -> Expr:
    """Adam reads and writes its states once per step, divided among ranks from ZeRO-1 on.

    `params`: those that are trained.
    The unsharded copy that it also writes is gone under ZeRO-3. States in host memory come and go
    beside it.
    """
    traffic = runtime.traffic
    owned = sympy.Piecewise((params, sym.ZERO < 1), (params / sym.SHARD, True))
    moved = (
        owned * traffic.optimizer_sharded_bytes_per_param.value
        + params * traffic.optimizer_replicated_bytes_per_param.value * (1 - at_least(3))
    )
    update_s = sym.MEMORY[Traffic.POINTWISE](moved, 1)
    if runtime.offload is None:
        return update_s
    moments = sym.OFFLOAD["optimizer"] * hosted_bytes(runtime, "optimizer", params)

    def seconds(weights: Expr, grads: Expr) -> Expr:
        weight_bytes = weights * hosted_bytes(runtime, "weights", params)
        grad_bytes = grads * hosted_bytes(runtime, "grads", params)
        come = sym.TO_DEVICE(moments + weight_bytes + grad_bytes)
        return sym.TOGETHER(update_s, 0, come, sym.TO_HOST(moments + weight_bytes))

    return by_ratio(runtime, seconds) if is_layer else seconds(_NONE, _NONE)
