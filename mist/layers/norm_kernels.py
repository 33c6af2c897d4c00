"""Norms by rows of root mean squares: one kernel on a GPU, the same in parts elsewhere.

    rstd = 1 / sqrt(mean(x^2) + eps),  y = scale * x * rstd,  xhat = x * rstd
    dx = rstd * (gs - xhat * mean(gs * xhat)),  dscale = sum(grad * xhat)        gs = grad * scale

torch has a kernel for each of the two on a GPU, and none elsewhere. Both are operations of their
own here, so that a trace can see them as the kernels that a GPU runs.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Gradients = tuple[Tensor | None, Tensor | None]
Means = Callable[[Tensor], Tensor]


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def row_means(x: Tensor) -> Tensor:
    """Of [..., h] the means over h, [..., 1]."""
    return x.mean(-1, keepdim=True)


def rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., h] in the type of x, and rstd [..., 1]; scale [h]."""
    if not _one_kernel(x, scale):
        return rms_norm_parts(x, scale, eps)
    result: tuple[Tensor, Tensor] = torch.ops.mist.rms_norm(x, scale, eps)
    return result


def rms_norm_gradients(
    grad: Tensor, x: Tensor, rstd: Tensor, scale: Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """dx in the type of x and dscale, each where `needs` says so."""
    if not _one_kernel(x, scale) or grad.dtype != x.dtype:
        return rms_norm_gradients_parts(grad, x, rstd, scale, needs)
    found: tuple[Tensor, Tensor] = torch.ops.mist.rms_norm_gradients(grad, x, rstd, scale, needs)
    dx, dscale = (each if need else None for each, need in zip(found, needs, strict=True))
    return dx, dscale


def norm_gradients(
    grad: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    needs: Sequence[bool],
    *,
    centered: bool,
    means: Means = row_means,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, scale and bias from the normalized rows, in fp32; `centered`: LayerNorm.

    `means`: of rows, of which ranks may have a part each.
    """
    grad_wide, rows = wide(grad), tuple(range(grad.dim() - 1))
    dx = None
    if needs[0]:
        scaled_grad = grad_wide if scale is None else grad_wide * wide(scale)
        inner = scaled_grad - xhat * means(scaled_grad * xhat)
        if centered:
            inner = inner - means(scaled_grad)
        dx = inner * rstd
    dscale = (grad_wide * xhat).sum(rows) if needs[1] else None
    return dx, dscale, grad_wide.sum(rows) if needs[2] else None


def _one_kernel(x: Tensor, scale: Tensor | None) -> bool:
    """Whether the kernels take these: one type, and no parts of a tensor."""
    return not isinstance(x, DTensor) and (scale is None or scale.dtype == x.dtype)


def rms_norm_parts(
    x: Tensor, scale: Tensor | None, eps: float, means: Means = row_means
) -> tuple[Tensor, Tensor]:
    """`rms_norm` in single operations."""
    x_wide = wide(x)
    rstd = torch.rsqrt(means(x_wide.square()) + eps)
    xhat = x_wide * rstd
    return (xhat if scale is None else xhat * wide(scale)).to(x.dtype), rstd


def rms_norm_gradients_parts(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    needs: Sequence[bool],
    means: Means = row_means,
) -> Gradients:
    """`rms_norm_gradients` in single operations."""
    xhat = wide(x) * rstd
    dx, dscale, _ = norm_gradients(
        grad, xhat, rstd, scale, (*needs, False), centered=False, means=means
    )
    # In the types of what they are gradients of; scale [h] of Gemma is in fp32 already.
    dx = None if dx is None else dx.to(x.dtype)
    return dx, dscale if scale is None or dscale is None else dscale.to(scale.dtype)


def _rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        result: tuple[Tensor, Tensor] = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], scale, eps)
        return result
    return rms_norm_parts(x, scale, eps)


def _rms_norm_gradients(
    grad: Tensor, x: Tensor, rstd: Tensor, scale: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        run = torch.ops.aten._fused_rms_norm_backward
        found: Gradients = run(grad, x, [x.shape[-1]], rstd, scale, needs)
    else:
        found = rms_norm_gradients_parts(grad, x, rstd, scale, needs)
    # An operation returns tensors: an empty one stands for what is not needed.
    dx, dscale = (x.new_empty(0) if each is None else each for each in found)
    return dx, dscale


_LIBRARY: Final = torch.library.Library("mist", "FRAGMENT")
_LIBRARY.define("rms_norm(Tensor x, Tensor? scale, float eps) -> (Tensor, Tensor)")
_LIBRARY.define(
    "rms_norm_gradients(Tensor grad, Tensor x, Tensor rstd, Tensor? scale, bool[] needs) -> "
    "(Tensor, Tensor)"
)
_LIBRARY.impl("rms_norm", _rms_norm, "CompositeImplicitAutograd")
_LIBRARY.impl("rms_norm_gradients", _rms_norm_gradients, "CompositeImplicitAutograd")
