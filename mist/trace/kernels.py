"""Operations that CUDA runs as one kernel and the CPU does not: shapes and gradients only.

aten._fused_rms_norm falls apart into pointwise operations on a CPU tensor, fake or not. Its
stand-in here stays whole, and saves for backward what the CUDA kernel's backward reads.
"""

from typing import Any, Final

import torch
import torch.library
from torch._ops import OpOverloadPacket
from torch.autograd.function import FunctionCtx


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
