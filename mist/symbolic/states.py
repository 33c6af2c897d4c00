"""What states and groups of parameters take, in bytes per parameter, by ZeRO level."""

import sympy
from sympy import Expr

from mist.platform.runtime import Runtime
from mist.spec import Precision
from mist.symbolic import symbols as sym


def gathered_bytes(runtime: Runtime, precision: Precision) -> Expr:
    """Bytes per parameter of one group in passing: gathered copies, gradients being reduced."""
    reducing = runtime.reduce_bytes[precision].value
    gathered = runtime.transients.num_gathered_groups.value * precision.num_bytes
    by_level = {int(z): reducing + (gathered if z == 3 else 0) for z in runtime.knobs.zero_levels}
    return sym.by_zero(by_level)


def from_level(level: int, precision: Precision, *, below: int = 4) -> Expr:
    """Bytes of a number of this precision from a ZeRO level on and below another, else 0."""
    return sym.by_zero({zero: precision.num_bytes * (level <= zero < below) for zero in range(4)})


def unmade_terms() -> dict[str, Expr]:
    """fp32 gradients per parameter on the device: amid a step with others, and as one leaves them.

    There are none when the first backward pass begins; a lone one leaves shards under ZeRO-1.
    """
    fp32 = sympy.Float(Precision.FP32.num_bytes)
    shard = fp32 / sym.SHARD
    amid = sympy.Piecewise((fp32, sym.ZERO < 2), (shard, True))
    left = sympy.Piecewise((fp32, sym.ZERO < 1), (shard, True))
    stays = 1 - sym.OFFLOAD["grads"]
    return {
        "grads_bytes_per_param": amid,
        "layer_grads_bytes_per_param": stays * amid,
        "left_bytes_per_param": left,
        "layer_left_bytes_per_param": stays * left,
    }


def bucket_params(runtime: Runtime) -> Expr:
    """Parameters whose shards fill a bucket of the optimizer's stream."""
    if runtime.offload is None or runtime.offload.bucket_bytes is None:
        return sympy.Float(0.0)
    own = sympy.Float(runtime.offload.bucket_bytes.value / Precision.FP32.num_bytes)
    return sympy.Piecewise((own, sym.ZERO < 1), (own * sym.SHARD, True))
