"""What states and groups of parameters take, in bytes per parameter, by ZeRO level.

Bytes of states are sums over the runtime's table of items (`mist.platform.states`).
"""

from collections.abc import Iterable, Iterator

import sympy
from sympy import Expr

from mist.plans.workload import Precision
from mist.platform.states import StateItem, StateSum, sum_states
from mist.symbolic import symbols as sym
from mist.symbolic.cost_setting import CostSetting


def state_bytes(setting: CostSetting, *, frozen: bool = False) -> Expr:
    """Bytes per parameter that live through the step; `frozen`: of one that is not trained."""
    return sym.by_zero({zero: _on_rank(each) for zero, each in _sums(setting, frozen=frozen)})


def hosted_bytes(setting: CostSetting, state: str, params: Expr) -> Expr:
    """Bytes of "weights", "grads" or "optimizer" of `params` that a rank can offload."""
    items = setting.runtime.hosted_items(state)
    if not items:
        return sympy.Integer(0)
    sums = _sums(setting, items)
    return sym.by_zero({zero: params * _on_rank(each) for zero, each in sums})


def _sums(
    setting: CostSetting, items: Iterable[StateItem] = StateItem, *, frozen: bool = False
) -> Iterator[tuple[int, StateSum]]:
    """The sums of items at each ZeRO level of the runtime."""
    states = setting.states
    for zero in setting.runtime.knobs.zero_levels:
        yield zero, sum_states(states, zero, items, frozen=frozen)


def _on_rank(each: StateSum) -> Expr:
    # No term where nothing is divided: then levels that are alike become one in an expression.
    return sympy.Float(each.replicated) + (each.sharded / sym.SHARD if each.sharded else 0)


def _all_sharded(each: StateSum) -> StateSum:
    return StateSum(replicated=0.0, sharded=each.replicated + each.sharded)


def hosted_bytes_per_param(setting: CostSetting, state: str, *, frozen: bool = False) -> float:
    """Bytes per parameter of a state in host memory, of all ranks that share it together.

    0 where it never is there; `frozen`: of a parameter that is not trained.
    """
    items, zero = setting.runtime.hosted_items(state), max(setting.runtime.knobs.zero_levels)
    return sum_states(setting.states, zero, items, frozen=frozen).bytes_per_param(1)


def frozen_weight_ratio(setting: CostSetting) -> float:
    """Bytes of what a rank has of a frozen parameter in host memory, of those of a trained one."""
    trained = hosted_bytes_per_param(setting, "weights")
    return hosted_bytes_per_param(setting, "weights", frozen=True) / trained if trained else 1.0


def gathered_bytes(setting: CostSetting) -> Expr:
    """Bytes per parameter of one group in passing: gathered copies, gradients being reduced."""
    runtime, precision = setting.runtime, setting.numerics.compute
    reducing = runtime.reduce_bytes[precision].value
    gathered = runtime.transients.num_gathered_groups.value * precision.num_bytes
    by_level = {int(z): reducing + (gathered if z == 3 else 0) for z in runtime.knobs.zero_levels}
    return sym.by_zero(by_level)


def bytes_by_zero(precision: Precision, *, at_least: int, below: int = 4) -> Expr:
    """Bytes of a number of this precision from a ZeRO level on and below another, else 0."""
    size = precision.num_bytes
    return sym.by_zero({zero: size * (at_least <= zero < below) for zero in range(4)})


def gradient_terms(setting: CostSetting) -> dict[str, Expr]:
    """Gradients per parameter on the device between two micro-batches, and behind the last.

    Between micro-batches they are whole below ZeRO-2, since nothing was reduced yet. Behind the
    last one ZeRO-1 has reduced them to shards, too. Only gradients of layers are offloaded.
    """
    sums = dict(_sums(setting, (StateItem.GRADIENTS,)))
    between = sym.by_zero({zero: _on_rank(each) for zero, each in sums.items()})
    reduced = {zero: each if zero < 1 else _all_sharded(each) for zero, each in sums.items()}
    behind = sym.by_zero({zero: _on_rank(each) for zero, each in reduced.items()})
    on_device = 1 - sym.OFFLOAD["grads"]
    return {
        "grads_bytes_per_param": between,
        "layer_grads_bytes_per_param": on_device * between,
        "last_grads_bytes_per_param": behind,
        "layer_last_grads_bytes_per_param": on_device * behind,
    }


def bucket_params(setting: CostSetting) -> Expr:
    """Parameters whose shards fill a bucket of the optimizer's stream."""
    offload = setting.runtime.offload
    if offload is None or offload.bucket_bytes is None:
        return sympy.Float(0.0)
    shard = sympy.Float(offload.bucket_bytes.value / setting.numerics.parameters.num_bytes)
    return sympy.Piecewise((shard, sym.ZERO < 1), (shard * sym.SHARD, True))
