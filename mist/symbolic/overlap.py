"""Time of a layer and micro-batch: four slots, each of streams that run at once.

A slot is the first forward, any other forward, any other backward or the last backward of a step.
With compute C (device or host, whichever is longer), data-parallel collectives M, copies to the
device I and to the host O, a slot takes

    serial + together_s(C + copies of flat buffers, M, I, O)

where `serial` are collectives that the runtime overlaps with nothing. Which collectives a slot has
follows from the ZeRO level; what is copied, from the offload ratios: weights come before their
gather, gradients go after their reduction (and come again to be added to), activations go forward
and come back backward. Mist (EuroSys'25) section 4; collectives as FSDP2 issues them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import sympy
from sympy import Expr

from mist.model.graph import T
from mist.model.summary import Traffic
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import BlockCost
from mist.symbolic.cost_setting import CostSetting, figure
from mist.symbolic.level_cost import LevelCost
from mist.symbolic.state_bytes import hosted_bytes

_NONE = sympy.Integer(0)


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
    weights_in: Expr = _NONE
    grads_in: Expr = _NONE
    grads_out: Expr = _NONE
    activations_in: int = 0
    activations_out: int = 0


def slots(
    cost: BlockCost, level: LevelCost, setting: CostSetting, *, is_layer: bool, goes_back: bool
) -> Slots:
    """The four slots of a block, summed into a stable and a lone micro-batch.

    Without a backward pass (`goes_back`) the host launches none, and gathers nothing for it.
    """
    runtime = setting.runtime
    device_forward = cost.forward_s + cost.tp_forward_s
    device_backward = cost.backward_s + cost.tp_backward_s + level.recompute_s
    host_forward, host_backward = _host_seconds(runtime) if is_layer else (_NONE, _NONE)
    host_backward += level.recompute_launch_ratio * host_forward
    host_backward *= int(goes_back)
    launch_ahead = sympy.nsimplify(runtime.host.launch_ahead_ratio.value)
    launch_forward = sym.larger(0, host_forward - launch_ahead * device_forward)
    launch_backward = sym.larger(0, host_backward - launch_ahead * device_backward)
    streams = _BlockStreams(cost=cost, level=level, setting=setting, is_layer=is_layer)
    # FSDP2's root is not resharded between its passes (`reshard_after_forward`).
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
        recompute=level.recompute_s,
        launch=launch_forward + launch_backward,
        dp=sympy.Add(*map(streams.exposed_collectives, stable)),
        offload=sympy.Add(*map(streams.exposed_copies, stable)),
        lone_dp=sympy.Add(*map(streams.exposed_collectives, lone)),
        lone_offload=sympy.Add(*map(streams.exposed_copies, lone)),
    )


def sequence(
    forward: Expr, backward: Expr, runtime: Runtime, *, stays_gathered: bool
) -> tuple[tuple[Slot, Slot], tuple[Slot, Slot]]:
    """Forward and backward of a micro-batch amid others, and of a lone one.

    `stays_gathered`: what is gathered for the forward pass serves the backward pass too, if there
    is one.
    """
    from_1, from_2, from_3 = (sym.zero_at_least(zero) for zero in (1, 2, 3))
    again = _NONE if stays_gathered else from_3
    weights, grads = _moves_each(runtime, "weights"), _moves_each(runtime, "grads")
    stable = (
        Slot(compute=forward, gathers=from_3, weights_in=weights, activations_out=1),
        Slot(
            compute=backward,
            gathers=again,
            scatters=from_2,
            weights_in=weights,
            grads_in=grads,
            grads_out=grads,
            activations_in=1,
        ),
    )
    lone = (
        # Offloaded weights that do not move each micro-batch come once: for the first forward pass.
        Slot(compute=forward, gathers=from_1, weights_in=sympy.Integer(1), activations_out=1),
        Slot(
            compute=backward,
            gathers=again,
            scatters=from_1,
            reduces=sympy.Integer(1),
            weights_in=weights,
            grads_in=grads,
            grads_out=sympy.Integer(1),
            activations_in=1,
        ),
    )
    return stable, lone


def _moves_each(runtime: Runtime, state: str) -> Expr:
    """1 where an offloaded state moves in every micro-batch, else 0."""
    hosted = runtime.hosted(state)
    if hosted is None or hosted.each_micro_batch_from is None:
        return _NONE
    return sym.zero_at_least(hosted.each_micro_batch_from)


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
class _BlockStreams:
    """The streams of the slots of one block at one memory level."""

    cost: BlockCost
    level: LevelCost
    setting: CostSetting
    is_layer: bool

    def exposed_collectives(self, slot: Slot) -> Expr:
        """Seconds that data-parallel collectives add to the compute of a slot.

        Copies out of and into their buffers are work of the device; the collectives themselves
        overlap with it, or run alone where the runtime runs nothing at the same time.
        """
        device, concurrent, serial = self._device_streams(slot)
        overlap = sym.TOGETHER(device, concurrent) - device if concurrent != 0 else _NONE
        return device - slot.compute + serial + overlap

    def exposed_copies(self, slot: Slot) -> Expr:
        """Seconds that copies between device and host add to that."""
        if not self.is_layer or self.setting.runtime.offload is None:
            return _NONE
        device, concurrent, _ = self._device_streams(slot)
        without = sym.TOGETHER(device, concurrent) if concurrent != 0 else device
        return by_ratio(
            self.setting.runtime,
            lambda weights, grads: (
                sym.TOGETHER(device, concurrent, *self._host_streams(slot, weights, grads))
                - without
            ),
        )

    def _device_streams(self, slot: Slot) -> tuple[Expr, Expr, Expr]:
        """Seconds of the device, of collectives that overlap with it, and of those that do not."""
        cost, overlap = self.cost, self.setting.runtime.overlap
        rows = (
            (slot.gathers * cost.gather_s, overlap.zero_all_gather_ratio.value),
            (slot.scatters * cost.scatter_s, overlap.zero_reduce_scatter_ratio.value),
            (slot.reduces * cost.reduce_s, overlap.gradient_all_reduce_ratio.value),
        )
        copies = slot.gathers * cost.gather_copy_s + slot.scatters * cost.scatter_copy_s
        concurrent = sympy.Add(*(ratio * seconds for seconds, ratio in rows if ratio))
        serial = sympy.Add(*((1 - ratio) * seconds for seconds, ratio in rows if ratio < 1))
        return slot.compute + copies, concurrent, serial

    def _host_streams(self, slot: Slot, weights: Expr, grads: Expr) -> tuple[Expr, Expr]:
        """Seconds of copies to the device and to the host, by these shares in host memory."""
        cost = self.cost
        weight_bytes = weights * hosted_bytes(self.setting, "weights", cost.hosted_params)
        grad_bytes = grads * hosted_bytes(self.setting, "grads", cost.trainable_params)
        activation_bytes = sym.OFFLOAD["activations"] * self.level.kept_bytes
        to_device = slot.weights_in * weight_bytes + slot.grads_in * grad_bytes
        to_host = slot.grads_out * grad_bytes
        return (
            sym.TO_DEVICE(to_device + slot.activations_in * activation_bytes),
            sym.TO_HOST(to_host + slot.activations_out * activation_bytes),
        )


def _host_seconds(runtime: Runtime) -> tuple[Expr, Expr]:
    """Seconds in which the host launches a layer forward and backward; more with t > 1."""
    host = runtime.host
    across = figure(runtime, "host.pipeline_launch_s") * T**host.pipeline_launch_exponent.value
    launch = figure(runtime, "host.tensor_parallel_launch_s") + sym.PIPELINED * across
    extra = sympy.Piecewise((launch, T > 1), (0, True))
    layer = figure(runtime, "host.layer_launch_s") + extra
    forward = host.forward_ratio.value
    return forward * layer, (1 - forward) * layer


def ends_seconds(cost: BlockCost, runtime: Runtime) -> Expr:
    """At the two ends of a step the collectives of one block have nothing to run beside.

    Those that the runtime lets nothing run beside stand alone in their slots already.
    """
    overlap, sharded = runtime.overlap, sym.zero_at_least(1)
    gather_s = overlap.zero_all_gather_ratio.value * cost.gather_s
    scatter_s = overlap.zero_reduce_scatter_ratio.value * cost.scatter_s
    reduce_s = overlap.gradient_all_reduce_ratio.value * cost.reduce_s
    return sharded * (gather_s + scatter_s) + reduce_s


def optimizer_seconds(params: Expr, setting: CostSetting, *, is_layer: bool) -> Expr:
    """Adam reads and writes its states once per step, divided among ranks from ZeRO-1 on.

    `params`: those that are trained.
    The unsharded copy that it also writes is gone under ZeRO-3. States in host memory come and go
    beside it.
    """
    runtime, traffic = setting.runtime, setting.runtime.traffic
    owned = sympy.Piecewise((params, sym.ZERO < 1), (params / sym.SHARD, True))
    moved = (
        owned * traffic.optimizer_sharded_bytes_per_param.value
        + params * traffic.optimizer_replicated_bytes_per_param.value * (1 - sym.zero_at_least(3))
    )
    update_s = sym.MEMORY[Traffic.POINTWISE](moved, 1)
    if runtime.offload is None:
        return update_s
    moments = sym.OFFLOAD["optimizer"] * hosted_bytes(setting, "optimizer", params)

    def seconds(weights: Expr, grads: Expr) -> Expr:
        weight_bytes = weights * hosted_bytes(setting, "weights", params)
        grad_bytes = grads * hosted_bytes(setting, "grads", params)
        to_device = sym.TO_DEVICE(moments + weight_bytes + grad_bytes)
        return sym.TOGETHER(update_s, 0, to_device, sym.TO_HOST(moments + weight_bytes))

    # Of embedding and head only the moments go to host memory, never weights or gradients.
    return by_ratio(runtime, seconds) if is_layer else seconds(_NONE, _NONE)
