"""Stand-ins for kernels that torch cannot imitate with symbolic sizes: shapes and gradients only.

aten._fused_rms_norm falls apart into pointwise operations on a CPU tensor, fake or not. Its
stand-in here stays whole, and saves for backward what the CUDA kernel's backward reads. Torch's
padding, Fourier transforms, solutions, polar form, sums with a product and gradient of an attention
bias look at sizes as numbers, which would fix the symbols; its grouped products refuse precisions
that the kernels take.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
import torch._refs
import torch.library
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.function import FunctionCtx

from mist.trace.expressions import Size
from mist.trace.operations.resampling import RESAMPLING


@torch.library.custom_op("mist::fused_rms_norm", mutates_args=())
def fused_rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, num_dims: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """CUDA's aten._fused_rms_norm: the normed x [..., n] and 1 / rms [..., 1] in fp32.

    Only its shapes are ever computed. The aten operation itself is no single operation on a CPU.
    """
    raise NotImplementedError


@torch.library.custom_op("mist::fused_rms_norm_backward", mutates_args=())
def fused_rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and of the weight."""
    raise NotImplementedError


@fused_rms_norm.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor | None, num_dims: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[: x.dim() - num_dims], *[1] * num_dims)
    return torch.empty_like(x), x.new_empty(shape, dtype=torch.float32)


@fused_rms_norm_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(()) if weight is None else torch.empty_like(weight)


class _Context(FunctionCtx):
    saved_tensors: tuple[torch.Tensor, ...]


def _keep(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _ = inputs
    # 1 / rms has no gradient: zeros in its place would count as memory.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *([] if weight is None else [weight]))


def _rms_norm_gradients(
    ctx: _Context, grad: torch.Tensor, _: None
) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    x, rstd, *weight = ctx.saved_tensors
    grad_x, grad_weight = fused_rms_norm_backward(grad, x, rstd, weight[0] if weight else None)
    return grad_x, grad_weight if weight else None, None


fused_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_keep)

RMS_NORM: Final[OpOverloadPacket] = torch.ops.mist.fused_rms_norm
RMS_NORM_BACKWARD: Final[OpOverloadPacket] = torch.ops.mist.fused_rms_norm_backward


def _fft_c2c(
    x: torch.Tensor, dim: Sequence[int], normalization: int, forward: bool
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fft_r2c(
    x: torch.Tensor, dim: Sequence[int], normalization: int, onesided: bool
) -> torch.Tensor:
    shape = list(x.shape)
    if onesided:
        shape[dim[-1]] = shape[dim[-1]] // 2 + 1
    return x.new_empty(shape, dtype=x.dtype.to_complex())


def _fft_c2r(
    x: torch.Tensor, dim: Sequence[int], normalization: int, last_dim_size: int
) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim[-1]] = last_dim_size
    return x.new_empty(shape, dtype=x.dtype.to_real())


