"""Norms over what tensor-parallel ranks divide: each rank's means, and their mean over the ranks.

A norm over all heads of queries or keys has a mean over a dimension of which a rank holds 1/t. The
ranks' parts are of one size, so the mean of their means is the model's; so is its gradient, as each
rank reads it for its own part. Only [..., 1] is sent, where the input itself would be gathered.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.overrides import TorchFunctionMode

from mist.layers.norm_kernels import rms_norm_gradients_parts, rms_norm_parts, row_means
from mist.layers.norms import default_epsilon
from mist.layers.recipes import apply_function
from mist.trace.operations.sized_calls import uncounted


def _shared(mean: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The mean over the ranks; each reads it for its own part, so gradients are parts of a sum."""
    parts = DTensor.from_local(mean / mesh.size(), mesh, (Partial(),), run_check=False)
    return parts.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))


def _shared_row_means(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    return _shared(row_means(x), mesh)


class _NormContext(FunctionCtx):
    mesh: DeviceMesh
    saved_tensors: tuple[torch.Tensor, ...]


class _SharedNorm(torch.autograd.Function):
    """Torch's norm by root mean squares, which keeps x [..., h] and 1 / rms [..., 1], in parts."""

    @staticmethod
    def forward(
        ctx: _NormContext,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        mesh: DeviceMesh,
    ) -> torch.Tensor:
        result, rstd = rms_norm_parts(x, weight, eps, partial(_shared_row_means, mesh=mesh))
        ctx.mesh = mesh
        ctx.save_for_backward(x, rstd, *([] if weight is None else [weight]))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: _NormContext, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, *weights = ctx.saved_tensors
        weight, means = next(iter(weights), None), partial(_shared_row_means, mesh=ctx.mesh)
        needs = (True, weight is not None)
        return (*rms_norm_gradients_parts(grad, x, rstd, weight, needs, means), None, None)


class _SharedMeans(TorchFunctionMode):
    """Makes each mean that a norm takes over its rows the one of all ranks."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self._mesh = mesh

    def __torch_function__(
        self,
        func: Callable[..., torch.Tensor],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        name = getattr(func, "__name__", "")
        with uncounted():
            if name == "rms_norm":
                return self._rms_norm(*args, **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
            over_rows = name == "mean" and _is_over_rows(*args, **(kwargs or {}))
            return _shared(result, self._mesh) if over_rows else result

    def _rms_norm(
        self,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        step = default_epsilon(x) if eps is None else eps
        result: torch.Tensor = apply_function(_SharedNorm, x, weight, step, self._mesh)
        return result


def _is_over_rows(
    x: torch.Tensor, dim: int | Sequence[int] | None = None, *others: object, **named: object
) -> bool:
    """Whether a mean is over the last dimension, of which a rank has a part."""
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    return [each % x.dim() for each in dims] == [x.dim() - 1]


def share_means(module: nn.Module, mesh: DeviceMesh) -> None:
    """Have a norm's forward take its means over the ranks of `mesh`, in place."""
    module.forward = partial(_forward, module.forward, mesh)


def _forward(
    forward: Callable[..., torch.Tensor], mesh: DeviceMesh, *args: object, **kwargs: object
) -> torch.Tensor:
    with _SharedMeans(mesh):
        return forward(*args, **kwargs)
