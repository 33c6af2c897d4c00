"""What states and groups of parameters take, in bytes per parameter, by ZeRO level."""

from typing import Final

import sympy
from sympy import Expr

from mist.plans.workload import Precision
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym

FP32_BYTES: Final = Precision.FP32.num_bytes  # of a parameter
GRADIENT_BYTES: Final = Precision.FP32.num_bytes  # as FSDP reduces them
MOMENTS_BYTES: Final = 2 * Precision.FP32.num_bytes  # both of AdamW


def state_bytes(runtime: Runtime, precision: Precision) -> Expr:
    """Bytes per parameter that live through the step: parameters, gradients, moments."""
    rows = {int(zero): runtime.state(precision, zero) for zero in runtime.knobs.zero_levels}
    replicated = {zero: row.replicated_bytes_per_param.value for zero, row in rows.items()}
    sharded = {zero: row.sharded_bytes_per_param.value for zero, row in rows.items()}
    return sym.by_zero(replicated) + sym.by_zero(sharded) / sym.SHARD


def frozen_bytes(runtime: Runtime, precision: Precision) -> Expr:
    """Bytes per parameter that is not trained.

    Its own part, whole without ZeRO, and what its row has beside gradients (whole below ZeRO-2),
    moments and fp32 parameters (whole without ZeRO): the copy in compute precision. Frameworks
    whose optimizer makes fp32 copies of what it trains keep the compute copy only.
    """
    own = runtime.frozen_shard_bytes_per_param
    if own is None:
        whole = sympy.Float(precision.num_bytes)
        return sympy.Piecewise((whole, sym.ZERO < 3), (whole / sym.SHARD, True))
    copies = {}
    for level in runtime.knobs.zero_levels:
        zero, row = int(level), runtime.state(precision, level)
        trained = GRADIENT_BYTES * (zero < 2) + (FP32_BYTES + MOMENTS_BYTES) * (zero < 1)
        copies[zero] = row.replicated_bytes_per_param.value - trained
    part = sympy.Float(own[precision].value)
    return sym.by_zero(copies) + sympy.Piecewise((part, sym.ZERO < 1), (part / sym.SHARD, True))


def frozen_weight_ratio(runtime: Runtime, precision: Precision) -> float:
    """Bytes of what a rank has of a frozen parameter in host memory, of those of a trained one."""
    own = runtime.frozen_shard_bytes_per_param
    hosted = runtime.offload.weights if runtime.offload else None
    if own is None or hosted is None:
        return 1.0
    return own[precision].value / hosted.bytes_per_param.value


def gathered_bytes(runtime: Runtime, precision: Precision) -> Expr:
    """Bytes per parameter of one group in passing: gathered copies, gradients being reduced."""
    reducing = runtime.reduce_bytes[precision].value
    gathered = runtime.transients.num_gathered_groups.value * precision.num_bytes
    by_level = {int(z): reducing + (gathered if z == 3 else 0) for z in runtime.knobs.zero_levels}
    return sym.by_zero(by_level)


def bytes_by_zero(precision: Precision, *, at_least: int, below: int = 4) -> Expr:
    """Bytes of a number of this precision from a ZeRO level on and below another, else 0."""
    size = precision.num_bytes
    return sym.by_zero({zero: size * (at_least <= zero < below) for zero in range(4)})


def gradient_terms() -> dict[str, Expr]:
    """fp32 gradients per parameter on the device between two micro-batches, and behind the last.

    Between micro-batches they are whole below ZeRO-2, since nothing was reduced yet. Behind the
    last one ZeRO-1 has reduced them to shards, too. Only gradients of layers are offloaded.
    """
    fp32 = sympy.Float(Precision.FP32.num_bytes)
    shard = fp32 / sym.SHARD
    between = sympy.Piecewise((fp32, sym.ZERO < 2), (shard, True))
    behind = sympy.Piecewise((fp32, sym.ZERO < 1), (shard, True))
    on_device = 1 - sym.OFFLOAD["grads"]
    return {
        "grads_bytes_per_param": between,
        "layer_grads_bytes_per_param": on_device * between,
        "last_grads_bytes_per_param": behind,
        "layer_last_grads_bytes_per_param": on_device * behind,
    }


def bucket_params(runtime: Runtime) -> Expr:
    """Parameters whose shards fill a bucket of the optimizer's stream."""
    if runtime.offload is None or runtime.offload.bucket_bytes is None:
        return sympy.Float(0.0)
    shard = sympy.Float(runtime.offload.bucket_bytes.value / Precision.FP32.num_bytes)
    return sympy.Piecewise((shard, sym.ZERO < 1), (shard * sym.SHARD, True))