def _solve_triangular(
    a: torch.Tensor, b: torch.Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> torch.Tensor:
    """The solution [*, n, k] lies by columns, as LAPACK leaves it."""
    return b.new_empty((*b.shape[:-2], b.shape[-1], b.shape[-2])).mT


def _polar(modulus: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    return modulus.new_empty(modulus.shape, dtype=modulus.dtype.to_complex())


def _grouped_mm(
    x: torch.Tensor,
    other: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rows are padded to `ALIGNMENT_BYTES`, as torch allocates them."""
    groups = [offs.shape[0]] if offs is not None and x.dim() == other.dim() == 2 else []
    batch = [x.shape[0]] if x.dim() == other.dim() == 3 else groups
    rows: Size = x.shape[-2]
    columns: Size = other.shape[-1]
    dtype = out_dtype or x.dtype
    grain = ALIGNMENT_BYTES // dtype.itemsize
    whole = (columns + grain - 1) // grain * grain
    padded = whole if isinstance(columns, int) else columns  # a shard is taken to be aligned
    strides = ([rows * padded] if batch else []) + [padded, 1]
    return x.new_empty_strided((*batch, rows, columns), strides, dtype=dtype)


def _efficient_attention_backward(
    *arguments: Any,  # noqa: ANN401 (as torch has them)
    scale: float | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients lie [b, s, h, d]; those of the bias in rows that are padded to `BIAS_GRAIN`."""
    _, *inputs, bias = arguments[:5]
    of_inputs = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in inputs]
    if bias is None or not arguments[WANTED][-1]:
        return (*of_inputs, None)
    columns: Size = bias.shape[-1]
    padded = (columns + BIAS_GRAIN - 1) // BIAS_GRAIN * BIAS_GRAIN
    return (*of_inputs, bias.new_empty((*bias.shape[:-1], padded))[..., :columns])


def _baddbmm(
    addend: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """Scores [b, m, n] with biases (ALiBi) that are broadcast to them."""
    return addend.new_empty((*left.shape[:2], right.shape[2]))


def _masked_scatter(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Rows of a source in the places of a mask (tokens of images among those of a text)."""
    return x.new_empty(x.shape)


def _ctc_loss(
    log_probs: torch.Tensor, targets: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of b samples, and alpha [b, t, 2 n + 1], from log-probabilities [t, b, words].

    n, the longest target, is a value: that of targets [b, n], or of equal ones one behind another.
    """
    num_steps, batch = log_probs.shape[:2]
    longest = targets.shape[1] if targets.dim() == 2 else targets.numel() // batch
    alpha = log_probs.new_empty((batch, num_steps, 2 * longest + 1))
    return log_probs.new_empty((batch,)), alpha


def _ctc_loss_backward(
    grad: torch.Tensor, log_probs: torch.Tensor, *_: object, **__: object
) -> torch.Tensor:
    return torch.empty_like(log_probs)


ALIGNMENT_BYTES: Final = 16
BIAS_GRAIN: Final = 16  # columns
WANTED: Final = 10  # the argument that says which gradients of attention are asked for
aten = torch.ops.aten
SYMBOLIC: Final[Mapping[OpOverloadPacket, Callable[..., Any]]] = MappingProxyType(
    {
        aten.constant_pad_nd: torch._refs.constant_pad_nd,
        aten._grouped_mm: _grouped_mm,
        aten._fft_c2c: _fft_c2c,
        aten._fft_r2c: _fft_r2c,
        aten._fft_c2r: _fft_c2r,
        aten.linalg_solve_triangular: _solve_triangular,
        aten.polar: _polar,
        aten._scaled_dot_product_efficient_attention_backward: _efficient_attention_backward,
        aten.baddbmm: _baddbmm,
        aten.masked_scatter: _masked_scatter,
        aten._ctc_loss: _ctc_loss,
        aten._ctc_loss_backward: _ctc_loss_backward,
        **RESAMPLING,
    }
)

_LIBRARY: Final = torch.library.Library("mist", "FRAGMENT")


def _opaque(packet: OpOverloadPacket) -> OpOverload:
    """The same operation under the name of mist, which no tracer takes apart."""
    name = packet.default.name().removeprefix("aten::")
    _LIBRARY.define(str(packet.default._schema).removeprefix("aten::"))
    torch.library.register_fake(f"mist::{name}", SYMBOLIC[packet], lib=_LIBRARY)
    stand_in: OpOverload = getattr(torch.ops.mist, name).default
    return stand_in


# What stands in a graph traced ahead of time for an operation with a stand-in, which would fall
# apart there; and the operation that it stands for.
OPAQUE: Final[Mapping[OpOverloadPacket, OpOverload]] = MappingProxyType(
    {packet: _opaque(packet) for packet in SYMBOLIC}
)
KNOWN_AS: Final[Mapping[OpOverload, OpOverload]] = MappingProxyType(
    {opaque: packet.default for packet, opaque in OPAQUE.items()}
)
